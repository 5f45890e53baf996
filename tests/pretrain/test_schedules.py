"""Schedules by hand at their corners."""

import math

import pytest

from pretrain.config import OptimConfig, TeacherConfig, TrainConfig
from pretrain.schedules import at_step, check, cosine, linear, scaled_lr
from runtime.errors import UserError

OPTIM = OptimConfig(lr=1e-3, reference_batch=1024, min_lr=1e-6, warmup=0.1, freeze_last_layer=0.05)
TEACHER = TeacherConfig(momentum=0.9, temperature=0.07, warmup_temperature=0.04, warmup=0.5)
TRAIN = TrainConfig(steps=100, batch_size=256)


def values(step: int):
    return at_step(step, OPTIM, TEACHER, TRAIN)


def test_cosine_and_linear_at_their_ends_and_middle():
    assert cosine(1.0, 3.0, step=0, steps=11) == 1.0
    assert cosine(1.0, 3.0, step=5, steps=11) == pytest.approx(2.0)
    assert cosine(1.0, 3.0, step=10, steps=11) == pytest.approx(3.0)
    assert linear(0.0, 1.0, step=3, steps=4) == 0.75
    assert linear(0.0, 1.0, step=9, steps=4) == 1.0
    assert linear(0.0, 1.0, step=0, steps=0) == 1.0


@pytest.mark.parametrize(
    ("lr", "rule", "reference", "batch", "peak"),
    [
        (4e-3, "sqrt", 1024, 2048, 5.66e-3),  # DINOv2, vitl16_short
        (2e-4, "sqrt", 1024, 3072, 3.46e-4),  # DINOv2, vitl14 and vitg14
        (5e-5, "sqrt", 64, 4096, 4e-4),  # DINOv3 7B: 5e-5 * 4 sqrt(4096 / 1024)
        (1e-3, "sqrt", 64, 2048, 5.66e-3),  # DINOv3's ViT-L on ImageNet-1k
        (1e-3, "linear", 256, 1024, 4e-3),
        (1e-3, "linear", 256, 128, 5e-4),
        (1e-3, "none", 1024, 64, 1e-3),  # distillation: the rate as published
    ],
)
def test_peak_rate_of_a_global_batch(lr, rule, reference, batch, peak):
    optim = OptimConfig(lr=lr, lr_rule=rule, reference_batch=reference)
    assert scaled_lr(optim, batch) == pytest.approx(peak, rel=2e-3)


def test_rate_warms_up_peaks_and_ends_at_the_minimum():
    peak = scaled_lr(OPTIM, 256)
    assert values(0).lr == pytest.approx(peak / 10)
    assert values(9).lr == pytest.approx(peak)
    assert values(10).lr == pytest.approx(peak)
    assert values(99).lr == pytest.approx(1e-6)
    rates = [values(step).lr for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_last_layer_stands_still_at_first():
    assert [values(step).last_layer_lr == 0 for step in (0, 4, 5)] == [True, True, False]


def test_temperature_momentum_and_weight_decay():
    assert values(0).temperature == pytest.approx(0.04)
    assert values(25).temperature == pytest.approx(0.055)
    assert values(50).temperature == values(99).temperature == pytest.approx(0.07)
    assert values(0).momentum == pytest.approx(0.9)
    assert values(99).momentum == pytest.approx(1.0)
    assert (values(0).weight_decay, values(99).weight_decay) == (pytest.approx(0.04), pytest.approx(0.4))
    assert all(math.isfinite(v) for step in range(100) for v in vars(values(step)).values())


def test_the_backbone_stands_still_at_first_where_asked():
    optim = OptimConfig(freeze_backbone=0.1, freeze_last_layer=0.0)
    frozen = [at_step(step, optim, TEACHER, TRAIN) for step in range(12)]
    assert [each.backbone_lr == 0 for each in frozen] == [True] * 10 + [False] * 2
    assert all(each.lr > 0 and each.last_layer_lr == each.lr for each in frozen)
    assert frozen[10].backbone_lr == frozen[10].lr


def test_dinov2_short_schedule():
    """`vitl16_short` (method.md 2.2): 125k steps of 2048 images in epochs of 1,250 steps."""
    optim = OptimConfig(lr=4e-3, layer_decay=0.9)
    train = TrainConfig(steps=125_000, batch_size=2048)
    at = {
        step: at_step(step, optim, TeacherConfig(), train) for step in (0, 1249, 1250, 12_499, 12_500, 37_500, 124_999)
    }
    assert at[0].lr == pytest.approx(5.657e-3 / 12_500, rel=1e-3)
    assert at[12_499].lr == at[12_500].lr == pytest.approx(5.657e-3, rel=1e-3)
    assert at[124_999].lr == pytest.approx(1e-6)
    assert (at[1249].last_layer_lr, at[1250].last_layer_lr) == (0.0, at[1250].lr)
    assert (at[0].weight_decay, at[124_999].weight_decay) == (pytest.approx(0.04), pytest.approx(0.4))
    assert (at[0].momentum, at[124_999].momentum) == (pytest.approx(0.992), pytest.approx(1.0))
    assert (at[0].temperature, at[37_500].temperature) == (pytest.approx(0.04), pytest.approx(0.07))


def test_dinov3_schedule_is_constant_after_its_warm_up():
    """7B, stage 1 (method.md 2.3): 1M steps of 4096 images, everything flat after 100k."""
    optim = OptimConfig(
        lr=5e-5, reference_batch=64, schedule="constant", weight_decay_end=0.04, freeze_last_layer=0.005
    )
    teacher = TeacherConfig(momentum=0.994, momentum_end=0.994, warmup=0.1)
    train = TrainConfig(steps=1_000_000, batch_size=4096)
    at = {step: at_step(step, optim, teacher, train) for step in (0, 49_999, 4_999, 5_000, 100_000, 500_000, 999_999)}
    assert at[49_999].lr == pytest.approx(2e-4)  # half way up
    for step in (100_000, 500_000, 999_999):
        assert at[step].lr == at[step].backbone_lr == pytest.approx(4e-4)
        assert at[step].temperature == pytest.approx(0.07)
    assert {each.weight_decay for each in at.values()} == {0.04}
    assert {each.momentum for each in at.values()} == {0.994}
    assert (at[4_999].last_layer_lr, at[5_000].last_layer_lr) == (0.0, at[5_000].lr)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": TeacherConfig(momentum=1.2)}, "teacher.momentum: found 1.2; expected 0 to 1"),
        ({"teacher": TeacherConfig(momentum_end=-0.1)}, "teacher.momentum_end: found -0.1"),
        ({"teacher": TeacherConfig(warmup_temperature=0.0)}, "teacher.warmup_temperature: found 0.0; expected more"),
        ({"optim": OptimConfig(warmup=12_500)}, "optim.warmup: found 12500; expected 0 to 1"),
        ({"optim": OptimConfig(freeze_backbone=2)}, "optim.freeze_backbone: found 2"),
        ({"optim": OptimConfig(reference_batch=0)}, "optim.reference_batch: found 0"),
    ],
)
def test_values_outside_their_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(**{"optim": OptimConfig(), "teacher": TeacherConfig()} | changes)


def test_a_run_of_one_step_has_values():
    one = at_step(0, OPTIM, TEACHER, TrainConfig(steps=1, batch_size=8))
    assert all(math.isfinite(v) for v in vars(one).values())
