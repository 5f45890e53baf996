"""Costs by formula against what PyTorch counts and what timm's models have."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.build import build_learner
from pretrain.config import HeadsConfig, LossConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from pretrain.cost import checkpoint_bytes, flops_per_step, memory_per_rank, parameters, tokens_per_step
from pretrain.data.config import CropsConfig, MaskConfig, SizesConfig
from pretrain.loss.targets import CHUNK

HEADS = HeadsConfig(num_prototypes=64, hidden=96, bottleneck=32, ibot_prototypes=48, ibot_hidden=80)


def config(**changes: Any) -> PretrainConfig:
    base = PretrainConfig(
        model=ModelConfig(arch="vit_nano", patch_size=8, num_registers=1),
        crops=CropsConfig(global_size=32, local_size=16, num_local=3),
        mask=MaskConfig(probability=0.5, ratio_min=0.25, ratio_max=0.75),
        heads=HEADS,
        train=TrainConfig(batch_size=4),
    )
    return dataclasses.replace(base, **changes)


def counted(settings: PretrainConfig) -> float:
    """FLOPs that PyTorch counts in a step's forward and backward passes, the losses' gradients being ones."""
    learner = build_learner(settings.model, settings.heads, image_size=settings.crops.global_size, seed=0).train()
    num, crops = settings.train.batch_size, settings.crops
    patches = (crops.global_size // settings.model.patch_size) ** 2
    masks = torch.zeros(2 * num, patches, dtype=torch.bool)
    masks[::2, : patches // 2] = True  # half of the crops, half of their patches
    images = [torch.randn(2 * num, 3, crops.global_size, crops.global_size)]
    images.append(torch.randn(crops.num_local * num, 3, crops.local_size, crops.local_size))
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            (teacher,) = learner.backbone(images[:1], wanted=[masks])
            learner.dino_head(teacher.cls)
            learner.patch_head(teacher.patches)
        features = learner.backbone(images, [masks, None], wanted=[masks, None])
        logits = learner.dino_head(torch.cat([each.cls for each in features])).sum()
        (logits + learner.patch_head(features[0].patches).sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [
    {},
    {"model": ModelConfig(arch="vit_nano", patch_size=8, ffn="swiglu")},
    {"heads": HeadsConfig(num_prototypes=64, hidden=96, bottleneck=32, tied=True)},
], ids=["mlp", "swiglu", "tied"])  # fmt: skip
def test_flops_are_those_that_pytorch_counts(changes):
    """Fused attention's backward computes the scores once more, which PyTorch counts and the formula does not."""
    settings = config(**changes)
    assert flops_per_step(settings) == pytest.approx(counted(settings), rel=0.02)


@pytest.mark.parametrize(("arch", "ffn", "theirs"), [
    ("vit_small", "arch", "vit_small_patch14_dinov2"), ("vit_base", "arch", "vit_base_patch14_dinov2"),
    ("vit_large", "arch", "vit_large_patch14_dinov2"), ("vit_giant2", "arch", "vit_giant_patch14_dinov2"),
])  # fmt: skip
def test_parameters_are_those_of_the_published_models(arch, ffn, theirs):
    settings = config(model=ModelConfig(arch=arch, patch_size=14, ffn=ffn), crops=CropsConfig(global_size=518))
    with torch.device("meta"):
        model = timm.create_model(theirs, num_classes=0)
    width = next(model.parameters()).shape[-1]  # of the mask token, which timm leaves out
    assert parameters(settings).backbone == sum(p.numel() for p in model.parameters()) + width


def test_heads_are_counted_once_where_they_are_tied():
    tied = parameters(config(heads=HeadsConfig(num_prototypes=64, hidden=96, bottleneck=32, tied=True))).heads
    separate = parameters(config(heads=HeadsConfig(num_prototypes=64, hidden=96, bottleneck=32))).heads
    assert separate == 2 * tied
    learner = build_learner(config().model, HEADS, image_size=32, seed=0)
    assert sum(parameters(config())) == sum(p.numel() for p in learner.parameters())


def test_tokens_of_mixed_sizes_are_their_mean():
    """2 x (16 + 2) + 3 x (4 + 2) tokens of an image at 32 and 16 pixels; 2 x (64 + 2) + 3 x (16 + 2) at 64 and 32."""
    assert tokens_per_step(config()) == 4 * (36 + 18)
    mixed = (SizesConfig(32, 16, probability=1.0), SizesConfig(64, 32, probability=3.0))
    crops = CropsConfig(global_size=32, local_size=16, num_local=3, mixed=mixed)
    assert tokens_per_step(config(crops=crops)) == 4 * (0.25 * 54 + 0.75 * (132 + 54))


def test_what_makes_a_step_dearer_or_cheaper():
    plain = flops_per_step(config())
    dropped = flops_per_step(config(model=dataclasses.replace(config().model, drop_path=0.5)))
    assert 0.4 * plain < dropped < 0.65 * plain
    assert flops_per_step(config(loss=LossConfig(gram=2.0))) > 1.2 * plain
    assert flops_per_step(config(train=TrainConfig(batch_size=8))) == 2 * plain


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_activations_are_those_that_autograd_keeps(ffn):
    """In float32 with fused attention, backbone only; storages that several operations keep count once."""
    settings = config(
        model=ModelConfig(arch="vit_micro", patch_size=8, ffn=ffn), train=TrainConfig(batch_size=8),
        heads=HeadsConfig(num_prototypes=64, hidden=8, bottleneck=8),
    )  # fmt: skip
    learner = build_learner(settings.model, settings.heads, image_size=32, seed=0).train()
    parameters_at = {p.untyped_storage().data_ptr() for p in learner.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    masks = torch.zeros(16, 16, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.backbone([torch.randn(16, 3, 32, 32), torch.randn(24, 3, 16, 16)], [masks, None], wanted=[masks, None])
    sizes = [kept[place].untyped_storage().nbytes() for place in kept.keys() - parameters_at]
    estimate = memory_per_rank(settings, processes=1, low_precision=False).activations - 3 * 4 * CHUNK
    assert estimate == pytest.approx(sum(sizes), rel=0.25)  # the last block keeps less than a whole one


def test_memory_follows_sharding_accumulation_and_recomputation():
    settings = config(train=TrainConfig(batch_size=64))
    one, four = (memory_per_rank(settings, processes=n, low_precision=False) for n in (1, 4))
    assert one.weights == 4 * sum(parameters(settings))
    assert one.moments == 2 * one.weights == 8 * four.weights
    hybrid = dataclasses.replace(settings, parallel=ParallelConfig(shard_group=2))
    assert memory_per_rank(hybrid, processes=4, low_precision=False).ema == one.ema / 2
    parts = dataclasses.replace(settings, train=TrainConfig(batch_size=64, accumulate=4))
    assert memory_per_rank(parts, processes=1, low_precision=False).activations < one.activations
    full = dataclasses.replace(settings, train=TrainConfig(batch_size=64, recompute="full"))
    assert memory_per_rank(full, processes=1, low_precision=False).activations < one.activations
    assert checkpoint_bytes(settings) == 4 * one.weights
