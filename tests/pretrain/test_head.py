"""The head: what it reads, with and without weight norm, tied and apart."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.build import build_learner, materialise
from pretrain.config import HeadsConfig, ModelConfig
from pretrain.model.head import Head
from runtime.errors import UserError

MODEL = ModelConfig(arch="vit_pico", patch_size=8)
HEADS = HeadsConfig(num_prototypes=32, hidden=24, bottleneck=16)


def head(**kwargs) -> Head:
    module = Head(12, hidden=24, bottleneck=16, num_layers=3, num_prototypes=32, **kwargs)
    return materialise(module, device="cpu", seed=0, init="reference")


def test_logits_are_cosines_times_the_gain():
    """By hand: normalised bottleneck against normalised rows, times the gain of the row."""
    module = head()
    assert module.prototypes.gain is not None
    module.prototypes.gain.data.uniform_(0.5, 2)
    x = torch.randn(5, 12)
    z, w = module.mlp(x), module.prototypes.weight
    for m in range(5):
        for k in range(32):
            cosine = (z[m] / z[m].norm()) @ (w[k] / w[k].norm())
            assert module(x)[m, k].item() == pytest.approx((module.prototypes.gain[k] * cosine).item(), abs=1e-6)


def test_plain_prototypes_are_the_weight_itself():
    """DINOv3: no gain, no norm; a row twice as long gives logits twice as large."""
    module = head(weight_norm=False)
    assert [name for name, _ in module.prototypes.named_parameters()] == ["weight"]
    x = torch.randn(5, 12)
    before = module(x)
    module.prototypes.weight.data[3] *= 2
    expected = before.clone()
    expected[:, 3] *= 2
    assert torch.allclose(module(x), expected)


def test_read_is_given_unit_features_and_the_prototypes():
    module, x = head(), torch.randn(5, 12)
    z, w = module(x, read=lambda z, w: (z, w))
    assert torch.allclose(z.norm(dim=-1), torch.ones(5))
    assert w.shape == (32, 16)
    assert torch.equal(F.linear(z, w), module(x))


def test_gradients_equal_those_of_the_textbook_weight_norm():
    """One factor per row instead of a normalised copy: same values, same gradients."""
    module, x = head().double(), torch.randn(5, 12, dtype=torch.float64)
    weight, gain = module.prototypes.weight, module.prototypes.gain
    assert gain is not None
    gain.data.uniform_(0.5, 2)
    coefficients = torch.randn(5, 32, dtype=torch.float64)
    plain = F.linear(module(x, read=lambda z, _: z), gain * F.normalize(weight, dim=-1))
    expected = torch.autograd.grad((plain * coefficients).sum(), (weight, gain))
    got = torch.autograd.grad((module(x) * coefficients).sum(), (weight, gain))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_tiny_bottleneck_is_normalised_in_half_precision():
    """A norm of some 1e-6 has two digits in float16; it is taken in float32."""
    module = head().half()
    module.mlp[-1].weight.data *= 5e-3  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]
    x = torch.randn(5, 12).half()
    assert module.mlp(x).float().norm(dim=-1).max() < 1e-5
    z = module(x, read=lambda z, _: z)
    assert torch.allclose(z.float().norm(dim=-1), torch.ones(5), atol=2e-3)


def test_untied_heads_may_have_sizes_of_their_own():
    heads = HeadsConfig(
        num_prototypes=32, hidden=24, bottleneck=16, ibot_prototypes=20, ibot_hidden=28, ibot_bottleneck=12
    )
    learner = build_learner(MODEL, heads, image_size=16, seed=0)
    x = torch.randn(3, 48)
    assert learner.dino_head(x).shape == (3, 32)
    assert learner.patch_head(x).shape == (3, 20)
    assert learner.patch_head(x, read=lambda z, w: (z.shape, w.shape)) == ((3, 12), (20, 12))
    assert learner.patch_head is learner.ibot_head


def test_tied_heads_are_one_module_with_its_parameters_once():
    learner = build_learner(MODEL, HeadsConfig(**{**vars(HEADS), "tied": True}), image_size=16, seed=0)
    assert learner.patch_head is learner.dino_head
    assert not [name for name in learner.state_dict() if "ibot" in name]
    assert dict(learner.named_children()).keys() == {"backbone", "dino_head"}


def test_tied_heads_with_an_ibot_size_are_refused():
    heads = HeadsConfig(**{**vars(HEADS), "tied": True, "ibot_bottleneck": 12})
    with pytest.raises(UserError, match=r"heads\.tied.*12"):
        build_learner(MODEL, heads, image_size=16, seed=0)
