"""Backends of attention agree with a loop over sequences, for all tokens and for some queries only; which is chosen."""

import sys

import pytest
import torch

from pretrain.model.attention import Sdpa, choose_backend
from pretrain.model.kernels import Flex, Varlen, Xformers
from pretrain.model.noise import Noise
from pretrain.model.vit import Shape, VisionTransformer
from runtime.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPS = ((3, 7), (2, 4), (1, 5))
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SOME = torch.tensor([1, 7, 3, 1, 1, 2])  # queries of each of the six sequences


def one_by_one(q, k, v, num_queries):
    """softmax(q k^T / sqrt(E)) v, sequence by sequence and head by head."""
    lengths = [length for count, length in GROUPS for _ in range(count)]
    out, row, start = torch.empty_like(q), 0, 0
    for length, queries in zip(lengths, lengths if num_queries is None else num_queries.tolist(), strict=True):
        for head in range(q.shape[1]):
            ks, vs = k[start : start + length, head], v[start : start + length, head]
            scores = q[row : row + queries, head] @ ks.T / q.shape[2] ** 0.5
            out[row : row + queries, head] = scores.softmax(dim=-1) @ vs
        row, start = row + queries, start + length
    return out


def inputs(num_queries, *, width=8, requires_grad=False):
    torch.manual_seed(0)
    rows = 34 if num_queries is None else int(num_queries.sum())
    return [torch.randn(n, 2, width, requires_grad=requires_grad) for n in (rows, 34, 34)]


@pytest.mark.parametrize("num_queries", [None, SOME, torch.ones(6, dtype=torch.int64)], ids=["all", "some", "one"])
@pytest.mark.parametrize("backend", [Sdpa, Flex])
def test_a_backend_equals_a_loop_over_sequences(backend, num_queries):
    q, k, v = inputs(num_queries)
    found = backend(GROUPS, num_queries, CPU)(q, k, v)
    assert torch.allclose(found, one_by_one(q, k, v, num_queries), atol=1e-6)


@pytest.mark.parametrize("num_queries", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_sdpa_equal_those_of_the_loop(num_queries, dtype, tolerance):
    """In both forms, fused and written out."""
    leaves = inputs(num_queries, requires_grad=True)
    weight = torch.randn_like(leaves[0])
    expected = torch.autograd.grad((one_by_one(*leaves, num_queries) * weight).sum(), leaves)
    out = Sdpa(GROUPS, num_queries, CPU)(*(x.to(dtype) for x in leaves))
    found = torch.autograd.grad((out.float() * weight).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("num_queries", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("backend", [pytest.param(each, marks=NEEDS_GPU) for each in (Varlen, Xformers, Flex)])
def test_a_cuda_backend_equals_sdpa_with_its_gradients(backend, num_queries):
    if backend is Xformers:
        pytest.importorskip("xformers", reason="the extra xformers is not installed")
    leaves = [x.to(CUDA, torch.bfloat16).requires_grad_() for x in inputs(num_queries, width=64)]
    weight = torch.randn_like(leaves[0])
    exact = Sdpa(GROUPS, num_queries, CUDA)(*(x.float() for x in leaves))
    expected = torch.autograd.grad((exact * weight).sum(), leaves)
    out = backend(GROUPS, num_queries, CUDA)(*leaves)
    assert torch.allclose(out.float(), exact, atol=2e-2)
    for one, other in zip(torch.autograd.grad((out * weight).sum(), leaves), expected, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


SHAPE = Shape(dim=128, depth=2, num_heads=2, patch_size=8, image_size=32, num_registers=2, ffn="mlp", mlp_ratio=4.0)


@pytest.mark.parametrize("name", [
    "sdpa", "flex", *(pytest.param(name, marks=NEEDS_GPU) for name in ("varlen", "xformers")),
])  # fmt: skip
@pytest.mark.parametrize("prune", [False, True])
def test_packed_equals_separate_with_every_backend(name, prune):
    """The whole model, with stochastic depth, against SDPA on one batch at a time."""
    if name == "xformers":
        pytest.importorskip("xformers", reason="the extra xformers is not installed")
    device = CUDA if name in ("varlen", "xformers") else CPU
    torch.manual_seed(0)
    model = VisionTransformer(SHAPE, drop_path=0.25, layerscale=0.5).to(device)
    first, second = torch.randn(4, 3, 32, 32, device=device), torch.randn(6, 3, 16, 16, device=device)
    wanted = torch.rand(4, 16, device=device) < 0.4 if prune else torch.ones(4, 16, dtype=torch.bool, device=device)
    noise = Noise(rope=0, drop=0)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device == CUDA):
        model.attention = "sdpa"
        apart = model([first], wanted=[wanted], noise=noise)[0]
        model.attention = name
        together, small = model([first, second], wanted=[wanted, None], noise=noise)
    tolerance = 1e-5 if device == CPU else 5e-2
    assert torch.allclose(together.cls, apart.cls, atol=tolerance)
    assert torch.allclose(together.patches, apart.patches, atol=tolerance)
    assert small.cls.isfinite().all()


def test_the_mask_of_xformers_is_the_same():
    """Its real block-diagonal mask, written out densely, lets each query see its own sequence and no other."""
    pytest.importorskip("xformers", reason="the extra xformers is not installed")
    for num_queries in (None, SOME):
        q, k, v = inputs(num_queries)
        bias = Xformers(GROUPS, num_queries, CPU).mask.materialize((len(q), len(k)))
        scores = torch.einsum("qhe,khe->hqk", q, k) / 8**0.5 + bias
        found = torch.einsum("hqk,khe->qhe", scores.softmax(dim=-1), v)
        assert torch.allclose(found, one_by_one(q, k, v, num_queries), atol=1e-5)


def test_where_sequences_start_for_varlen():
    """By hand: lengths 7, 7, 7, 4, 4, 5; one query more or less changes the queries' starts alone."""
    varlen = Varlen(GROUPS, SOME, CPU)
    assert varlen.key_starts.tolist() == [0, 7, 14, 21, 25, 29, 34]
    assert varlen.query_starts.tolist() == [0, 1, 8, 11, 12, 13, 15]
    assert varlen.key_starts.dtype == varlen.query_starts.dtype == torch.int32
    assert varlen.longest == 7
    everything = Varlen(GROUPS, None, CPU)
    assert everything.query_starts is everything.key_starts


def test_the_installed_varlen_attention_takes_what_we_give_it():
    """No kernel on a CPU, so only up to there: a change of its signature would be a TypeError."""
    leaves = [x.bfloat16() for x in inputs(SOME, width=64)]
    with pytest.raises(NotImplementedError, match="CPU"):
        Varlen(GROUPS, SOME, CPU)(*leaves)


@pytest.mark.parametrize(("device", "dtype", "name"), [
    ("cuda", torch.bfloat16, "varlen"), ("cuda", torch.float16, "varlen"), ("cuda", torch.float32, "sdpa"),
    ("cpu", torch.bfloat16, "sdpa"), ("cpu", torch.float32, "sdpa"),
])  # fmt: skip
def test_what_auto_chooses(device, dtype, name):
    assert choose_backend("auto", device=device, dtype=dtype).name == name


@pytest.mark.parametrize("name", ["varlen", "xformers"])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_a_backend_that_cannot_run_there_is_refused(name, device, dtype):
    with pytest.raises(UserError, match=f"{name} needs CUDA and bfloat16 or float16; found {device}"):
        choose_backend(name, device=device, dtype=dtype)


def test_xformers_that_is_not_there_is_a_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r"xformers cannot be used: .*\n  install the extra troodon\[xformers\]"):
        choose_backend("xformers", device="cuda", dtype=torch.bfloat16)
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16) is Varlen  # harmless when not asked for


def test_flex_says_that_it_does_not_train_on_a_cpu():
    q, k, v = inputs(None, requires_grad=True)
    with pytest.raises(UserError, match="no backward pass on a CPU"):
        Flex(GROUPS, None, CPU)(q, k, v)


@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_a_model_of_a_half_precision_backend_is_evaluated_in_float32(name):
    """In-loop scores are taken in float32; the run itself was refused at its start if it cannot use the backend."""
    torch.manual_seed(0)
    model, images = VisionTransformer(SHAPE, layerscale=0.5).eval(), torch.randn(2, 3, 32, 32)
    expected = model.forward_features(images).cls
    model.attention = name
    assert torch.equal(model.forward_features(images).cls, expected)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=f"{name} needs CUDA"):
        model.forward_features(images)
