from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.config import EvaluateConfig
from evaluation.probe import hook, knn_probe
from evaluation.run import evaluate_knn
from pretrain.export import load_backbone


@pytest.mark.parametrize("half", ["", "train"])
def test_equals_the_evaluation_afterwards(colours: Path, export: Path, half: str):
    data = str(colours / half)
    backbone, _ = load_backbone(export)
    (row,) = evaluate_knn([str(export)], data, config=EvaluateConfig(k=(3,)))
    found = hook(knn_probe(data, image_size=32, k=3, batch_size=3))(
        SimpleNamespace(ema=SimpleNamespace(backbone=backbone))
    )
    assert found["knn"] == row["knn"][0]["accuracy"]
    assert 1 < found["rankme"] <= 8


def test_leaves_the_training_mode_as_it_was(colours: Path, export: Path):
    backbone, _ = load_backbone(export)
    probe = knn_probe(str(colours), image_size=32, k=3)
    for mode in (True, False):
        backbone.train(mode)
        probe(backbone)
        assert backbone.training is mode
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_corrupt_images_are_named_and_left_out(colours: Path, export: Path, capsys: pytest.CaptureFixture):
    (colours / "train" / "red" / "0.png").write_bytes(b"broken")
    backbone, _ = load_backbone(export)
    assert 0 <= knn_probe(str(colours), image_size=32, k=3)(backbone)["knn"] <= 1
    assert "skipped red/0.png: not an image" in capsys.readouterr().err
