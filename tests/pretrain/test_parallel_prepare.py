"""Recomputation and compilation change what is kept and how fast it is, not what comes out."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.build import build_learner
from pretrain.config import HeadsConfig, ModelConfig, ParallelConfig, TrainConfig
from pretrain.parallel.prepare import prepare
from runtime.world import World

HEADS = HeadsConfig(num_prototypes=16, hidden=32, bottleneck=8)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def learner():
    model = ModelConfig(arch="vit_pico", patch_size=8, init="fan_in", layerscale=1.0)
    return build_learner(model, HEADS, image_size=32, seed=0).train()


def prepared(train: TrainConfig, student=None):
    student = student or learner()
    prepare(student, world=World(), train=train, parallel=ParallelConfig())
    return student


def gradients(student) -> tuple[dict[str, torch.Tensor], dict[str, int], int]:
    """Gradients by name, operators that ran in backward, and bytes that the forward pass kept outside of blocks."""
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(2, 3, size, size, generator=generator) for size in (32, 16)]
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(each.cls.square().mean() + each.patches.cos().mean() for each in student.backbone(crops))
    with Count() as count:
        loss.backward()
    return {name: p.grad for name, p in student.backbone.named_parameters() if p.grad is not None}, count.calls, kept


# The hooks of `gradients` do not see what the selective form keeps, and torch says that this will change.
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_gradients_are_the_same(recompute):
    expected, _, kept = gradients(learner())
    found, _, left = gradients(prepared(TrainConfig(recompute=recompute)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert left < kept / 3


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_selective_keeps_products_and_attention():
    none, full, selective = (
        gradients(prepared(TrainConfig(recompute=name)))[1] for name in ("none", "full", "selective")
    )
    blocks = 4
    assert full["addmm"] - none.get("addmm", 0) == 4 * blocks  # qkv, proj, fc1, fc2 again
    assert selective.get("addmm", 0) == none.get("addmm", 0)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert (none.get(attention, 0), selective.get(attention, 0)) == (0, 0)
    assert full[attention] == 2 * blocks  # one for each size of crops
    assert full["gelu"] == selective["gelu"] == blocks


def test_what_does_not_learn_is_not_recomputed():
    student = learner().requires_grad_(False)
    before = [block.forward for block in student.backbone.blocks]
    prepared(TrainConfig(recompute="full"), student)
    assert [block.forward for block in student.backbone.blocks] == before


def test_names_and_copies_survive():
    student = prepared(TrainConfig(recompute="selective"))
    assert student.state_dict().keys() == learner().state_dict().keys()
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    crops = [torch.randn(1, 3, 32, 32)]
    assert twin.backbone(crops)[0].cls.abs().max() == 0  # a copy runs on its own weights
    assert student.backbone(crops)[0].cls.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_compiled_blocks_give_the_same(recompute):
    expected, _, _ = gradients(learner())
    found, _, _ = gradients(prepared(TrainConfig(recompute=recompute, compile=True)))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
