"""Public DINOv2 weights of every layout, made by the real libraries with random values, load and give their features.

B images, N patches, R registers, D width.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig

from pretrain.build import build_learner
from pretrain.config import HeadsConfig, ModelConfig, PretrainConfig
from pretrain.data.config import CropsConfig
from pretrain.export import load_backbone, load_centers, read_origin
from pretrain.model.vit import VisionTransformer
from pretrain.public import Public, import_public, initial_weights, load_public, start_from
from runtime.errors import UserError

PATCH, NATIVE = 14, 70  # pixels; a grid of 5 x 5
SIZES = {"native": (70, 70), "larger": (98, 98), "not square": (56, 98)}


def randomised(module: nn.Module) -> Any:
    """Weights of a size at which every branch counts, so that a wrong name or order shows."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if name.endswith(("gamma", "lambda1")) or ("norm" in name and name.endswith("weight")):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return module.eval()


def timm_model(*, registers: int, swiglu: bool) -> TimmTransformer:
    """As `timm.models.vision_transformer.vit_*_patch14_*dinov2`, narrower and less deep."""
    hidden = 2 * 344  # of a width of 128: 4 * 128 * 2 / 3, rounded up to a multiple of 8
    glu: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": hidden / 128}
    model = TimmTransformer(
        img_size=NATIVE, patch_size=PATCH, embed_dim=128, depth=2, num_heads=2, init_values=1e-5, num_classes=0,
        reg_tokens=registers, no_embed_class=registers > 0, dynamic_img_size=True, **(glu if swiglu else {}),
    )  # fmt: skip
    return randomised(model)


def hugging_face_model(*, registers: int, swiglu: bool) -> Dinov2Model | Dinov2WithRegistersModel:
    sizes: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": NATIVE, "patch_size": PATCH,
        "use_swiglu_ffn": swiglu,
    }  # fmt: skip
    if registers:
        config = Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes)
        return randomised(Dinov2WithRegistersModel(config))
    return randomised(Dinov2Model(Dinov2Config(**sizes)))


def ours(public: Public) -> VisionTransformer:
    model = VisionTransformer(public.shape)
    model.load_state_dict(public.weights)
    return model.eval()


def tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    """Class token, registers and patches [B, 1 + R + N, D]."""
    with torch.inference_mode():
        features = model.forward_features(images)
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.std() > 0.1  # features, not zeros
    return (a - b).abs().max().item()


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_timm(registers, swiglu, tmp_path):
    """Through a file; timm adds the class token's position to the token itself where there are registers."""
    theirs = timm_model(registers=registers, swiglu=swiglu)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    public = load_public(str(tmp_path / "model.safetensors"))
    assert public.origin["layout"] == "timm"
    assert public.shape.num_registers == registers
    for size in SIZES.values():
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = theirs.forward_features(images)
        assert largest_difference(tokens(ours(public), images), expected) < 1e-5, size


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face(registers, swiglu, tmp_path):
    """Through a folder. Without registers Hugging Face resizes positions without antialiasing, and so do we then."""
    theirs = hugging_face_model(registers=registers, swiglu=swiglu)
    theirs.save_pretrained(tmp_path)
    public = load_public(str(tmp_path))
    assert (public.origin["layout"], public.shape.num_heads) == ("huggingface", 4)
    for size in SIZES.values():
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = theirs(images).last_hidden_state
        assert largest_difference(tokens(ours(public), images), expected) < 1e-5, size


def facebook_weights(**changes: Any) -> dict[str, Tensor]:
    """A state dict in facebookresearch's layout, by way of timm's own translation in reverse."""
    sizes: dict[str, Any] = {"registers": 4, "swiglu": True}
    model = timm_model(**sizes | changes)
    weights = {}
    for name, value in model.state_dict().items():
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if sizes["swiglu"] else name
        weights[name.replace("reg_token", "register_tokens")] = value
    position = torch.randn(1, 1, 128)
    weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], dim=1)
    weights["cls_token"] = weights["cls_token"] - position
    return weights | {"mask_token": torch.randn(1, 128)}


def in_chunks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a model whose blocks are FSDP units of two: blocks.CHUNK.INDEX."""
    return {name.replace("blocks.", "blocks.0."): value for name, value in weights.items()}


@pytest.mark.parametrize("wrapped", [
    lambda weights: weights,
    lambda weights: {"model": weights},
    lambda weights: {"teacher": {f"backbone.{n}": w for n, w in weights.items()}
                     | {"dino_head.last_layer.weight_v": torch.zeros(8, 4)}},
    lambda weights: {"teacher": {f"module.backbone.{n}": w for n, w in in_chunks(weights).items()}, "iteration": 7},
], ids=["bare", "model", "teacher and heads", "module and chunks"])  # fmt: skip
def test_facebookresearch(wrapped, tmp_path):
    """Its names are ours, whatever wraps them; timm's own reader of that layout gives the same features."""
    weights = facebook_weights()
    torch.save(wrapped(weights), tmp_path / "dinov2.pth")
    public = load_public(str(tmp_path / "dinov2.pth"))
    assert public.origin["layout"] == "facebookresearch"
    assert public.weights.keys() == weights.keys()
    assert all(torch.equal(public.weights[name], value) for name, value in weights.items())
    theirs = timm_model(registers=4, swiglu=True)
    images = torch.randn(2, 3, 98, 56)
    with torch.inference_mode():
        assert largest_difference(tokens(ours(public), images), theirs.forward_features(images)) < 1e-5


def test_import_writes_an_export_that_loads(tmp_path):
    torch.save(facebook_weights(), tmp_path / "dinov2.pth")
    folder = import_public(str(tmp_path / "dinov2.pth"), tmp_path / "export", layout="facebookresearch")
    backbone, card = load_backbone(folder)
    images = torch.randn(1, 3, NATIVE, NATIVE)
    expected = tokens(ours(load_public(str(tmp_path / "dinov2.pth"))), images)
    assert torch.equal(tokens(backbone, images), expected)
    assert (card["kind"], card["image_size"], card["origin"]["layout"]) == ("backbone", NATIVE, "facebookresearch")
    assert load_centers(folder) == {}
    again = load_public(str(folder))
    assert torch.equal(tokens(ours(again), images), expected)
    assert again.origin["layout"] == "troodon"
    with pytest.raises(UserError, match="exists already"):
        import_public(str(tmp_path / "dinov2.pth"), folder, layout="facebookresearch")
    with pytest.raises(UserError, match="has the names of facebookresearch, not of timm"):
        import_public(str(tmp_path / "dinov2.pth"), tmp_path / "other", layout="timm")


HEADS = HeadsConfig(num_prototypes=8, hidden=8, bottleneck=4)


def small_config(source: Path, **model: Any) -> PretrainConfig:
    values: dict[str, Any] = {"arch": "vit_tiny", "patch_size": 14} | model
    return PretrainConfig(
        continue_from=str(source), model=ModelConfig(**values), crops=CropsConfig(global_size=42), heads=HEADS
    )


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory) -> Path:
    """A ViT-Ti/14 of 70 pixels in timm's layout."""
    sizes: dict[str, Any] = {"patch_size": PATCH, "img_size": NATIVE, "init_values": 1.0, "num_classes": 0}
    model = randomised(timm.create_model("vit_tiny_patch16_224", **sizes))
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def test_a_run_starts_from_it(tiny_dinov2, tmp_path):
    """The position table has the grid of the crops, and features at that size are those of the file's own table."""
    config = small_config(tiny_dinov2)
    learner = build_learner(config.model, config.heads, image_size=42, seed=0)
    before = {name: value.clone() for name, value in learner.dino_head.state_dict().items()}
    start_from(learner, config, tmp_path)
    images = torch.randn(2, 3, 42, 42)
    expected = tokens(ours(load_public(str(tiny_dinov2))), images)
    assert learner.backbone.state_dict()["pos_embed"].shape == (1, 1 + 9, 192)
    assert largest_difference(tokens(learner.eval().backbone, images), expected) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in learner.dino_head.state_dict().items())
    origin = read_origin(tmp_path)
    assert origin is not None
    assert (origin["layout"], origin["positions_resized_from"]) == ("timm", 70)


@pytest.mark.parametrize(("model", "said"), [
    ({"patch_size": 16}, r"model.patch_size: 16, but .* have 14\n  set model.patch_size=14"),
    ({"num_registers": 4}, r"model.num_registers: 4, but .* have 0\n  set model.num_registers=0"),
    ({"ffn": "swiglu"}, r"model.ffn: swiglu, but .* have mlp\n  set model.ffn=mlp"),
    ({"position": "rope"}, r"model.position: rope, but .* have learned\n  set model.position=learned"),
    ({"arch": "vit_small"}, r"model.arch: vit_small, but .* 192 wide with 12 blocks\n  set model.arch=vit_tiny"),
])  # fmt: skip
def test_a_config_that_contradicts_the_weights(model, said, tiny_dinov2):
    with pytest.raises(UserError, match=said):
        initial_weights(small_config(tiny_dinov2, **model))


def write_wrong_type(path: Path) -> str:
    ViTConfig().save_pretrained(path)
    return str(path)


def write_truncated(path: Path) -> str:
    safetensors.torch.save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def write_truncated_pth(path: Path) -> str:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def write_pickle(path: Path) -> str:
    torch.save({"model": {"a": torch.zeros(1)}, "args": Path("a")}, path)
    return str(path)


def write_other_model(path: Path) -> str:
    torch.save(nn.Linear(2, 2).state_dict(), path)
    return str(path)


def write_without_a_block(path: Path) -> str:
    weights = facebook_weights()
    torch.save({name: w for name, w in weights.items() if name != "blocks.1.attn.proj.bias"}, path)
    return str(path)


@pytest.mark.parametrize(("name", "write", "said"), [
    ("hf", write_wrong_type, r"config.json is of a model of type 'vit'\n  expected dinov2 or"),
    ("cut.safetensors", write_truncated, "cannot be read as weights"),
    ("cut.pth", write_truncated_pth, "cannot be read as weights"),
    ("unsafe.pth", write_pickle, "cannot be read as weights"),
    ("linear.pth", write_other_model, "is no DINOv2 backbone: it has weight, bias, ... and no cls_token"),
    ("missing.pth", write_without_a_block, r"blocks.1.attn.proj.bias in .*: found nothing; expected \[128\]"),
    ("absent.pth", str, "weights: no file"),
])  # fmt: skip
def test_wrong_files(name, write, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        load_public(write(tmp_path / name))
    assert len(str(error.value).splitlines()) <= 3


def test_a_timm_name_that_does_not_exist():
    with pytest.raises(UserError, match="timm knows no model vit_smal_patch14_dinov2"):
        load_public("timm:vit_smal_patch14_dinov2")


def test_a_name_in_timm_is_downloaded_through_timm(monkeypatch):
    """No network here: what timm would have returned is a model of ours, and what it raises becomes one clear line."""
    asked = []

    def create(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return timm_model(registers=0, swiglu=False)

    monkeypatch.setattr(timm, "create_model", create)
    assert load_public("timm:vit_small_patch14_dinov2.lvd142m").shape.dim == 128
    assert asked == [("vit_small_patch14_dinov2.lvd142m", {"pretrained": True, "num_classes": 0})]

    def offline(name: str, **options: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="cannot be had: no route to host"):
        load_public("timm:vit_small_patch14_dinov2.lvd142m")


def test_cards_say_where_weights_are_from(tmp_path):
    torch.save(facebook_weights(), tmp_path / "a.pth")
    import_public(str(tmp_path / "a.pth"), tmp_path / "export", layout="facebookresearch")
    card = json.loads((tmp_path / "export" / "card.json").read_text())
    assert len(card["origin"]["sha256"]) == 64
    assert card["license"] == ""
    assert set(card["versions"]) == {"troodon", "torch"}
