"""Mixed sets: exact shares, evenly spaced batches of one set, each set once per its own epoch, seeking at no cost."""

import io
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.config import CropsConfig, DataConfig, MaskConfig, SetConfig
from pretrain.data.loader import batches
from pretrain.data.mixture import PERIOD, Deal, Mixture, Part
from pretrain.data.sources import open_data
from runtime.errors import UserError


def image_tar(path: Path, *, images: int, shade: int, corrupt: int = 0) -> str:
    with tarfile.open(path, "w") as tar:
        for i in range(corrupt + images):
            buffer = io.BytesIO()
            Image.new("RGB", (10, 9), (shade, i, 0)).save(buffer, "PNG")
            data = buffer.getvalue() if i >= corrupt else b"\xff\xd8 no image"
            entry = tarfile.TarInfo(f"{path.stem}-{i:03d}.{'png' if i >= corrupt else 'jpg'}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


@pytest.fixture
def sets(tmp_path):
    """Three sets of 12, 7 and 5 images."""
    return [
        SetConfig("web", (image_tar(tmp_path / "web.tar", images=12, shade=0),), weight=3),
        SetConfig("maps", (image_tar(tmp_path / "maps.tar", images=7, shade=100),), weight=1),
        SetConfig("labelled", (image_tar(tmp_path / "labelled.tar", images=5, shade=200),), weight=0, batches=0.25),
    ]


def load(data, *, batch_size=4, start_step=0, num_steps=8, **changes):
    settings = {"crops": CropsConfig(16, 8, 1), "mask": MaskConfig(), "seed": 0, "num_workers": 0, "patch_size": 4}
    return list(
        batches(data, batch_size=batch_size, start_step=start_step, num_steps=num_steps, **(settings | changes))
    )


def at(mixture: Mixture, part: int, places) -> list[tuple[int, int]]:
    """Epoch and sample of each place of a part."""
    places = np.array(places)
    epochs, samples = mixture.at(np.full(len(places), part), places, seed=0)
    return list(zip(epochs.tolist(), samples.tolist(), strict=True))


def test_shares_are_exact_and_evenly_spaced():
    deal = Deal.by([0.3, 0.6, 0.1])
    turns = deal.at(np.arange(3 * PERIOD))
    assert (np.bincount(turns) == 3 * PERIOD * np.array([0.3, 0.6, 0.1])).all()
    for number, share in enumerate((0.3, 0.6, 0.1)):
        assert abs(np.cumsum(turns == number) - share * np.arange(1, len(turns) + 1)).max() < 1.5
        slow = np.concatenate([[0], np.cumsum(turns == number)])
        some = np.array([0, 1, 17, PERIOD - 1, PERIOD, PERIOD + 5, 3 * PERIOD])
        assert (deal.before(number, some) == slow[some]).all()
    thirds = np.bincount(Deal.by([1, 1, 1]).turns)
    assert (thirds == PERIOD / 3).all()
    assert np.bincount(Deal.by([2**0.5, 1]).turns).tolist() == [14762, 10438]  # 14761.8 and 10438.2


def test_one_batch_in_ten_of_a_single_set():
    """DINOv3 (sec. 3.1): every tenth step is of ImageNet-1k alone."""
    mixture = Mixture.of((Part("all", [0] * 1000), Part("imagenet", [0] * 100, weight=0, batches=0.1)))  # pyright: ignore
    slots = np.arange(8)
    own = [step for step in range(200) if set(mixture.places(step, slots, batch_size=8)[0]) == {1}]
    assert own == list(range(own[0], 200, 10))
    assert own[0] < 10
    mixed = {int(p) for step in range(200) if step not in own for p in mixture.places(step, slots, batch_size=8)[0]}
    assert mixed == {0}


def test_each_set_runs_through_its_own_images_without_gaps(sets):
    mixture = open_data(DataConfig(sets=tuple(sets)))
    assert isinstance(mixture, Mixture)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(40):
        for part, place in zip(*mixture.places(step, np.arange(8), batch_size=8), strict=True):
            seen[int(part)].append(int(place))
    assert {part: len(places) for part, places in seen.items()} == {0: 180, 1: 60, 2: 80}  # 3 : 1 of 30 steps, 10 own
    for part, size in enumerate((12, 7, 5)):
        assert sorted(seen[part]) == list(range(len(seen[part])))
        samples = at(mixture, part, sorted(seen[part]))
        first = sum((12, 7, 5)[:part])
        assert [epoch for epoch, _ in samples] == [place // size for place in range(len(samples))]
        for start in range(0, len(samples) - size, size):
            assert sorted(sample for _, sample in samples[start : start + size]) == list(range(first, first + size))


def test_samples_are_numbered_through_all_sets(sets):
    mixture = open_data(DataConfig(sets=tuple(sets)))
    assert len(mixture) == mixture.num_images == 24
    keys = [mixture.read(i)[0] for i in range(24)]
    assert keys == [
        f"{name}-{i:03d}" for name, size in (("web", 12), ("maps", 7), ("labelled", 5)) for i in range(size)
    ]
    for batch in load(mixture, crops=CropsConfig(16, 8, 0, flip=0)):
        parts = np.searchsorted([12, 19, 24], batch.samples.numpy(), side="right")
        assert (set(parts) == {2}) or (2 not in parts)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_and_workers_gives_the_same_batches(sets, world_size):
    mixture = open_data(DataConfig(sets=tuple(sets)))
    whole = load(mixture, batch_size=8, num_steps=5)
    parts = [load(mixture, batch_size=8, num_steps=5, world_rank=rank, world_size=world_size,
                  num_workers=rank % 2) for rank in range(world_size)]  # fmt: skip
    for batch, *each in zip(whole, *parts, strict=True):
        assert torch.cat([part.samples for part in each]).tolist() == batch.samples.tolist()
        views = [part.global_crops.unflatten(0, (2, -1)) for part in each]
        assert torch.equal(torch.cat(views, 1).flatten(0, 1), batch.global_crops)


def test_crops_of_a_sample_depend_on_seed_epoch_and_sample_only(sets):
    """Whatever the shares of its set and the size of the batch, the first crops of an image are the same."""

    def first_crops(sets, batch_size):
        found = {}
        for batch in load(open_data(DataConfig(sets=tuple(sets))), batch_size=batch_size, num_steps=48 // batch_size):
            views = batch.global_crops.unflatten(0, (2, batch_size))
            for slot, sample in enumerate(batch.samples.tolist()):
                found.setdefault(sample, views[:, slot])
        return found

    one, two = first_crops(sets, 4), first_crops([replace(sets[0], weight=1), *sets[1:]], 6)
    both = one.keys() & two.keys()
    assert len(both) > 18
    assert all(torch.equal(one[sample], two[sample]) for sample in both)


def test_a_resumed_run_seeks(sets):
    mixture = open_data(DataConfig(sets=tuple(sets)))
    far = 10**9
    (one,) = load(mixture, start_step=far, num_steps=1)
    assert len(one.samples) == 4
    for whole, again in zip(load(mixture)[5:], load(mixture, start_step=5, num_steps=3), strict=True):
        assert torch.equal(whole.global_crops, again.global_crops)
        assert torch.equal(whole.masks, again.masks)


def test_a_corrupt_image_is_replaced_from_its_own_set(tmp_path):
    parts = (
        SetConfig("good", (image_tar(tmp_path / "good.tar", images=6, shade=0),)),
        SetConfig("bad", (image_tar(tmp_path / "bad.tar", images=4, shade=9, corrupt=3),)),
    )
    found = load(open_data(DataConfig(sets=parts)), num_steps=14)
    assert {sum(sample >= 6 for sample in batch.samples.tolist()) for batch in found} == {2}
    seen = Counter(sample for batch in found for sample in batch.samples.tolist())
    assert not any(seen[6 + i] for i in range(3))  # the three that cannot be decoded
    assert sum(len(batch.skipped) for batch in found) >= 10
    assert all(line.startswith("bad-00") for batch in found for line in batch.skipped)


def test_two_sets_of_one_size_do_not_run_in_step(tmp_path):
    """Else the pictures of two sensors of one place would always meet."""
    parts = [SetConfig(name, (image_tar(tmp_path / f"{name}.tar", images=9, shade=9),)) for name in ("red", "radar")]
    mixture = open_data(DataConfig(sets=tuple(parts)))
    assert isinstance(mixture, Mixture)
    orders = [[sample - 9 * part for _, sample in at(mixture, part, range(9))] for part in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_the_fingerprint_is_of_sets_names_and_shares(sets):
    print_of = lambda sets: open_data(DataConfig(sets=tuple(sets))).fingerprint  # noqa: E731
    one = print_of(sets)
    assert one == print_of(sets)
    assert one != print_of([SetConfig("web", sets[0].shards, weight=2), *sets[1:]])
    assert one != print_of([SetConfig("net", sets[0].shards, weight=3), *sets[1:]])
    assert one != print_of(sets[:2])
    assert one != print_of([SetConfig("web", sets[1].shards, weight=3), *sets[1:]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([SetConfig("", ("T",))], "data.sets[0].name: found ''"),
        ([SetConfig("a", ("T",)), SetConfig("a", ("T",))], "data.sets[0].name: found 'a'"),
        ([SetConfig("a", ("T",), weight=-1)], "a has weight -1"),
        ([SetConfig("a", ("T",), weight=1e-5), SetConfig("b", ("T",))], "a has a share below 1 in 25200"),
        ([SetConfig("a", ("T",), batches=1.5)], "batches 1.5"),
        ([SetConfig("a", ("T",), weight=0)], "a has weight 0 and no batches"),
        ([SetConfig("a", ("T",), weight=0, batches=0.5)], "all weights are 0, and 50%"),
        ([SetConfig("a", ("T",), batches=0.6), SetConfig("b", ("T",), batches=0.6)], "make 1.2 of the steps"),
        ([SetConfig("a", ())], "data.sets: a has no shards"),
        ([SetConfig("a", ("memory://x.tar",))], "remote shards cannot be mixed"),
    ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path, parts, message):
    tar = image_tar(tmp_path / "t.tar", images=1, shade=0)
    placed = tuple(
        SetConfig(part.name, tuple(tar if text == "T" else text for text in part.shards), part.weight, part.batches)
        for part in parts
    )
    with pytest.raises(UserError) as error:
        open_data(DataConfig(sets=placed))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_shards_and_sets_together_are_refused():
    with pytest.raises(UserError, match=r"data.shards and data.sets"):
        open_data(DataConfig(shards=("x",), sets=(SetConfig("a", ("y",)),)))
