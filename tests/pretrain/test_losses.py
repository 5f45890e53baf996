"""Losses against slow loops, hand-made cases and numerical gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.loss.dino import dino_loss
from pretrain.loss.ibot import ibot_loss, mask_weights
from pretrain.loss.koleo import koleo_loss
from pretrain.loss.sinkhorn import sinkhorn_knopp


def cross_entropy(target, logits, temperature=0.1):
    scores = [math.exp(x / temperature) for x in logits]
    return -sum(t * math.log(s / sum(scores)) for t, s in zip(target, scores, strict=True))


@pytest.mark.parametrize("num_locals", [0, 3])
def test_dino_equals_a_loop_over_pairs(num_locals):
    torch.manual_seed(0)
    student = torch.randn(2 + num_locals, 4, 5) * 0.1
    targets = torch.rand(2, 4, 5).softmax(-1)
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(2 + num_locals):
            if s != t:  # a global crop is not its own target
                total += sum(cross_entropy(targets[t, b].tolist(), student[s, b].tolist()) for b in range(4)) / 4
                pairs += 1
    assert pairs == 2 + 2 * num_locals
    assert dino_loss(student[:2], student[2:], targets).item() == pytest.approx(total / pairs, rel=1e-5)


def test_dino_drops_the_diagonal():
    """The gradient of global crop 0 does not depend on the target of global crop 0."""
    student = torch.randn(2, 3, 4, requires_grad=True)
    targets = torch.rand(2, 3, 4).softmax(-1)
    other = targets.clone()
    other[0] = torch.rand(3, 4).softmax(-1)
    grads = []
    for t in (targets, other):
        (g,) = torch.autograd.grad(dino_loss(student, student[:0], t), student)
        grads.append(g)
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


def test_dino_by_hand():
    """Uniform logits over K prototypes cost log K, whatever the targets."""
    assert dino_loss(torch.zeros(2, 1, 8), torch.zeros(1, 1, 8), F.one_hot(torch.zeros(2, 1).long(), 8).float()) == (
        pytest.approx(math.log(8), rel=1e-6)
    )


def test_ibot_equals_a_loop_over_crops():
    torch.manual_seed(1)
    masks = torch.rand(6, 9) < 0.4
    masks[2] = False  # an unmasked crop counts in the mean and adds nothing
    student, targets = torch.randn(int(masks.sum()), 5), torch.rand(int(masks.sum()), 5).softmax(-1)
    total, row = 0.0, 0
    for crop in masks:
        losses = []
        for masked in crop.tolist():
            if masked:
                losses.append(cross_entropy(targets[row].tolist(), student[row].tolist()))
                row += 1
        total += sum(losses) / len(losses) if losses else 0.0
    got = ibot_loss(student, targets, mask_weights(masks), num_crops=6)
    assert got.item() == pytest.approx(total / 6, rel=1e-5)


def test_ibot_without_a_masked_patch_is_zero():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    assert ibot_loss(torch.zeros(0, 5), torch.zeros(0, 5), mask_weights(masks), num_crops=4) == 0


def test_koleo_equals_a_loop_and_a_hand_made_case():
    torch.manual_seed(2)
    x = torch.randn(7, 5)
    unit = [row / row.norm() for row in x]
    nearest = [min((a - b).norm().item() for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    assert koleo_loss(x).item() == pytest.approx(-sum(math.log(d) for d in nearest) / 7, rel=1e-5)
    # Two unit vectors at a right angle: distance sqrt(2) for both.
    assert koleo_loss(torch.eye(2)).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_of_coinciding_features_is_finite(dtype):
    """dinov2 #143, #314, #492: two equal class tokens gave inf in half precision."""
    x = torch.randn(1, 8).to(dtype).repeat(4, 1).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_koleo_of_one_image_is_zero():
    x = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros(1, 8))


def slow_sinkhorn(logits, temperature, iterations):
    """The matrix form, as SwAV's paper writes it."""
    q = [[math.exp(x / temperature) for x in row] for row in logits.tolist()]
    m, k = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        columns = [sum(row[j] for row in q) for j in range(k)]
        q = [[x / columns[j] / k for j, x in enumerate(row)] for row in q]
        q = [[x / sum(row) / m for x in row] for row in q]
    return torch.tensor([[x * m for x in row] for row in q])


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_matrix_form(iterations):
    torch.manual_seed(3)
    logits = torch.randn(6, 4) * 0.3
    got = sinkhorn_knopp(logits, temperature=0.07, num_iterations=iterations)
    assert torch.allclose(got, slow_sinkhorn(logits, 0.07, iterations), atol=1e-5)


def test_sinkhorn_rows_are_distributions_and_prototypes_share_the_mass():
    logits = torch.randn(64, 8) * 0.2
    got = sinkhorn_knopp(logits, temperature=0.1, num_iterations=20)
    assert torch.allclose(got.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(got.sum(0), torch.full((8,), 8.0), atol=0.05)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_sinkhorn_of_huge_logits_does_not_overflow(scale):
    """dinov3's un-normalised prototypes can exceed exp's range (method notes, defects): the maximum is subtracted."""
    logits = torch.randn(16, 8) * scale
    got = sinkhorn_knopp(logits, temperature=0.04)
    assert got.isfinite().all()
    assert torch.allclose(got.sum(1), torch.ones(16), atol=1e-4)


def test_sinkhorn_of_no_rows_is_empty():
    assert sinkhorn_knopp(torch.zeros(0, 8), temperature=0.04).shape == (0, 8)


@pytest.mark.parametrize("name", ["dino", "ibot", "koleo"])
def test_gradients_numerically(name):
    """Losses compute in float32: a central difference along a random direction, against autograd."""
    torch.manual_seed(4)
    targets = torch.rand(2, 3, 5).softmax(-1)
    x = torch.randn(4, 3, 5)

    def loss(x):
        if name == "dino":
            return dino_loss(x[:2], x[2:], targets, temperature=0.5)
        if name == "ibot":
            return ibot_loss(x[:2].flatten(0, 1), targets.flatten(0, 1), torch.rand(6), num_crops=4, temperature=0.5)
        return koleo_loss(x.flatten(0, 1))

    direction = torch.randn_like(x)
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    values = []
    for sign in (1, -1):
        torch.manual_seed(5)
        values.append(loss(x + sign * 1e-2 * direction).item())
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2)
