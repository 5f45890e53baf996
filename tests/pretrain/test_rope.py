"""Rotary positions: by hand, relative within a crop, drawn once for all layers."""

import math

import pytest
import torch

import pretrain.model.vit as vit
from pretrain.build import materialise
from pretrain.model.noise import Noise, draw_stretch
from pretrain.model.rope import rotate, rotation
from pretrain.model.vit import Shape, VisionTransformer

SHAPE = Shape(dim=32, depth=3, num_heads=2, patch_size=8, image_size=32, num_registers=2, ffn="mlp", mlp_ratio=4.0,
              position="rope")  # fmt: skip


def model(**options) -> VisionTransformer:
    built = VisionTransformer(SHAPE, layerscale=1.0, **options)
    return materialise(built, device="cpu", seed=0, init="fan_in")


def test_angles_by_hand():
    """One row of two patches, head width 8: y is 0, x is -1/2 and 1/2, periods 1 and 10; 2 pi x / period."""
    cos, sin = rotation(1, 2, 8)
    angles = torch.tensor([[0, 0, -math.pi, -math.pi / 10] * 2, [0, 0, math.pi, math.pi / 10] * 2])
    assert torch.allclose(cos, angles.cos(), atol=1e-6)
    assert torch.allclose(sin, angles.sin(), atol=1e-6)
    stretched, _ = rotation(1, 2, 8, stretch=2.0)
    assert torch.allclose(stretched, (2 * angles).cos(), atol=1e-5)


def test_rows_come_first_and_axes_do_not_swap():
    """On 2 x 3 patches, angles of y change from row to row only, those of x from column to column only."""
    cos, sin = (table.reshape(2, 3, 2, 2, 2) for table in rotation(2, 3, 8))  # [rows, columns, halves, axes, periods]
    for table in (cos, sin):
        assert torch.equal(table[:, 0, :, 0], table[:, 2, :, 0])
        assert torch.equal(table[0, :, :, 1], table[1, :, :, 1])
    assert not torch.equal(sin[0, :, :, 0], sin[1, :, :, 0])
    assert not torch.equal(sin[:, 0, :, 1], sin[:, 2, :, 1])


def test_products_depend_on_the_distance_alone():
    """The product of a turned query and key is the same for all pairs of patches with the same offset; lengths stay."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16).expand(2, 20, 1, 16)
    cos, sin = rotation(4, 5, 16)
    turned_q, turned_k = rotate(q, cos, sin)[:, 0], rotate(k, cos, sin)[:, 0]
    assert torch.allclose(turned_q.norm(dim=-1), q[:, 0].norm(dim=-1), atol=1e-5)
    products = turned_q @ turned_k.T
    assert products[0, 6].item() == pytest.approx(products[13, 19].item(), abs=1e-4)  # one down, one right
    assert products[0, 6].item() != pytest.approx(products[0, 1].item(), abs=1e-2)


def test_a_head_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 4; found 6"):
        rotation(2, 2, 6)


def test_class_token_and_registers_are_not_turned():
    cos, sin = model()._angles([torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 8, 24)], None)
    assert cos.shape == (2 * 7 + 6, 16)
    still = torch.tensor([0, 1, 2, 7, 8, 9, 14, 15, 16])
    assert (cos[still] == 1).all()
    assert (sin[still] == 0).all()
    assert torch.equal(sin[3:7], rotation(2, 2, 16)[1])
    assert torch.equal(sin[17:], rotation(1, 3, 16)[1])


def test_positions_matter():
    """Without any position, exchanging two patches of an image changes nothing in the class token."""
    net = model().eval()
    images = torch.randn(1, 3, 16, 16)
    swapped = torch.cat([images[:, :, 8:], images[:, :, :8]], dim=2)
    assert not torch.allclose(net.forward_features(images).cls, net.forward_features(swapped).cls, atol=1e-3)


def test_packed_equals_separate_with_rotary_positions():
    """Also with stochastic depth and a last block that is read in part: angles follow their rows."""
    net = model(drop_path=0.5).train()
    images = [torch.randn(4, 3, 32, 16), torch.randn(5, 3, 16, 16)]
    wanted, noise = torch.rand(4, 8) < 0.4, Noise(rope=0, drop=0)
    together = net(images, wanted=[wanted, None], noise=noise)
    whole = net(images, noise=noise)
    alone = net(images[:1], noise=noise)[0]
    assert torch.allclose(together[0].cls, whole[0].cls, atol=1e-5)
    assert torch.allclose(together[0].patches, whole[0].patches[wanted], atol=1e-5)
    assert torch.allclose(together[1].cls, whole[1].cls, atol=1e-5)
    assert torch.allclose(whole[0].patches, alone.patches, atol=1e-5)


def test_stretch_is_log_uniform():
    draws = torch.tensor([draw_stretch(Noise(rope=seed, drop=0), jitter=2.0) for seed in range(800)])
    assert 0.5 <= draws.min() < 0.51
    assert 1.96 < draws.max() <= 2.0
    assert (draws < 1).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert (draws < 2**-0.5).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_without_noise_or_jitter_nothing_is_stretched():
    assert draw_stretch(None, jitter=2.0) == 1.0
    assert draw_stretch(Noise(rope=0, drop=0), jitter=1.0) == 1.0


def test_the_stretch_is_drawn_once_per_step_and_not_in_the_block_loop(monkeypatch):
    """DINOv3's code draws it again for each block. Here one draw serves all layers, crops and images."""
    draws = []

    def draw(noise, *, jitter):
        draws.append(jitter)
        return 0.5 + len(draws)  # another value at each call

    monkeypatch.setattr(vit, "draw_stretch", draw)
    net = model(rope_jitter=2.0).train()
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[1].angles))
    images = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    net(images, noise=Noise(rope=0, drop=0))
    assert draws == [2.0]
    assert len(seen) == 3
    assert all(angles is seen[0] for angles in seen)
    assert torch.equal(seen[0][0][3:19], rotation(4, 4, 16, stretch=1.5)[0])
    assert torch.equal(seen[0][0][38 + 3 : 38 + 7], rotation(2, 2, 16, stretch=1.5)[0])


def test_the_seed_decides_the_stretch_and_torchs_generator_does_not():
    net, images = model(rope_jitter=2.0), [torch.randn(2, 3, 32, 32)]
    first = net(images, noise=Noise(rope=1, drop=0))[0].cls
    torch.manual_seed(99)
    assert torch.equal(first, net(images, noise=Noise(rope=1, drop=5))[0].cls)
    assert not torch.equal(first, net(images, noise=Noise(rope=2, drop=0))[0].cls)
