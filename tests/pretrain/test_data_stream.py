"""Remote shards: each image once per epoch over all ranks, continued to the bit, broken connections taken up again."""

import dataclasses
import io
import itertools
import pickle
import tarfile
import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pretrain.data import stream
from pretrain.data.config import CropsConfig, DataConfig, MaskConfig
from pretrain.data.loader import batches
from pretrain.data.sources import open_data
from pretrain.data.stream import Position, Stream
from runtime.errors import UserError

SHARDS, IMAGES = 5, 6  # shards, and images of each


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 10, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards written by webdataset; image i of shard s has the key 's-i'."""
    path = tmp_path_factory.mktemp("remote")
    with webdataset.ShardWriter(str(path / "train-%02d.tar"), maxcount=IMAGES, verbose=0) as writer:
        for shard, i in itertools.product(range(SHARDS), range(IMAGES)):
            writer.write({"__key__": f"{shard}-{i}", "png": picture(10 * shard + i), "txt": f"image {i}"})
    return path


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder without ranges, and drops as many connections as it is told to, in the middle of a file."""

    drops = 0
    requests = 0

    def copyfile(self, source, outputfile):
        type(self).requests += 1
        if type(self).drops > 0:
            type(self).drops -= 1
            data = source.read()
            outputfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        super().copyfile(source, outputfile)

    def log_message(self, format, *args):
        pass


@contextmanager
def serving(folder: Path, drops: int = 0):
    handler = type("ThisHandler", (Handler,), {"drops": drops})
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(stream, "WAIT", 0.01)


def local(folder: Path, buffer: int = 8) -> Stream:
    return Stream.open([f"file://{folder}"], buffer=buffer)


def load(data, *, batch_size=4, start_step=0, num_steps=4, num_workers=0, **changes):
    settings = {"crops": CropsConfig(16, 8, 1), "mask": MaskConfig(), "seed": 0, "patch_size": 4} | changes
    return list(
        batches(
            data, batch_size=batch_size, start_step=start_step, num_steps=num_steps, num_workers=num_workers, **settings
        )
    )


def assert_equal(one, two):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def keys(stream: Stream, count: int, **settings) -> list[str]:
    images = stream.images(**({"seed": 0, "rank": 0, "world_size": 1, "position": None} | settings))
    return [item.key for item, _ in itertools.islice(images, count)]


ALL = [f"{shard}-{i}" for shard in range(SHARDS) for i in range(IMAGES)]


@pytest.mark.parametrize("buffer", [1, 7, 30, 1000])
def test_every_image_once_per_epoch_each_time_in_another_order(folder, buffer):
    found = keys(local(folder, buffer), 3 * len(ALL))
    epochs = [found[i * len(ALL) : (i + 1) * len(ALL)] for i in range(3)]
    assert all(sorted(epoch) == ALL for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(local(folder, buffer), len(ALL), seed=1) != epochs[0]


def test_a_larger_buffer_shuffles_more(folder):
    def shards_met(buffer):
        """Shards among 6 images that follow each other, on average."""
        found = keys(local(folder, buffer), 10 * len(ALL))
        return np.mean([len({key[0] for key in found[i : i + 6]}) for i in range(0, len(found), 6)])

    assert shards_met(1) == 1
    assert shards_met(15) > 2
    assert shards_met(30) > 3


def test_no_more_images_are_held_than_the_buffer_has(folder, monkeypatch):
    held, made = weakref.WeakSet(), stream.Item
    monkeypatch.setattr(stream, "Item", lambda *values: held.add(item := made(*values)) or item)
    monkeypatch.setattr(made, "__hash__", object.__hash__)
    most = 0
    for _ in itertools.islice(local(folder, 10).images(seed=0, rank=0, world_size=1, position=None), 100):
        most = max(most, len(held))
    assert 10 <= most <= 10 + 3  # the one given out last, the next one, and the one on its way


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_shards_of_an_epoch(folder, world_size):
    shards = local(folder)
    seen: dict[int, list[str]] = {0: [], 1: []}
    for rank in range(world_size):
        for item, _ in shards.images(seed=0, rank=rank, world_size=world_size, position=None):
            if item.epoch == 2:
                break
            seen[item.epoch].append(item.key)
    assert sorted(seen[0]) == sorted(seen[1]) == ALL


def test_no_rank_is_bound_to_one_part_of_the_data(folder):
    assert set(keys(local(folder), 20 * len(ALL), rank=1, world_size=5)) == set(ALL)


@pytest.mark.parametrize("buffer", [1, 8, 1000])
def test_the_stream_goes_on_from_any_position(folder, buffer):
    """The state is where the window began and what was taken of it; it survives pickling and JSON's lists."""
    shards = local(folder, buffer)
    arguments = {"seed": 0, "rank": 1, "world_size": 2}
    whole = list(itertools.islice(shards.images(**arguments, position=None), 50))
    for stop in (0, 1, 6, 7, 14, 15, 29, 40):
        position = Position(*list(pickle.loads(pickle.dumps(tuple(whole[stop][1])))))
        again = itertools.islice(shards.images(**arguments, position=position), 50 - stop - 1)
        assert [(item, place) for item, place in again] == whole[stop + 1 :], stop


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_to_the_bit(folder, num_workers):
    expected = load(local(folder), num_steps=9)
    assert all(isinstance(batch.position, tuple) for batch in expected)
    for stop in (1, 4, 8):
        loader = batches(
            local(folder), crops=CropsConfig(16, 8, 1), mask=MaskConfig(), seed=0, patch_size=4, batch_size=4,
            start_step=0, num_steps=9, num_workers=num_workers,
        )  # fmt: skip
        consumed = [next(loader) for _ in range(stop)]  # workers and reader are further by now
        del loader
        position = consumed[-1].position
        rest = load(local(folder), start_step=stop, num_steps=9 - stop, position=position, num_workers=num_workers)
        for one, two in zip(expected, [*consumed, *rest], strict=True):
            assert_equal(one, two)


def test_crops_depend_on_seed_epoch_and_sample_only(folder):
    whole, shuffled = load(local(folder, 30), num_steps=7), load(local(folder, 3), num_steps=7)

    def by_sample(found):
        return {int(s): b.global_crops.unflatten(0, (2, 4))[:, i] for b in found for i, s in enumerate(b.samples)}

    one, two = by_sample(whole), by_sample(shuffled)
    both = one.keys() & two.keys()
    assert len(both) > 20
    assert all(torch.equal(one[sample], two[sample]) for sample in both)


def test_another_number_of_processes_begins_the_epoch_again(folder, capsys):
    shards = local(folder)
    images = shards.images(seed=0, rank=0, world_size=1, position=None)
    *_, (_, position) = itertools.islice(images, 40)
    assert position.epoch == 1
    again = [
        [item.key for item, _ in itertools.takewhile(lambda pair: pair[0].epoch == 1,
         shards.images(seed=0, rank=rank, world_size=2, position=position))] for rank in (0, 1)
    ]  # fmt: skip
    assert sorted(again[0] + again[1]) == ALL
    assert "epoch 1 of the stream begins again" in capsys.readouterr().err


def test_any_kind_of_url_gives_the_same_images(folder):
    memory = fsspec.filesystem("memory")
    for path in sorted(folder.glob("*.tar")):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        expected = keys(local(folder), 35)
        assert keys(Stream.open(["memory://bucket"], buffer=8), 35) == expected
        assert keys(Stream.open(["memory://bucket/train-*.tar"], buffer=8), 35) == expected
        with serving(folder) as (url, handler):
            braces = Stream.open([f"{url}/train-{{00..04}}.tar"], buffer=8)
            assert len(braces.urls) == 5
            assert keys(braces, 35) == expected
            assert keys(Stream.open([f"{url}/"], buffer=8), 35) == expected  # the server lists its folder
            assert handler.requests > 10
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_connection_that_breaks_is_taken_up_where_it_was(folder, capsys):
    expected = load(local(folder), num_steps=8)
    with serving(folder, drops=3) as (url, handler):
        shards = Stream.open([f"{url}/train-{{00..04}}.tar"], buffer=8)
        for one, two in zip(expected, load(shards, num_steps=8), strict=True):
            assert_equal(one, two)
        assert handler.drops == 0
    assert "trying again from image" in capsys.readouterr().err


def test_a_server_that_keeps_breaking_is_named(folder):
    with serving(folder, drops=10**6) as (url, _):
        shards = Stream.open([f"{url}/train-00.tar"], buffer=8)
        with pytest.raises(UserError, match=rf"{url}/train-00.tar ends after \d images: .*\n  tried 5 times") as error:
            keys(shards, 10)
        assert len(str(error.value).splitlines()) == 2
        with pytest.raises(UserError, match=r"no http.*/absent\.tar"):
            keys(Stream.open([f"{url}/absent.tar"], buffer=8), 1)
    with pytest.raises(UserError, match=r"train-00\.tar ends after 0 images"):  # nobody listens any more
        keys(shards, 1)


@pytest.mark.parametrize("cut", [700, 1024, 2000, 5000])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_cut_in_half_is_named(folder, tmp_path, cut, num_workers):
    path = tmp_path / "half.tar"
    path.write_bytes((folder / "train-00.tar").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"half\.tar ends after \d images: (cut off|no end-of|damaged)"):
        load(local(tmp_path), num_steps=1, num_workers=num_workers)


def test_corrupt_images_are_replaced_from_the_next_batch(tmp_path):
    members = {f"{i:02d}.png": picture(i) if i % 6 else b"\x89PNG no image" for i in range(24)}
    write_tar(tmp_path / "t.tar", members)
    found = load(local(tmp_path, 1), num_steps=6)
    assert Counter(line for batch in found for line in batch.skipped) == {
        f"{i:02d}: corrupt": 1 for i in (0, 6, 12, 18)
    }
    assert found[0].samples.tolist() == [4, 1, 2, 3]
    assert found[1].samples.tolist() == [4, 5, 8, 7]
    write_tar(tmp_path / "t.tar", {f"{i:02d}.png": b"no image" for i in range(24)})
    with pytest.raises(UserError, match="6 images of one batch cannot be decoded, first 00: not an image"):
        load(local(tmp_path, 1), num_steps=1, batch_size=4)


def test_what_is_no_image_is_passed_over(tmp_path):
    write_tar(tmp_path / "t.tar", {"a.json": b"{}", "a.one.png": picture(1), "a.two.png": picture(2), "b.txt": b"b",
                                   "c.JPEG": picture(3)})  # fmt: skip
    assert keys(local(tmp_path), 2) == ["a", "c"]
    write_tar(tmp_path / "t.tar", {"a.json": b"{}"})
    with pytest.raises(UserError, match=r"no image in file://.*t\.tar"):
        keys(local(tmp_path), 1)


def test_the_fingerprint_is_of_the_names(folder):
    one, two = (Stream.open(["memory://b/x-{0..3}.tar"], buffer=buffer).fingerprint for buffer in (1, 2))
    assert one == two
    assert one != Stream.open(["memory://b/x-{0..4}.tar"], buffer=1).fingerprint


def refused(*shards: str, **changes) -> str:
    with pytest.raises(UserError) as error:
        open_data(DataConfig(shards=shards, **changes))
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_wrong_urls(monkeypatch, folder):
    assert "nobody knows how to read gopher://" in refused("gopher://host/t.tar")
    assert "data.shuffle_buffer: found 0" in refused("memory://b/t.tar", shuffle_buffer=0)
    assert "no .tar in memory://nothing" in refused("memory://nothing")
    assert "is local and memory://b/t.tar is remote" in refused("memory://b/t.tar", str(folder))
    known = fsspec.get_filesystem_class

    def without_s3(scheme):
        if scheme == "s3":
            raise ImportError("Install s3fs to access S3")
        return known(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", without_s3)
    assert "pip install 'troodon[s3]'" in refused("s3://bucket/t-{000..010}.tar")


def test_more_processes_than_shards_are_refused():
    shards = Stream.open(["memory://b/x-{0..3}.tar"], buffer=8)
    with pytest.raises(UserError, match="4 remote shards for 5 processes"):
        load(shards, batch_size=5, world_size=5)
