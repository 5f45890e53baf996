"""The chunked prototype losses and their targets against slow loops, the plain form and numerical gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.loss import targets as targets_module
from pretrain.loss.dino import crop_pairs
from pretrain.loss.prototypes import prototype_loss
from pretrain.loss.targets import Targets, center_shift, sinkhorn_shift, update_center

NO_PAIR_LEFT_OUT = torch.ones(1, 1)


@pytest.fixture(params=[2**25, 40], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(targets_module, "CHUNK", request.param)


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def make(*, sets=1, told=1, rows=7, dtype=torch.float32, scale=1.0):
    """Student rows [sets, rows, 6], prototypes [11, 6], targets [told, rows] and weights [rows]."""
    torch.manual_seed(0)
    targets = Targets(unit(told, rows, 6, dtype=dtype), scale * unit(11, 6, dtype=dtype), torch.randn(11), 0.07)
    z, w = unit(sets, rows, 6, dtype=dtype), scale * unit(11, 6, dtype=dtype)
    return z.requires_grad_(), w.requires_grad_(), targets, torch.rand(rows)


def plain_loss(z, w, targets, *, pairs, weights, temperature=0.1):
    """Whole logits, log-softmax, sums; what everybody writes."""
    p = (F.linear(targets.features, targets.prototypes).float() / targets.temperature + targets.shift).softmax(-1)
    log_q = (F.linear(z, w).float() / temperature).log_softmax(-1)
    return -torch.einsum("rc,m,cmk,rmk->", pairs, weights, p, log_q)


def plain_sinkhorn(logits, temperature, iterations):
    """SwAV's matrix form in float64, from exponentials that must not overflow."""
    q = (logits.double() / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * len(q)


@pytest.mark.usefixtures("chunk")
def test_loss_equals_a_loop_over_rows_and_pairs():
    z, w, targets, weights = make(sets=4, told=2)
    pairs = crop_pairs(2, local_weight=0.5)
    total = 0.0
    for r, c, m in itertools.product(range(4), range(2), range(7)):
        told = [
            (targets.features[c, m] @ u).item() / 0.07 + s
            for u, s in zip(targets.prototypes, targets.shift.tolist(), strict=True)
        ]
        own = [(z[r, m] @ u).item() / 0.1 for u in w]
        p = [math.exp(x - max(told)) for x in told]
        log_sum = math.log(sum(map(math.exp, own)))
        cross_entropy = -sum(a / sum(p) * (x - log_sum) for a, x in zip(p, own, strict=True))
        total += weights[m].item() * pairs[r, c].item() * cross_entropy
    assert prototype_loss(z, w, targets, pairs=pairs, weights=weights).loss.item() == pytest.approx(total, rel=1e-5)


def test_loss_by_hand():
    """A student without an opinion pays log K; one that agrees with a sharp target pays next to nothing."""
    targets = Targets(torch.eye(4)[None, :1], torch.eye(4), torch.zeros(4), 0.01)
    for z, cost in ((torch.zeros(1, 1, 4), math.log(4)), (torch.eye(4)[None, :1], math.log1p(3 * math.exp(-10)))):
        loss = prototype_loss(z, torch.eye(4), targets, pairs=NO_PAIR_LEFT_OUT, weights=torch.ones(1)).loss
        assert loss.item() == pytest.approx(cost, abs=1e-6)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("sets", "told"), [(1, 1), (2, 2), (10, 2)], ids=["ibot", "no local crops", "dino"])
def test_loss_and_gradients_equal_the_plain_form(sets, told):
    z, w, targets, weights = make(sets=sets, told=told)
    pairs = NO_PAIR_LEFT_OUT if sets == 1 else crop_pairs(sets - 2)
    got = prototype_loss(z, w, targets, pairs=pairs, weights=weights).loss
    expected = plain_loss(z, w, targets, pairs=pairs, weights=weights)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(3 * got, (z, w)), torch.autograd.grad(3 * expected, (z, w)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("chunk")
def test_gradients_numerically():
    z, w, targets, weights = make(sets=3, told=2, rows=2, dtype=torch.float64)
    pairs = crop_pairs(1).double()
    assert torch.autograd.gradcheck(
        lambda z, w: prototype_loss(z, w, targets, pairs=pairs, weights=weights, temperature=0.5).loss, (z, w)
    )


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_far_from_float32_as_the_plain_form(dtype):
    z, w, targets, weights = make(rows=64)
    call: dict[str, Any] = {"pairs": NO_PAIR_LEFT_OUT, "weights": weights}
    exact = plain_loss(z, w, targets, **call)
    with torch.autocast("cpu", dtype):
        plain, got = plain_loss(z, w, targets, **call), prototype_loss(z, w, targets, **call).loss
    assert got.dtype == torch.float32
    assert (got - exact).abs() <= 2 * (plain - exact).abs() + 1e-4 * exact.abs()
    for x in (z, w):
        truth, coarse, ours = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (exact, plain, got))
        assert ours.dtype == x.dtype
        assert (ours - truth).norm() <= 1.5 * (coarse - truth).norm() + 1e-3 * truth.norm()


def test_float16_needs_no_loss_scale():
    """A single logit's gradient, weight / K, is below float16's range; the gradients of features are not."""
    z, w, targets, _ = make(rows=4)
    weights = torch.full((4,), 1e-7)
    with torch.autocast("cpu", torch.float16):
        loss = prototype_loss(z, w, targets, pairs=NO_PAIR_LEFT_OUT, weights=weights).loss
    expected = torch.autograd.grad(plain_loss(z, w, targets, pairs=NO_PAIR_LEFT_OUT, weights=weights), (z, w))
    for got, truth in zip(torch.autograd.grad(loss, (z, w)), expected, strict=True):
        assert truth.norm() > 0
        assert (got - truth).norm() < 1e-2 * truth.norm()


def test_rows_add_up():
    """One process against two, and accumulation: the loss and its gradients are sums over rows."""
    z, w, targets, weights = make(sets=3, told=2)
    pairs = crop_pairs(1)
    whole = torch.autograd.grad(prototype_loss(z, w, targets, pairs=pairs, weights=weights).loss, (z, w))
    parts = [
        torch.autograd.grad(
            prototype_loss(z[:, part], w, targets.rows(part), pairs=pairs, weights=weights[part]).loss, (z, w)
        )
        for part in (slice(0, 3), slice(3, 7))
    ]
    for total, a, b in zip(whole, *parts, strict=True):
        assert torch.allclose(total, a + b, atol=1e-6)


def test_no_row_is_no_loss():
    """Mask ratio 0: nothing to learn from, and gradients of 0 for whoever shards them."""
    z, w, targets, weights = make(rows=0)
    out = prototype_loss(z, w, targets, pairs=NO_PAIR_LEFT_OUT, weights=weights)
    out.loss.backward()
    assert out.loss == 0
    assert out.entropy == 0
    assert w.grad is not None
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.usefixtures("chunk")
def test_entropy_and_mass_describe_the_targets():
    z, w, targets, weights = make(sets=3, told=2)
    pairs = crop_pairs(1)
    out = prototype_loss(z, w, targets, pairs=pairs, weights=weights)
    p = targets.scores().softmax(-1)
    share = weights / weights.sum()
    assert out.entropy.item() == pytest.approx((torch.special.entr(p).sum(-1).mean(0) @ share).item(), rel=1e-5)
    assert torch.allclose(out.mass, share @ p.mean(0), atol=1e-6)
    unmeasured = prototype_loss(z, w, targets, pairs=pairs, weights=weights, measure=False)
    assert unmeasured.loss == out.loss
    assert unmeasured.mass.sum() == 0


def test_what_does_not_learn_gets_no_gradient():
    z, w, targets, weights = make()
    call: dict[str, Any] = {"pairs": NO_PAIR_LEFT_OUT, "weights": weights}
    prototype_loss(z, w.detach(), targets, **call).loss.backward()
    assert z.grad is not None
    assert w.grad is None
    with torch.no_grad():
        assert not prototype_loss(z, w, targets, **call).loss.requires_grad


def test_huge_logits_stay_finite():
    """dinov3's prototypes are not normalised: logits have no bound."""
    z, w, targets, weights = make(scale=1e5)
    loss = prototype_loss(z, w, targets, pairs=NO_PAIR_LEFT_OUT, weights=weights).loss
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_no_buffer_is_larger_than_a_chunk(monkeypatch):
    """What is allocated at once stays below the logits: rows x K is never held."""
    monkeypatch.setattr(targets_module, "CHUNK", 2**11)
    z, w, weights = unit(1, 64, 4), unit(256, 4), torch.ones(64)
    targets = Targets(unit(1, 64, 4), unit(256, 4), torch.zeros(256), 0.07)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    for x in (z, w):
        x.requires_grad_()
    with Watch():
        sinkhorn_shift(targets.features[0], targets.prototypes, temperature=0.07)
        prototype_loss(z, w, targets, pairs=NO_PAIR_LEFT_OUT, weights=weights).loss.backward()
    assert largest <= 2**11


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_matrix_form_without_a_process_group(iterations):
    """Neither reference balances the patches without a process group (method notes, defects)."""
    torch.manual_seed(3)
    z, w = unit(9, 6), unit(8, 6)
    shift = sinkhorn_shift(z, w, temperature=0.07, num_iterations=iterations)
    got = Targets(z[None], w, shift, 0.07).scores().softmax(-1)[0]
    assert torch.allclose(got, plain_sinkhorn(z @ w.T, 0.07, iterations).float(), atol=1e-5)


def test_sinkhorn_by_hand():
    """Two rows that prefer the same prototype by the same margin share both alike."""
    z, w = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
    shift = sinkhorn_shift(z, w, temperature=0.1)
    assert torch.allclose(Targets(z[None], w, shift, 0.1).scores().softmax(-1), torch.full((1, 2, 2), 0.5))


@pytest.mark.usefixtures("chunk")
def test_prototypes_share_the_mass_in_the_limit():
    torch.manual_seed(4)
    z, w = unit(64, 16), unit(8, 16)
    shift = sinkhorn_shift(z, w, temperature=0.1, num_iterations=30)
    mass = Targets(z[None], w, shift, 0.1).scores().softmax(-1).sum((0, 1))
    assert torch.allclose(mass, torch.full((8,), 8.0), atol=0.05)


@pytest.mark.parametrize("scale", [4.0, 1e3, 1e5])
def test_sinkhorn_does_not_overflow(scale):
    """exp(logit / 0.04) is inf from a logit of 3.55 on; dinov3's plain prototypes have no bound (method notes)."""
    torch.manual_seed(5)
    z, w = unit(16, 6), scale * torch.randn(8, 6)
    targets = Targets(z[None], w, sinkhorn_shift(z, w, temperature=0.04), 0.04)
    p = targets.scores().softmax(-1)
    assert torch.allclose(p.sum(-1), torch.ones(1, 16), atol=1e-4)
    if scale < 10:
        assert torch.allclose(p[0], plain_sinkhorn(z @ w.T, 0.04, 3).float(), atol=1e-4)


def test_large_logits_fit_float16():
    """3000 / 0.04 does not: the temperature comes in after the product."""
    z, w = torch.eye(4), 3e3 * torch.eye(4)
    with torch.autocast("cpu", torch.float16):
        shift = sinkhorn_shift(z, w, temperature=0.04)
        targets = Targets(z[None], w, shift, 0.04)
        loss = prototype_loss(z[None], w, targets, pairs=NO_PAIR_LEFT_OUT, weights=torch.ones(4)).loss
    assert shift.isfinite().all()
    assert loss == 0  # every row has a prototype to itself, and the student agrees


def test_a_prototype_far_below_the_others_still_gets_its_share():
    """Its mass underflows unless the first column sum is taken in the log domain."""
    z, w = torch.eye(4), torch.eye(4)
    w[3] = -1e3
    shift = sinkhorn_shift(z, w, temperature=0.04, num_iterations=10)
    assert Targets(z[None], w, shift, 0.04).scores().softmax(-1)[0, :, 3].sum() == pytest.approx(1, abs=0.1)


def test_sinkhorn_of_no_rows_prefers_no_prototype():
    shift = sinkhorn_shift(torch.zeros(0, 4), torch.randn(8, 4), temperature=0.04)
    assert torch.equal(shift, shift[:1].expand(8))
    assert shift.isfinite().all()


def test_center_follows_the_mean_logit():
    torch.manual_seed(6)
    z, w, center = unit(5, 6), torch.randn(8, 6), torch.randn(8)
    expected = 0.9 * center + 0.1 * (z @ w.T).mean(0)
    assert torch.allclose(update_center(center, z, w), expected, atol=1e-6)
    assert torch.equal(update_center(center, z[:0], w), center)
    p = Targets(z[None], w, center_shift(center, temperature=0.07), 0.07).scores().softmax(-1)
    assert torch.allclose(p[0], ((z @ w.T - center) / 0.07).softmax(-1), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_cpu(dtype):
    z, w, targets, weights = make(sets=3, told=2, rows=64)
    call: dict[str, Any] = {"pairs": crop_pairs(1), "weights": weights}
    expected = prototype_loss(z, w, targets, **call)
    shift = sinkhorn_shift(targets.features[0], targets.prototypes, temperature=0.07)
    there = Targets(targets.features.cuda(), targets.prototypes.cuda(), targets.shift.cuda(), 0.07)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = prototype_loss(z.cuda(), w.cuda(), there, **{name: x.cuda() for name, x in call.items()})
        got_shift = sinkhorn_shift(there.features[0], there.prototypes, temperature=0.07)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(got_shift.cpu(), shift, atol=10 * tolerance)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(got.loss, (z, w)), torch.autograd.grad(expected.loss, (z, w)), strict=True):
        assert (a - b).norm() < tolerance * b.norm()
