"""Training a copy network: its loss against a slow oracle, copies left out, a stop and a resume, the model it makes."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from curation.backbone import load_embedder, model_identity
from curation.copydetect.config import (
    CopyNetworkConfig,
    CopyOptimConfig,
    CopySourceConfig,
    CopyTrainConfig,
)
from curation.copydetect.data import Views, distinct, load_pictures
from curation.copydetect.loss import copy_loss
from curation.copydetect.train import entropy_weight, rate, train_copy
from runtime.errors import Stopped, UserError
from runtime.files import read_json

CPU = torch.device("cpu")
KEY = "embed.copy.model"


def write_images(folder, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")


@pytest.fixture
def config(tmp_path) -> CopyTrainConfig:
    write_images(tmp_path / "images", 14)
    shutil.copy(tmp_path / "images" / "00.png", tmp_path / "images" / "same bytes.png")
    with Image.open(tmp_path / "images" / "01.png") as image:
        image.save(tmp_path / "images" / "same look.jpg", quality=90)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    return CopyTrainConfig(
        out=str(tmp_path / "run"),
        device="cpu",
        workers=0,
        source=CopySourceConfig(paths=(str(tmp_path / "images"),), about="patterns", held_out=4),
        network=CopyNetworkConfig(channels=(8, 8, 8, 8), layers=(1, 1, 1, 1), dim=16, size=32),
        optim=CopyOptimConfig(steps=4, batch_size=4, warmup_steps=1),
    )


def test_the_loss_equals_its_definition():
    rng = np.random.default_rng(0)
    views = [rng.normal(size=(5, 7)) for _ in range(2)]
    first, second = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in views)
    vectors = [*first, *second]
    contrast = entropy = 0.0
    for i, vector in enumerate(vectors):
        partner = (i + 5) % 10
        scores = {j: float(vector @ other) / 0.1 for j, other in enumerate(vectors) if j != i}
        contrast += math.log(sum(math.exp(s) for s in scores.values())) - scores[partner]
        entropy -= math.log(min(np.linalg.norm(vector - vectors[j]) for j in scores if j != partner))
    loss, only = copy_loss(torch.tensor(first), torch.tensor(second), temperature=0.1, entropy_weight=2.0)
    assert float(only) == pytest.approx(contrast / 10)
    assert float(loss) == pytest.approx(contrast / 10 + 2 * entropy / 10)


def test_distinct_keeps_the_first_of_those_within_the_distance():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (60, 2), dtype=np.uint64)
    hashes[7, 0] = hashes[3, 0] ^ np.uint64(0b101)  # two bits away
    hashes[9, 0] = hashes[4, 0] ^ np.uint64(0b11111)  # five bits away
    hashes[20, 1] = hashes[2, 0]  # a mirror image
    assert set(range(60)) - set(distinct(hashes, 4)) == {7, 20}
    assert set(range(60)) - set(distinct(hashes, 5)) == {7, 9, 20}


def test_pictures_are_distinct_and_counted(config):
    pictures = load_pictures(config)
    assert len(pictures.ids) == len(set(pictures.ids)) == 14
    assert pictures.sources == {"images": 14}
    assert pictures.large.shape == (14, 3, 48, 48)
    assert pictures.plain.shape == (14, 3, 32, 32)
    train, held_out = pictures.split(4, seed=0)
    assert sorted([*train, *held_out]) == list(range(14))
    with pytest.raises(UserError, match=r"source\.paths: 14 distinct images; expected at least"):
        load_pictures(replace(config, optim=CopyOptimConfig(batch_size=16)))


def test_a_step_shows_each_picture_once_and_pastes_others(config):
    pictures = load_pictures(config)
    train, _ = pictures.split(4, seed=0)
    views = Views(pictures, train, config)
    assert views[3].shape == (2, 4, 3, 32, 32)
    assert torch.equal(views[3], views[3])
    for step in range(8):
        rows, others = views.draw(step)
        assert len({*rows, *others}) == 8
        assert {*rows, *others} <= set(train.tolist())


def test_the_rate_warms_up_and_falls_to_zero(config):
    config = replace(config, optim=CopyOptimConfig(steps=100, warmup_steps=10, lr=1.0))
    assert rate(0, config) == pytest.approx(0.1)
    assert rate(9, config) == rate(10, config) == pytest.approx(1.0)
    assert rate(55, config) == pytest.approx(0.5)
    assert rate(100, config) == pytest.approx(0.0)
    assert entropy_weight(0, config) == 0
    assert entropy_weight(25, config) == entropy_weight(90, config) == config.loss.entropy_weight


class AfterTwoSteps:
    """A request to stop that comes during the second step."""

    def __init__(self):
        self.asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked >= 2


def test_a_stopped_run_goes_on_to_the_same_weights(config, tmp_path):
    whole = train_copy(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    with pytest.raises(Stopped, match="step 2 of 4 is saved"):
        train_copy(parts, stop=AfterTwoSteps())  # pyright: ignore[reportArgumentType]
    assert read_json(tmp_path / "parts" / "status.json")["status"] == "stopped"
    resumed = train_copy(parts)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert train_copy(parts) == resumed  # done: nothing is left

    card = read_json(whole / "card.json")
    assert card["data"]["pictures"] == 14
    assert card["data"]["about"] == "patterns"
    assert 0 <= card["metrics"]["held_out_top1"] <= card["metrics"]["held_out_top10"] <= 1
    embedder = load_embedder(f"export:{whole}", None, tmp_path, CPU, key=KEY)
    assert (embedder.size, embedder.dim) == (32, 16)
    vectors = embedder(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert model_identity(f"export:{whole}", tmp_path, key=KEY) == model_identity(
        f"export:{resumed}", tmp_path, key=KEY
    )
    with pytest.raises(UserError, match=r"embed\.copy\.size: 64; this copy network reads 32 x 32 pixels"):
        load_embedder(f"export:{whole}", 64, tmp_path, CPU, key=KEY)


def test_other_images_and_other_configs_are_refused(config, tmp_path):
    with pytest.raises(Stopped):
        train_copy(config, stop=AfterTwoSteps())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"differs in loss\.temperature"):
        train_copy(replace(config, loss=replace(config.loss, temperature=0.1)))
    (tmp_path / "images" / "05.png").unlink()
    with pytest.raises(UserError, match=r"source\.paths: .*checkpoint\.pt was trained on other images"):
        train_copy(config)


def test_a_failed_start_leaves_no_folder(config, tmp_path):
    with pytest.raises(UserError, match=r"source\.paths"):
        train_copy(replace(config, source=CopySourceConfig(paths=("/nowhere",))))
    with pytest.raises(UserError, match=r"optim\.steps: found 0; expected at least 1"):
        train_copy(replace(config, optim=CopyOptimConfig(steps=0)))
    assert not (tmp_path / "run").exists()
