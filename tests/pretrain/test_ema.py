"""The EMA teacher against a slow loop, at its bounds, and with buffers."""

import copy

import pytest
import torch
from torch import nn

from pretrain.ema import update_ema


def pair() -> tuple[nn.Module, nn.Module]:
    """An EMA and a student of equal shapes and different values."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).requires_grad_(True)
    ema = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    student[1].running_mean.fill_(2.0)
    student[1].num_batches_tracked.fill_(9)
    return ema, student


def test_equals_a_slow_loop():
    ema, student = pair()
    expected = [0.9 * a + (1 - 0.9) * b.detach() for a, b in zip(ema.parameters(), student.parameters(), strict=True)]
    before = [p.detach().clone() for p in student.parameters()]
    update_ema(ema, student, 0.9)
    for p, wanted in zip(ema.parameters(), expected, strict=True):
        assert torch.allclose(p, wanted, atol=1e-7)
        assert p.grad_fn is None
    assert all(torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))


def test_by_hand():
    ema, student = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((ema, 1.0), (student, 3.0)):
        for p in module.parameters():
            nn.init.constant_(p, value)
    update_ema(ema, student, 0.75)
    assert [p.item() for p in ema.parameters()] == [1.5, 1.5]


def test_momentum_1_stands_still_and_0_copies():
    ema, student = pair()
    before = [p.clone() for p in ema.parameters()]
    update_ema(ema, student, 1.0)
    assert all(torch.equal(p, old) for p, old in zip(ema.parameters(), before, strict=True))
    update_ema(ema, student, 0.0)
    assert all(torch.equal(p, now) for p, now in zip(ema.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("momentum", [-0.01, 1.01, float("nan")])
def test_momentum_outside_its_range_is_refused(momentum):
    ema, student = pair()
    with pytest.raises(ValueError, match="momentum: found"):
        update_ema(ema, student, momentum)


def test_buffers_are_copied():
    ema, student = pair()
    update_ema(ema, student, 0.9)
    assert torch.equal(ema[1].running_mean, torch.full((7,), 2.0))
    assert ema[1].num_batches_tracked == 9
