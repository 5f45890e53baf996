"""Every parameter has a start value, the same on every device and for any sharding; options do what they say."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.build import ARCHS, build_learner, materialise
from pretrain.config import HeadsConfig, ModelConfig

HEADS = HeadsConfig(num_prototypes=16, hidden=32, bottleneck=8)
PICO = ModelConfig(arch="vit_pico", patch_size=8)


def build(model: ModelConfig, *, seed: int = 0, **heads):
    return build_learner(model, replace(HEADS, **heads), image_size=32, seed=seed)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_of_every_architecture_has_a_start_value(arch, monkeypatch):
    """With one block each: blocks are alike."""
    dim, _, num_heads, ffn = ARCHS[arch]
    monkeypatch.setitem(ARCHS, arch, (dim, 1, num_heads, ffn))
    learner = build(ModelConfig(arch=arch))
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in learner.parameters())


OPTIONS = [
    {"num_registers": 4},
    {"position": "rope"},
    {"ffn": "swiglu", "ffn_multiple": 64},
    {"untie_norms": True},
    {"in_chans": 1},
    {"init": "fan_in"},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [{}, {"tied": True}, {"weight_norm": False}], ids=str)
def test_every_parameter_of_every_option_has_a_start_value(option, heads):
    learner = build(replace(PICO, **option), **heads)
    assert all(p.isfinite().all() for p in learner.parameters())


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_forgotten_parameter_or_buffer_is_named(kind):
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            if kind == "parameter":
                self.bend = nn.Parameter(torch.zeros(2))
            else:
                self.register_buffer("bend", torch.zeros(2))

    model = nn.Sequential(Forgetful())
    with pytest.raises(RuntimeError, match=r"0\.bend has no start value: Forgetful"):
        materialise(model, device="cpu", seed=0, init="fan_in")


def test_start_values_by_the_book():
    learner = build(replace(PICO, num_registers=2, layerscale=0.25, init="reference"))
    backbone = learner.backbone
    block = backbone.blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (block.mlp.fc1.bias == 0).all()
    assert (block.norm1.weight == 1).all()
    assert (block.norm1.bias == 0).all()
    assert (block.ls1.gamma == 0.25).all()
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0 < backbone.cls_token.abs().max() < 1e-5
    assert 0 < backbone.register_tokens.abs().max() < 1e-5
    assert (backbone.mask_token == 0).all()
    bound = (3 * 8 * 8) ** -0.5
    assert 0.95 * bound < backbone.patch_embed.proj.weight.abs().max() <= bound
    assert (learner.dino_head.prototypes.gain == 1).all()
    narrow = build(PICO).backbone.blocks[0].mlp.fc2
    assert build(replace(PICO, init="fan_in")).backbone.blocks[0].mlp.fc2.weight.std().item() == pytest.approx(
        narrow.in_features**-0.5, rel=0.05
    )


def test_the_seed_decides_and_what_else_is_built_does_not():
    one, again, other = build(PICO, seed=1), build(PICO, seed=1), build(PICO, seed=2)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(one.backbone.pos_embed, other.backbone.pos_embed)
    more = build(replace(PICO, num_registers=4, untie_norms=True), seed=1, num_prototypes=24, tied=True)
    assert torch.equal(more.backbone.blocks[3].attn.qkv.weight, one.backbone.blocks[3].attn.qkv.weight)
    qkv = [block.attn.qkv.weight for block in one.backbone.blocks]
    assert not torch.equal(qkv[0], qkv[1])


def test_building_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(PICO)
    assert torch.equal(torch.rand(3), expected)


def test_the_meta_device_costs_nothing():
    """ViT-g with the published heads, counted without memory: 1.1 billion parameters (DINOv2 table 17)."""
    heads = HeadsConfig(num_prototypes=131072, bottleneck=384, ibot_bottleneck=256)
    learner = build_learner(ModelConfig(arch="vit_giant2", patch_size=14), heads, image_size=518, seed=0, device="meta")
    assert all(p.is_meta for p in learner.parameters())
    assert sum(p.numel() for p in learner.backbone.parameters()) == 1_136_480_768
    assert learner.backbone.blocks[0].mlp.w3.in_features == 4096


@pytest.mark.parametrize(("arch", "patch", "size", "parameters"), [
    ("vit_small", 14, 518, 22_056_576), ("vit_base", 14, 518, 86_580_480), ("vit_large", 14, 518, 304_368_640),
])  # fmt: skip
def test_parameters_of_the_published_backbones(arch, patch, size, parameters):
    """Counts of the released checkpoints (without registers), mask token included."""
    learner = build_learner(ModelConfig(arch=arch, patch_size=patch), HEADS, image_size=size, seed=0, device="meta")
    assert sum(p.numel() for p in learner.backbone.parameters()) == parameters


@pytest.mark.parametrize(("dim", "ratio_multiple", "hidden"), [(1536, 8, 4096), (1024, 64, 2752), (48, 8, 128)])
def test_hidden_width_of_swiglu(dim, ratio_multiple, hidden, monkeypatch):
    monkeypatch.setitem(ARCHS, "vit_pico", (dim, 1, dim // 16, "swiglu"))
    learner = build_learner(replace(PICO, ffn_multiple=ratio_multiple), HEADS, image_size=32, seed=0, device="meta")
    assert learner.backbone.blocks[0].mlp.w3.in_features == hidden
    assert hidden % ratio_multiple == 0
    assert hidden >= math.floor(dim * 8 / 3)


@pytest.fixture
def two_ranks():
    """Rank 1 of 2, where communication does nothing: what is not drawn here stays unknown."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_sharded_learner_gets_its_part_of_the_same_values(two_ranks):
    whole = build(replace(PICO, num_registers=3), seed=4)
    sharded = build_learner(replace(PICO, num_registers=3), HEADS, image_size=32, seed=4, device="meta")
    for block in sharded.backbone.blocks:
        fully_shard(block, mesh=two_ranks)
    fully_shard(sharded, mesh=two_ranks)
    materialise(sharded, device="cpu", seed=4, init="reference")
    expected = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        chunks = expected[name].chunk(2)
        mine = chunks[1] if len(chunks) == 2 else chunks[0][:0]
        assert torch.equal(parameter.to_local(), mine), name
