"""Packing is lossless, and a packed forward equals separate forwards."""

import pytest
import torch

from pretrain.model.attention import Sdpa
from pretrain.model.noise import Noise, draw_kept
from pretrain.model.packed import PackedTokens, pack, unpack
from pretrain.model.rows import block_rows
from pretrain.model.vit import Shape, VisionTransformer

CPU = torch.device("cpu")

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


def test_nested_tensors_share_their_memory_both_ways():
    """A jagged tensor with runs of 3, 3 and 4 tokens, and back; nothing is copied."""
    sequences = [torch.randn(length, 5) for length in (3, 3, 4)]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    packed = PackedTokens.from_nested(nested)
    assert packed.groups == ((2, 3), (1, 4))
    assert torch.equal(packed.values, torch.cat(sequences))
    assert packed.values.data_ptr() == nested.values().data_ptr()
    back = packed.to_nested()
    assert back.values().data_ptr() == nested.values().data_ptr()
    assert all(torch.equal(one, other) for one, other in zip(back.unbind(), sequences, strict=True))


@pytest.mark.parametrize("what", ["dense", "strided", "holes"])
def test_what_is_no_jagged_tensor_of_tokens_is_refused(what):
    if what == "dense":
        given = torch.zeros(2, 3, 4)
    elif what == "strided":
        given = torch.nested.nested_tensor([torch.zeros(3, 4)], layout=torch.strided)
    else:
        given = torch.nested.narrow(torch.zeros(2, 6, 4), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), torch.jagged)
    with pytest.raises(ValueError, match="expected a nested tensor"):
        PackedTokens.from_nested(given)


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


def test_stochastic_depth_keeps_an_exact_share_and_the_expectation():
    """Each draw keeps the same number of sequences, and over many draws each sequence equally often."""
    kept = draw_kept(Noise(rope=0, drop=0), group=0, num_sequences=5, drop=0.4, draws=4000)
    assert kept.shape == (4000, 3)
    assert (kept.diff(dim=1) > 0).all()
    assert torch.allclose(kept.flatten().bincount() / 4000, torch.full((5,), 0.6), atol=0.04)


def test_a_group_keeps_the_same_sequences_whatever_is_packed_with_it():
    noise = Noise(rope=0, drop=3)
    alone, together = (block_rows(groups, Sdpa, depth=2, device=CPU, drop=0.5, noise=noise) for groups in (
        ((4, 5),), ((4, 5), (6, 3))
    ))  # fmt: skip
    for one, two in zip(alone, together, strict=True):
        for branch, other in ((one.attention, two.attention), (one.feed_forward, two.feed_forward)):
            assert torch.equal(branch.read, other.read[: len(branch.read)])
            assert other.read[len(branch.read) :].min() >= 20


def oracle(model, images, masks, noise):
    """The forward pass with stochastic depth as a dense factor on every sequence: S / kept, or 0 where not kept."""
    factors = [
        [torch.zeros(len(x)).index_fill_(0, kept, len(x) / kept.numel()) for kept in draw_kept(
            noise, group=i, num_sequences=len(x), drop=model.drop_path, draws=2 * len(model.blocks)
        )]
        for i, x in enumerate(images)
    ]  # fmt: skip
    features = []
    for x, mask, factor in zip(images, masks, factors, strict=True):
        tokens = model._tokens(x, mask)
        for number, block in enumerate(model.blocks):
            attention, feed_forward = (f[:, None, None] for f in factor[2 * number : 2 * number + 2])
            qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
            q, k, v = (each.transpose(1, 2) for each in qkv)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + attention * block.ls1.gamma * block.attn.proj(out)
            tokens = tokens + feed_forward * block.ls2.gamma * block.mlp(block.norm2(tokens))
        features.append(model.norm(tokens))
    return features


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("prune", [False, True])
def test_stochastic_depth_and_pruning_equal_a_dense_mask(drop, prune):
    """Features and gradients, with groups whose factors differ (4 / 2 and 5 / 2), uneven numbers of wanted patches."""
    torch.manual_seed(0)
    model = VisionTransformer(SHAPE, drop_path=drop, layerscale=0.7).train()
    images = [torch.randn(4, 3, 32, 32), torch.randn(5, 3, 16, 16), torch.randn(1, 3, 16, 32)]
    masks = [torch.rand(4, 16) < 0.4, None, None]
    wanted = [torch.rand(4, 16) < torch.tensor([0.0, 0.2, 0.5, 1.0])[:, None], None, torch.ones(1, 8) > 0]
    noise = Noise(rope=1, drop=2)
    expected = oracle(model, images, masks, noise)
    features = model(images, masks, wanted=wanted if prune else None, noise=noise)
    for i, (found, whole) in enumerate(zip(features, expected, strict=True)):
        assert torch.allclose(found.cls, whole[:, 0], atol=1e-5)
        if prune:
            asked = whole[:, 3:][wanted[i]] if wanted[i] is not None else whole[:0, 0]
            assert found.registers.shape == (len(whole), 0, 32)
            assert torch.allclose(found.patches, asked, atol=1e-5)
        else:
            asked = whole[:, 3:]
            assert torch.allclose(found.registers, whole[:, 1:3], atol=1e-5)
            assert torch.allclose(found.patches, asked, atol=1e-5)
        expected[i] = whole[:, 0].square().sum() + asked.sin().sum()
    found_loss = sum(f.cls.square().sum() + f.patches.sin().sum() for f in features)
    parameters = list(model.parameters())
    found, reference = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])
        for loss in (found_loss, sum(expected))
    )
    assert (found - reference).norm() <= 1e-5 * reference.norm()


def test_without_noise_training_drops_nothing():
    model = VisionTransformer(SHAPE, drop_path=0.5, layerscale=1.0).train()
    images = [torch.randn(8, 3, 32, 32)]
    first, second = model(images), model(images, noise=Noise(rope=0, drop=0))
    assert torch.equal(first[0].cls, model(images)[0].cls)
    assert not torch.equal(first[0].cls, second[0].cls)
