"""One step: what moves, what is hidden, what stops it."""

import copy
from dataclasses import replace

import pytest
import torch

from pretrain.build import build_learner
from pretrain.config import HeadsConfig, LossConfig, ModelConfig, OptimConfig
from pretrain.data.batch import Batch
from pretrain.loop import choose_precision
from pretrain.optim import build_optimizer
from pretrain.schedules import StepValues
from pretrain.state import TrainState
from pretrain.step import NonFiniteLoss, health, student_losses, teacher_targets, train_step

VALUES = StepValues(lr=1e-2, weight_decay=0.0, momentum=0.5, temperature=0.04, last_layer_lr=1e-2, backbone_lr=1e-2)


@pytest.fixture
def state() -> TrainState:
    model = ModelConfig(arch="vit_nano", patch_size=8, init="fan_in", layerscale=1.0)
    student = build_learner(
        model, HeadsConfig(num_prototypes=32, hidden=32, bottleneck=16), image_size=32, seed=0
    ).train()
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    return TrainState(0, student, ema, build_optimizer(student, OptimConfig()))


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(8, 16, dtype=torch.bool)
    masks[:4, :5] = True
    return Batch(
        global_crops=torch.randn(8, 3, 32, 32, generator=generator),
        local_crops=torch.randn(8, 3, 16, 16, generator=generator),
        masks=masks,
        samples=torch.arange(4),
        skipped=(),
    )


def step(state: TrainState, batch: Batch, teacher=None, **kwargs):
    return train_step(
        state,
        teacher or state.ema,
        batch,
        VALUES,
        weights=kwargs.pop("weights", LossConfig()),
        clip=3.0,
        precision=torch.float32,
        group=None,
        **kwargs,
    )


def test_a_step_moves_the_student_and_the_ema_follows_half_way(state, batch):
    before, ema_before = copy.deepcopy(state.student), copy.deepcopy(state.ema)
    measured = step(state, batch)
    assert state.step == 1
    assert {"loss", "dino", "ibot", "koleo", "rank", "grad_norm/backbone"} <= measured.keys()
    for now, ema, old in zip(state.student.parameters(), state.ema.parameters(), ema_before.parameters(), strict=True):
        assert torch.allclose(ema, (now + old) / 2, atol=1e-7)
    moved = [not torch.equal(a, b) for a, b in zip(state.student.parameters(), before.parameters(), strict=True)]
    assert all(moved)


def test_total_is_the_weighted_sum(state, batch):
    measured = step(state, batch, weights=LossConfig(dino=0.5, ibot=2.0, koleo=0.25))
    total = 0.5 * measured["dino"] + 2 * measured["ibot"] + 0.25 * measured["koleo"]
    assert measured["loss"] == pytest.approx(total.item(), rel=1e-5)


def losses_of(state, batch, *, mask):
    asked = torch.ones_like(batch.masks)
    targets = teacher_targets(state.ema, batch.global_crops, asked, temperature=0.04, group=None)
    return targets, student_losses(
        state.student, batch, targets, asked=asked, mask=mask, weights=LossConfig(), group=None
    )


def test_distillation_asks_for_every_patch_and_hides_none(state, batch):
    """DINOv2 sec. 5: no masking, the patch loss on all tokens. The mask token then has no part in the loss."""
    targets, losses = losses_of(state, batch, mask=False)
    assert targets.patches.shape == (8 * 16, 32)
    losses.total.backward()
    assert state.student.backbone.mask_token.grad is None
    _, hidden = losses_of(state, batch, mask=True)
    hidden.total.backward()
    assert state.student.backbone.mask_token.grad.abs().sum() > 0


def test_a_frozen_teacher_stays_as_it_is(state, batch):
    teacher = copy.deepcopy(state.ema)
    before = copy.deepcopy(teacher.state_dict())
    step(state, batch, teacher, all_patches=True)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_targets_are_distributions(state, batch):
    targets = teacher_targets(state.ema, batch.global_crops, batch.masks, temperature=0.04, group=None)
    assert targets.cls.shape == (2, 4, 32)
    assert targets.patches.shape == (20, 32)
    assert torch.allclose(targets.cls.sum(-1), torch.ones(2, 4), atol=1e-5)
    assert torch.allclose(targets.patches.sum(-1), torch.ones(20), atol=1e-5)
    assert 1 <= health(targets)["rank"] <= 8


@pytest.mark.parametrize("change", ["no local crops", "nothing masked", "one image"])
def test_corner_batches_give_finite_steps(state, batch, change):
    if change == "no local crops":
        batch = replace(batch, local_crops=batch.local_crops[:0])
    elif change == "nothing masked":
        batch = replace(batch, masks=torch.zeros_like(batch.masks))
    else:
        batch = Batch(batch.global_crops[[0, 4]], batch.local_crops[[0, 4]], batch.masks[[0, 4]], batch.samples[:1], ())
    measured = step(state, batch)
    assert all(value.isfinite() for value in measured.values())
    if change == "nothing masked":
        assert measured["ibot"] == 0
    if change == "one image":
        assert measured["koleo"] == 0


def test_a_loss_that_is_not_finite_moves_nothing(state, batch):
    before = copy.deepcopy(state.student.state_dict())
    broken = replace(batch, global_crops=batch.global_crops.clone().index_fill_(0, torch.tensor([1]), float("nan")))
    with pytest.raises(NonFiniteLoss, match="dino nan"):
        step(state, broken)
    assert state.step == 0
    assert all(torch.equal(before[name], value) for name, value in state.student.state_dict().items())


def test_all_images_alike_shows_in_the_rank(state, batch):
    same = replace(batch, global_crops=batch.global_crops[:1].expand(8, -1, -1, -1))
    measured = step(state, same)
    assert all(value.isfinite() for value in measured.values())
    assert measured["rank"] < 1.5


def test_bfloat16_is_close_to_float32(state, batch):
    other = copy.deepcopy(state)
    other.optimizer = build_optimizer(other.student, OptimConfig())
    exact = step(state, batch)
    rounded = train_step(
        other, other.ema, batch, VALUES, weights=LossConfig(), clip=3.0, precision=torch.bfloat16, group=None
    )
    for name in ("dino", "ibot", "koleo"):
        assert rounded[name] == pytest.approx(exact[name].item(), rel=0.05, abs=0.05)


def test_precision_by_name():
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_equals_the_cpu(state, batch):
    other = copy.deepcopy(state)
    device = torch.device("cuda")
    other = TrainState(0, other.student.to(device), other.ema.to(device), state.optimizer)
    other.optimizer = build_optimizer(other.student, OptimConfig())
    exact, there = step(state, batch), step(other, batch.to(device))
    for name in ("dino", "ibot", "koleo"):
        assert there[name].item() == pytest.approx(exact[name].item(), rel=1e-3)
