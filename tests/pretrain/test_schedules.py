"""Schedules by hand at their corners."""

import math

import pytest

from pretrain.config import OptimConfig, TeacherConfig, TrainConfig
from pretrain.schedules import at_step, cosine, linear, scaled_lr

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


def test_rate_scales_with_the_square_root_of_the_global_batch():
    assert scaled_lr(OPTIM, 256) == pytest.approx(0.5e-3)
    assert scaled_lr(OPTIM, 4096) == pytest.approx(2e-3)


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


def test_a_run_of_one_step_has_values():
    one = at_step(0, OPTIM, TEACHER, TrainConfig(steps=1, batch_size=8))
    assert all(math.isfinite(v) for v in vars(one).values())
