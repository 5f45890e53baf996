"""Exports: what is written is what was there, and everything needed to continue or distil is in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.build import Learner, build_learner
from pretrain.config import DataConfig, HeadsConfig, ModelConfig, PretrainConfig
from pretrain.data.config import CropsConfig, SetConfig
from pretrain.export import (
    convert,
    describe_data,
    export_learner,
    load_backbone,
    load_centers,
    load_teacher,
    random_backbone,
    read_export,
)
from runtime.errors import UserError

HEADS: dict[str, Any] = {"num_prototypes": 12, "hidden": 8, "bottleneck": 4}
CENTERS = {"cls": torch.randn(12), "patches": torch.randn(12)}


def config(heads: HeadsConfig, **model) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(arch="vit_pico", patch_size=8, **model), crops=CropsConfig(global_size=32), heads=heads
    )


def learner_of(settings: PretrainConfig) -> Learner:
    return build_learner(settings.model, settings.heads, image_size=32, seed=1).eval()


def export(folder: Path, settings: PretrainConfig, **more) -> Path:
    return export_learner(learner_of(settings), folder, settings, step=7, data={}, metrics={}, **more)


@pytest.mark.parametrize("heads", [
    HeadsConfig(**HEADS), HeadsConfig(**HEADS, tied=True), HeadsConfig(**HEADS, weight_norm=False),
    HeadsConfig(**HEADS, ibot_prototypes=6, ibot_hidden=10, ibot_bottleneck=5),
], ids=["untied", "tied", "plain", "sizes of its own"])  # fmt: skip
def test_a_teacher_comes_back_with_its_heads(heads, tmp_path):
    settings = config(heads, num_registers=2)
    loaded, card = load_teacher(export(tmp_path / "export", settings))
    expected = learner_of(settings)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        a, b = (each.backbone.forward_features(images) for each in (loaded, expected))
        assert torch.equal(loaded.dino_head(a.cls), expected.dino_head(b.cls))
        assert torch.equal(loaded.patch_head(a.patches), expected.patch_head(b.patches))
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert (card["kind"], card["step"], card["heads"]["tied"]) == ("teacher", 7, heads.tied)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("model", [
    {"position": "rope", "untie_norms": True, "num_registers": 1}, {"ffn": "swiglu", "ffn_multiple": 64},
], ids=["v3", "swiglu"])  # fmt: skip
def test_every_shape_of_backbone_comes_back(model, tmp_path):
    settings = config(HeadsConfig(**HEADS), **model)
    backbone, _ = load_backbone(export(tmp_path / "export", settings))
    images = torch.randn(2, 3, 32, 40)
    with torch.inference_mode():
        a, b = (each.forward_features(images) for each in (backbone, learner_of(settings).backbone))
    assert torch.equal(a.patches, b.patches)


def test_centres_and_origin_go_with_it(tmp_path):
    origin = {"source": "dinov2.pth", "layout": "facebookresearch", "sha256": "0" * 64, "license": "Apache-2.0"}
    folder = export(tmp_path / "export", config(HeadsConfig(**HEADS)), centers=CENTERS, origin=origin)
    loaded = load_centers(folder)
    assert loaded.keys() == CENTERS.keys()
    assert all(torch.equal(loaded[name], value) for name, value in CENTERS.items())
    load_teacher(folder)  # which has no place for them
    card = read_export(folder)[1]
    assert (card["origin"], card["license"]) == (origin, "Apache-2.0")


def test_a_backbone_has_neither_heads_nor_centres(tmp_path):
    folder = export(tmp_path / "teacher", config(HeadsConfig(**HEADS)), centers=CENTERS)
    weights, card = read_export(convert(folder, tmp_path / "backbone", "backbone"))
    assert all(name.startswith("backbone.") for name in weights)
    assert "heads" not in card
    assert card["kind"] == "backbone"
    with pytest.raises(UserError, match="has no heads"):
        convert(tmp_path / "backbone", tmp_path / "again", "teacher")


def test_a_card_of_the_first_version_loads(tmp_path):
    """Without origin, versions, the new fields of the shape and the new keys of heads and config."""
    folder = export(tmp_path / "export", config(HeadsConfig(**HEADS)))
    card = json.loads((folder / "card.json").read_text())
    for name in ("origin", "versions"):
        del card[name]
    old = ("dim", "depth", "num_heads", "patch_size", "image_size", "num_registers", "ffn", "mlp_ratio", "layerscale")
    card["model"] = {name: card["model"][name] for name in old}
    card["heads"] = {name: card["heads"][name] for name in ("num_prototypes", "hidden", "bottleneck", "num_layers")}
    old = ("arch", "patch_size", "num_registers", "drop_path", "init", "layerscale")
    card["config"] = {
        "model": {name: card["config"]["model"][name] for name in old},
        "heads": card["heads"],
        "loss": {"dino": 1.0, "ibot": 1.0, "koleo": 0.1},
    }
    (folder / "card.json").write_text(json.dumps(card))
    loaded = load_teacher(folder)[0].state_dict()
    expected = learner_of(config(HeadsConfig(**HEADS))).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    load_backbone(folder)
    random_backbone(folder, seed=0)


def test_random_weights_of_the_same_shape(tmp_path):
    folder = export(tmp_path / "export", config(HeadsConfig(**HEADS), num_registers=2))
    a, b, c = (random_backbone(folder, seed=seed).state_dict() for seed in (0, 0, 1))
    trained = load_backbone(folder)[0].state_dict()
    assert a.keys() == trained.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    weight = "blocks.0.attn.qkv.weight"
    assert not torch.equal(a[weight], c[weight])
    assert not torch.equal(a[weight], trained[weight])


def test_data_is_named_by_its_manifests(tmp_path):
    """Shards that curation wrote have one; foreign and remote ones have their fingerprint."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "manifest.json").write_text("{}")
    (tmp_path / "foreign").mkdir()
    ours, foreign = str(tmp_path / "ours"), str(tmp_path / "foreign")
    hashes = {ours: hashlib.sha256(b"{}").hexdigest()}
    about = describe_data(DataConfig(shards=(ours, foreign, "https://host/a.tar")), fingerprint="abc", samples=None)
    assert (about["manifests"], about["fingerprint"]) == (hashes, "abc")
    mixed = DataConfig(sets=(SetConfig(name="a", shards=(ours,)), SetConfig(name="b", shards=(foreign,))))
    assert describe_data(mixed, fingerprint="abc", samples=3)["manifests"] == hashes
