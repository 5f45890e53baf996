"""Modules from a configuration."""

from typing import Literal

import torch
from torch import nn

from runtime.seeding import key

from .config import HeadsConfig, ModelConfig, PretrainConfig
from .data.config import check
from .model.head import Head
from .model.init import init_linear
from .model.vit import Shape, VisionTransformer

# arch: width, depth, heads, feed-forward. S to g as DINOv2 table 17; pico to tiny for small data and tests.
ARCHS: dict[str, tuple[int, int, int, Literal["mlp", "swiglu"]]] = {
    "vit_pico": (48, 4, 3, "mlp"),
    "vit_nano": (96, 4, 3, "mlp"),
    "vit_micro": (128, 6, 4, "mlp"),
    "vit_tiny": (192, 12, 3, "mlp"),
    "vit_small": (384, 12, 6, "mlp"),
    "vit_base": (768, 12, 12, "mlp"),
    "vit_large": (1024, 24, 16, "mlp"),
    "vit_giant2": (1536, 40, 24, "swiglu"),
}


class Learner(nn.Module):
    """What is trained, and what the EMA follows: a backbone with its DINO and iBOT heads (untied, as in DINOv2)."""

    def __init__(self, backbone: VisionTransformer, dino_head: Head, ibot_head: Head):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head


def backbone_shape(model: ModelConfig, image_size: int) -> Shape:
    """The shape of a backbone whose position table fits images of `image_size` pixels."""
    dim, depth, num_heads, ffn = ARCHS[model.arch]
    return Shape(
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=model.patch_size,
        image_size=image_size,
        num_registers=model.num_registers,
        ffn=ffn,
        mlp_ratio=4.0,
    )


def build_learner(model: ModelConfig, heads: HeadsConfig, *, image_size: int, seed: int) -> Learner:
    """A freshly initialised learner; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "weights") % 2**63)
        backbone = VisionTransformer(
            backbone_shape(model, image_size), drop_path=model.drop_path, layerscale=model.layerscale
        )
        learner = Learner(backbone, build_head(heads, backbone.shape.dim), build_head(heads, backbone.shape.dim))
        init_linear(learner, model.init)
        return learner


def build_head(heads: HeadsConfig, dim: int) -> Head:
    return Head(
        dim,
        hidden=heads.hidden,
        bottleneck=heads.bottleneck,
        num_layers=heads.num_layers,
        num_prototypes=heads.num_prototypes,
    )


def describe(config: PretrainConfig) -> str:
    """One line on the model and a step, for plans and logs. Raises UserError for sizes that do not fit."""
    check(config.crops, config.mask, patch_size=config.model.patch_size)
    learner = build_learner(config.model, config.heads, image_size=config.crops.global_size, seed=config.seed)
    backbone = sum(p.numel() for p in learner.backbone.parameters())
    total = sum(p.numel() for p in learner.parameters())
    tokens = config.train.batch_size * sum(
        count * ((size // config.model.patch_size) ** 2 + 1 + config.model.num_registers)
        for count, size in ((2, config.crops.global_size), (config.crops.num_local, config.crops.local_size))
    )
    return (
        f"{config.model.arch}/{config.model.patch_size}: {backbone / 1e6:.2f} M parameters "
        f"({total / 1e6:.2f} M with heads), {config.train.steps} steps of {config.train.batch_size} images, "
        f"{tokens} student tokens a step"
    )
