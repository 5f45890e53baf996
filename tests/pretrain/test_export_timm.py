"""An export loads into timm's vision transformer, with and without registers, and gives the same features."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from pretrain.build import Learner, build_heads
from pretrain.config import CropsConfig, HeadsConfig, ModelConfig, PretrainConfig
from pretrain.export import export_learner, load_backbone
from pretrain.model.vit import Shape
from pretrain.model.vit import VisionTransformer as OurVisionTransformer

HEADS = HeadsConfig(num_prototypes=8, hidden=8, bottleneck=4)


def export(folder: Path, *, num_registers: int, ffn: Any) -> Path:
    """A teacher export of a small model with weights of size one in every tensor, so that no branch is near zero."""
    torch.manual_seed(0)
    shape = Shape(
        dim=48,
        depth=3,
        num_heads=3,
        patch_size=14,
        image_size=84,
        num_registers=num_registers,
        ffn=ffn,
        mlp_ratio=4.0,
    )
    learner = Learner(OurVisionTransformer(shape), *build_heads(HEADS, 48))
    for parameter in learner.backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = PretrainConfig(
        model=ModelConfig(patch_size=14, num_registers=num_registers), crops=CropsConfig(global_size=84), heads=HEADS
    )
    return export_learner(learner.eval(), folder, config, step=0, data={}, metrics={})


def load_in_timm(folder: Path, card: dict[str, Any]) -> VisionTransformer:
    """What a user of timm writes, from the card and the weights alone; every name must fit."""
    model = card["model"]
    hidden = (int(model["dim"] * model["mlp_ratio"] * 2 / 3) + 7) // 8 * 8
    swiglu: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * hidden / model["dim"]}
    theirs = VisionTransformer(
        img_size=model["image_size"],
        patch_size=model["patch_size"],
        embed_dim=model["dim"],
        depth=model["depth"],
        num_heads=model["num_heads"],
        init_values=1e-5,
        reg_tokens=model["num_registers"],
        no_embed_class=model["num_registers"] > 0,
        num_classes=0,
        dynamic_img_size=True,
        **(swiglu if model["ffn"] == "swiglu" else {"mlp_ratio": model["mlp_ratio"]}),
    )
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    backbone = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    theirs.load_state_dict(checkpoint_filter_fn(backbone, theirs))
    return theirs.eval()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("num_registers", [0, 4])
def test_features_agree_at_every_size(num_registers: int, ffn: str, tmp_path: Path):
    folder = export(tmp_path / "export", num_registers=num_registers, ffn=ffn)
    ours, card = load_backbone(folder)
    theirs = load_in_timm(folder, card)
    for height, width in ((84, 84), (112, 56), (28, 28)):  # native, not square and larger, smaller
        images = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            features, tokens = ours.forward_features(images), theirs.forward_features(images)
        expected = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
        assert expected.shape == (2, 1 + num_registers + height * width // 14**2, 48)
        assert expected.std() > 0.1
        assert torch.allclose(tokens, expected, atol=1e-4), (height, width, (tokens - expected).abs().max())
