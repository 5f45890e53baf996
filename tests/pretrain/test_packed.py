"""Packing is lossless, and a packed forward equals separate forwards."""

import pytest
import torch

from pretrain.model.packed import pack, unpack
from pretrain.model.vit import Shape, VisionTransformer, keep_sequences

SHAPE = Shape(dim=32, depth=3, num_heads=4, patch_size=8, image_size=32, num_registers=2, ffn="mlp", mlp_ratio=4.0)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(SHAPE, layerscale=0.5)


def test_unpack_gives_back_what_was_packed():
    batches = [torch.randn(3, 5, 4), torch.randn(2, 7, 4), torch.randn(1, 1, 4)]
    for given, back in zip(batches, unpack(pack(batches)), strict=True):
        assert torch.equal(given, back)


def test_cu_seqlens_by_hand():
    packed = pack([torch.zeros(2, 3, 1), torch.zeros(1, 4, 1)])
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 10]
    assert packed.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_forward_and_gradient_equal_separate_ones(model, training, dtype):
    """In training and evaluation mode, with masks, for both CPU attention forms (fused and written out)."""
    model.train(training)
    images = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    mask = torch.rand(4, 16) < 0.4
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        together = model(images, [mask, None])
        apart = [model([images[0]], [mask])[0], model([images[1]])[0]]

    def gradient(features):
        model.zero_grad()
        sum(f.cls.float().square().sum() + f.patches.float().sin().sum() for f in features).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a.cls.float(), b.cls.float(), atol=tolerance)
        assert torch.allclose(a.patches.float(), b.patches.float(), atol=tolerance)
        assert torch.allclose(a.registers.float(), b.registers.float(), atol=tolerance)
    one, two = gradient(together), gradient(apart)
    assert (one - two).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * two.norm()


def test_attention_does_not_leak_between_sequences(model):
    """Changing one image changes no feature of another, bit for bit."""
    model.eval()
    images = torch.randn(3, 3, 32, 32)
    changed = images.clone()
    changed[1] += 1
    before, after = model.forward_features(images), model.forward_features(changed)
    assert torch.equal(before.patches[[0, 2]], after.patches[[0, 2]])
    assert not torch.equal(before.patches[1], after.patches[1])


def test_a_mask_hides_the_pixels(model):
    """Masked patches of the input do not influence anything."""
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True  # the first row of patches: the upper 8 pixel rows
    changed = images.clone()
    changed[:, :, :8] = torch.randn(2, 3, 8, 32)
    assert torch.equal(model([images], [mask])[0].cls, model([changed], [mask])[0].cls)
    assert not torch.equal(model([images])[0].cls, model([changed])[0].cls)


def test_image_that_does_not_divide_is_refused(model):
    with pytest.raises(ValueError, match="do not divide into patches of 8"):
        model.forward_features(torch.zeros(1, 3, 32, 30))


def test_positions_keep_their_table_at_the_native_size_and_resize_elsewhere(model):
    _, native = model.positions(4, 4)
    assert torch.equal(native, model.pos_embed[:, 1:])
    assert model.positions(2, 7)[1].shape == (1, 14, 32)


def test_stochastic_depth_keeps_whole_sequences_and_the_expectation():
    """Kept rows are whole sequences of each group, and the mean update over many draws is the full update."""
    packed = pack([torch.arange(8.0).reshape(4, 2, 1), torch.arange(100.0, 106).reshape(2, 3, 1)])
    torch.manual_seed(0)
    total = torch.zeros(14)
    draws = 4000
    for _ in range(draws):
        kept, rows, scale = keep_sequences(packed, 0.5)
        assert kept.groups == ((2, 2), (1, 3))
        assert torch.equal(kept.values, packed.values[rows])
        total.index_add_(0, rows, scale)
    assert torch.allclose(total / draws, torch.ones(14), atol=0.08)


def test_drop_path_is_off_in_eval_and_changes_training():
    torch.manual_seed(0)
    model = VisionTransformer(SHAPE, drop_path=0.5, layerscale=1.0)
    images = torch.randn(8, 3, 32, 32)
    model.eval()
    assert torch.equal(model.forward_features(images).cls, model.forward_features(images).cls)
    model.train()
    assert not torch.equal(model.forward_features(images).cls, model.forward_features(images).cls)
