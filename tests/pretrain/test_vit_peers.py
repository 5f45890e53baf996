"""Features of the real libraries on the same random weights: timm's and Hugging Face's DINOv2, and the latter's DINOv3
as a judge of rotary positions, registers and SwiGLU. `pytest -s` prints the largest differences."""

from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from pretrain.model.vit import Shape, VisionTransformer
from pretrain.public import load_public

SIZES = {"native": (70, 70), "smaller": (42, 42), "not square": (56, 98)}


def randomised(module: nn.Module) -> Any:
    """Weights of the scale of trained ones in every parameter, so that a wrong name, order or missing part shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        mean = float(name.endswith(("gamma", "lambda1")) or ("norm" in name and name.endswith("weight")))
        nn.init.normal_(parameter, mean=mean, std=parameter.shape[-1] ** -0.5, generator=generator)
    return module.eval()


def compare(model: VisionTransformer, theirs: Any, images: Tensor) -> None:
    """All tokens agree within 1e-5 in float32."""
    with torch.inference_mode():
        features, expected = model.eval().forward_features(images), theirs(images)
    found = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
    assert found.shape == expected.shape
    assert expected.std() > 0.1
    difference = (found - expected).abs().max().item()
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "registers"), [
    ("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4), ("vit_giant_patch14_dinov2", 0),
])  # fmt: skip
def test_timm(name, registers, size, tmp_path):
    """Its own architectures, one or two blocks of each; ViT-g has SwiGLU."""
    theirs = timm.create_model(
        name, img_size=70, depth=1 if "giant" in name else 2, num_classes=0, dynamic_img_size=True
    )
    safetensors.torch.save_file(randomised(theirs).state_dict(), tmp_path / "model.safetensors")
    shape, weights, _ = load_public(str(tmp_path / "model.safetensors"))
    assert (shape.num_registers, shape.ffn) == (registers, "swiglu" if "giant" in name else "mlp")
    ours = VisionTransformer(shape)
    ours.load_state_dict(weights)
    compare(ours, theirs.forward_features, torch.randn(2, 3, *SIZES[size]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face(registers, swiglu, size, tmp_path):
    """At every size: without registers it resizes positions without antialiasing, as `Shape.antialias` can be set."""
    sizes: dict[str, Any] = {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }  # fmt: skip
    if registers:
        theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes))
    else:
        theirs = Dinov2Model(Dinov2Config(**sizes))
    randomised(theirs).save_pretrained(tmp_path)
    shape, weights, _ = load_public(str(tmp_path))
    ours = VisionTransformer(replace(shape, antialias=registers > 0))
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, *SIZES[size])
    compare(ours, lambda x: theirs(x).last_hidden_state, images)


def from_dinov3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names of DINOv3 by ours; its query, key and value, and gate and value, are joined."""
    pieces = {
        "embeddings.patch_embeddings.": "patch_embed.proj.", "embeddings.": "", "model.layer.": "blocks.",
        "layer.": "blocks.", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
        "attention.o_proj.": "attn.proj.", "mlp.down_proj.": "mlp.w3.",
    }  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        for piece, ours in pieces.items():
            if name.startswith(piece) or not piece.startswith(("layer.", "model.")):
                name = name.replace(piece, ours)
        renamed[name] = value
    renamed["mask_token"] = renamed["mask_token"].reshape(1, -1)
    for joined, parts in (("attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
                          ("mlp.w12", ("mlp.gate_proj", "mlp.up_proj"))):  # fmt: skip
        for name in [name for name in renamed if f".{parts[0]}." in name]:
            values = [renamed.pop(name.replace(parts[0], part)) for part in parts]
            renamed[name.replace(parts[0], joined)] = torch.cat(values)
    return renamed


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 48)], ids=str)
def test_rotary_positions_as_hugging_faces_dinov3(size):
    config = DINOv3ViTConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16,
        num_register_tokens=4, use_gated_mlp=True, hidden_act="silu", layer_norm_eps=1e-6, key_bias=True,
    )  # fmt: skip
    theirs = randomised(DINOv3ViTModel(config))
    shape = Shape(dim=64, depth=3, num_heads=2, patch_size=16, image_size=64, num_registers=4, ffn="swiglu",
                  mlp_ratio=4.0, position="rope", ffn_multiple=64)  # fmt: skip
    ours = VisionTransformer(shape)
    ours.load_state_dict(from_dinov3(theirs.state_dict()))
    compare(ours, lambda x: theirs(x).last_hidden_state, torch.randn(2, 3, *size))
