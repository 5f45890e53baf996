"""A run of three stages on the embedded images: pretraining, Gram refinement, mixed high resolution."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pretrain.config import (
    CheckpointConfig,
    DataConfig,
    GramConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    StageConfig,
    TrainConfig,
)
from pretrain.data.config import CropsConfig
from pretrain.export import load_backbone
from pretrain.train import pretrain
from runtime.errors import Stopped, UserError
from runtime.metrics import CLOCK, read_metrics

STAGES = (
    StageConfig("gram", 3, {"loss.gram": 2.0, "crops.gram_size": 64, "gram.update_every": 2, "loss.dino_local": 0.5}),
    StageConfig(
        "high_res",
        3,
        {
            "loss.gram": 1.5,
            "gram.teacher": "previous",
            "train.batch_size": 4,
            "crops.mixed": [
                {"global_size": 48, "local_size": 16, "gram_size": 64, "probability": 0.5},
                {"global_size": 64, "local_size": 24, "gram_size": 64, "probability": 0.5},
            ],
        },
    ),
)


def config(out: Path, **changes) -> PretrainConfig:
    base = PretrainConfig(
        out=str(out),
        device="cpu",
        workers=0,
        data=DataConfig(shards=("embedded:pool",)),
        model=ModelConfig(
            arch="vit_pico", patch_size=8, init="fan_in", layerscale=1.0, num_registers=2, position="rope",
            rope_jitter=2.0, drop_path=0.3, untie_norms=True,
        ),
        crops=CropsConfig(global_size=32, local_size=16, num_local=2),
        heads=HeadsConfig(num_prototypes=32, hidden=32, bottleneck=16, weight_norm=False),
        optim=OptimConfig(lr=2e-3, reference_batch=8),
        train=TrainConfig(steps=4, batch_size=8, accumulate=2, precision="float32", log_every=1),
        checkpoint=CheckpointConfig(every=100, keep=1),
        gram=GramConfig(keep_at=0.5),
        stages=STAGES,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def rows(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in read_metrics(out)]


class StopAtStep:
    """A stop request that becomes true after some steps, as a signal would."""

    def __init__(self, after: int):
        self.calls, self.after = 0, after

    def __bool__(self) -> bool:
        self.calls += 1
        return self.calls > self.after


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return pretrain(config(tmp_path_factory.mktemp("whole") / "run"))


def test_one_command_runs_all_stages(whole):
    out = whole.parent.parent
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, 11))
    assert [row["stage"] for row in found] == [0] * 4 + [1] * 3 + [2] * 3
    assert [row["gram_weight"] for row in found] == [0] * 4 + [2.0] * 3 + [1.5] * 3
    assert all((row["gram"] > 0) == (row["stage"] > 0) for row in found)
    assert [p.name for p in sorted((out / "exports").iterdir())] == [f"step-{n:08d}" for n in (4, 7, 10)]
    assert [p.name for p in sorted((out / "gram").iterdir())] == [f"step-{n:08d}" for n in (2, 6)]
    assert json.loads((out / "status.json").read_text())["stage"] == "high_res"
    backbone, card = load_backbone(whole)
    assert card["config"]["loss"]["gram"] == 1.5
    assert backbone.forward_features(torch.randn(1, 3, 64, 48)).patches.shape == (1, 48, 48)


def test_stopped_in_every_stage_and_at_a_border_equals_uninterrupted(whole, tmp_path):
    """Stops after steps 1, 4 (the border), 6 and 8; the Gram teacher is found again from the step alone."""
    out = tmp_path / "run"
    for after in (0, 2, 1, 1):
        with pytest.raises(Stopped):
            pretrain(config(out), stop=StopAtStep(after))  # type: ignore[arg-type]
    export = pretrain(config(out))
    assert rows(out) == rows(whole.parent.parent)
    a, b = (safetensors.torch.load_file(path / "model.safetensors") for path in (whole, export))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (StageConfig("x", 1, {"crops.global_size": 33}), "crops.global_size: 33 is not a multiple"),
        (StageConfig("x", 1, {"train.batch_size": 7}), "train.batch_size: 7 does not divide"),
        (StageConfig("x", 1, {"loss.grm": 1}), "did you mean loss.gram"),
        (StageConfig("x", 1, {"data.shards": ["nowhere"]}), "nowhere"),
    ],
)
def test_a_wrong_stage_is_named_before_anything_is_trained(tmp_path, stage, message):
    with pytest.raises(UserError, match=message):
        pretrain(config(tmp_path / "run", stages=(stage,)))
    assert not (tmp_path / "run").exists()
