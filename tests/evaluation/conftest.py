"""A small real export and a small real folder of labelled images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.build import build_learner
from pretrain.config import CropsConfig, HeadsConfig, ModelConfig, PretrainConfig
from pretrain.export import export_learner


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained vit_nano of 32 px with 2 registers, as `pretrain` exports it."""
    config = PretrainConfig(
        model=ModelConfig(arch="vit_nano", patch_size=8, num_registers=2, layerscale=1.0),
        crops=CropsConfig(global_size=32, local_size=16),
        heads=HeadsConfig(num_prototypes=16, hidden=16, bottleneck=8),
    )
    learner = build_learner(config.model, config.heads, image_size=32, seed=3)
    folder = tmp_path_factory.mktemp("model") / "export"
    return export_learner(learner, folder, config, step=0, data={}, metrics={})


def write_image(path: Path, colour: tuple[int, int, int], seed: int = 0) -> None:
    """A noisy picture of one colour, 40 x 30."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 21, (30, 40, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Two classes, red and blue: 4 train and 3 test images each."""
    root = tmp_path / "colours"
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        for i in range(7):
            half = "train" if i < 4 else "test"
            write_image(root / half / name / f"{i}.png", colour, seed=i)
    return root
