"""The backbone: position table at other sizes, norms, channels, and that a block compiles."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pretrain.build import materialise
from pretrain.model.noise import Noise
from pretrain.model.vit import Shape, VisionTransformer

SHAPE = Shape(dim=32, depth=2, num_heads=4, patch_size=8, image_size=40, num_registers=2, ffn="mlp", mlp_ratio=4.0)


def model(shape: Shape = SHAPE, **options) -> VisionTransformer:
    return materialise(VisionTransformer(shape, **options), device="cpu", seed=0, init="fan_in")


def table(values: torch.Tensor) -> VisionTransformer:
    """A model whose position table has `values` [5, 5] in its first dimension, and 7 for the class token."""
    net = model()
    with torch.no_grad():
        net.pos_embed.zero_()
        net.pos_embed[0, 0, 0] = 7
        net.pos_embed[0, 1:, 0] = values.flatten()
    return net


def grid(net: VisionTransformer, height: int, width: int) -> torch.Tensor:
    return net.positions(height, width)[1][0, :, 0].detach().reshape(height, width)


def test_the_native_size_is_the_table_itself():
    net = model()
    cls, positions = net.positions(5, 5)
    assert torch.equal(positions, net.pos_embed[:, 1:])
    assert torch.equal(cls, net.pos_embed[:, :1])
    assert net.positions(3, 8)[0][0, 0, 0] == cls[0, 0, 0]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(3, 7), (7, 3), (10, 4)])
def test_grids_that_are_not_square_are_not_swapped(height, width, antialias):
    """A table that grows to the right gives a grid that grows to the right and is the same in every row."""
    net = table(torch.arange(5.0).expand(5, 5))
    net.shape = replace(SHAPE, antialias=antialias)
    found = grid(net, height, width)
    assert (found.diff(dim=1) > 0).all()
    assert torch.allclose(found, found[:1].expand(height, width), atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [3, 4, 7, 12])
def test_both_edges_are_treated_alike(size, antialias):
    """A resize to a size commutes with mirroring. The reference's scale factor with an offset of 0.1 does not: it
    moves the grid towards one edge."""
    torch.manual_seed(0)
    values = torch.randn(5, 5)
    one, mirrored = table(values), table(values.flip(0, 1))
    one.shape = mirrored.shape = replace(SHAPE, antialias=antialias)
    assert torch.allclose(grid(one, size, size), grid(mirrored, size, size).flip(0, 1), atol=1e-5)

    def reference(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x[None, None], scale_factor=(size + 0.1) / 5, mode="bicubic", antialias=antialias)[0, 0]

    assert not torch.allclose(reference(values), reference(values.flip(0, 1)).flip(0, 1), atol=1e-3)


def test_antialiasing_averages_when_the_grid_shrinks():
    """A chessboard of +1 and -1 on 10 x 10 positions has a mean of 0; plain bicubic sampling of it does not."""
    board = torch.ones(10, 10)
    board[::2, 1::2] = board[1::2, ::2] = -1
    for antialias, bound in ((True, 0.2), (False, None)):
        net = model(replace(SHAPE, image_size=80, antialias=antialias))
        with torch.no_grad():
            net.pos_embed[0, 1:, 0] = board.flatten()
        largest = grid(net, 3, 3).abs().max()
        assert largest < bound if bound else largest > 0.5


def test_any_number_of_channels():
    for channels in (1, 5):
        net = model(replace(SHAPE, in_chans=channels))
        assert net.forward_features(torch.randn(2, channels, 40, 40)).patches.shape == (2, 25, 32)
        with pytest.raises(ValueError, match=rf"images of 3 channels; expected {channels} \(model.in_chans\)"):
            net.forward_features(torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize("pruned", [False, True])
def test_class_tokens_of_local_crops_have_a_norm_of_their_own_in_training(pruned):
    """Not those of the first batch, no patch, and nothing in evaluation, where exports use the global norm."""
    net = model(replace(SHAPE, untie_norms=True))
    with torch.no_grad():
        net.norm_local.weight.fill_(2)
    images = [torch.randn(2, 3, 40, 40), torch.randn(3, 3, 16, 16), torch.randn(1, 3, 24, 16)]
    everything = [torch.ones(2, 25) > 0, torch.ones(3, 4) > 0, torch.ones(1, 6) > 0] if pruned else None
    in_evaluation = net.eval()(images, wanted=everything)
    in_training = net.train()(images, wanted=everything)
    for i, (one, other) in enumerate(zip(in_evaluation, in_training, strict=True)):
        assert torch.allclose(other.cls, one.cls * (1 if i == 0 else 2), atol=1e-5)
        assert torch.allclose(other.patches, one.patches, atol=1e-5)
    sum(features.cls.sum() for features in in_training).backward()
    assert net.norm_local.bias.grad.sum() == 4 * 32  # four local class tokens
    assert net.norm.bias.grad.sum() == 2 * 32


def test_registers_come_between_class_token_and_patches():
    """They get no position, and are not among the patches."""
    net = model()
    with torch.no_grad():
        net.register_tokens.fill_(5)
        tokens = net._tokens(torch.randn(2, 3, 40, 40), None)
    assert (tokens[:, 1:3] == 5).all()
    features = net.forward_features(torch.randn(2, 3, 40, 40))
    assert features.registers.shape == (2, 2, 32)
    assert features.patches.shape == (2, 25, 32)


def test_drop_path_follows_its_seed():
    net = model(drop_path=0.5, layerscale=1.0)
    images = [torch.randn(8, 3, 16, 16)]
    one, again, other = (net(images, noise=Noise(rope=0, drop=seed))[0].cls for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_step_does_not_touch_torchs_generator():
    net = model(drop_path=0.5, layerscale=1.0)
    before = torch.get_rng_state()
    net([torch.randn(8, 3, 16, 16, generator=torch.Generator())], noise=Noise(rope=0, drop=0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_block_compiles_without_a_break(position):
    """Rows, factors and angles are inputs; nothing in a block depends on the values in a tensor."""
    net = model(replace(SHAPE, position=position), drop_path=0.5, layerscale=1.0)
    images, noise = [torch.randn(4, 3, 40, 40), torch.randn(3, 3, 16, 16)], Noise(rope=0, drop=0)
    wanted = [torch.arange(100).reshape(4, 25) % 7 < 2, None]
    expected = net(images, wanted=wanted, noise=noise)
    for block in net.blocks:
        block.compile(backend="eager", fullgraph=True)
    found = net(images, wanted=wanted, noise=noise)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.cls, other.cls, atol=1e-6)
        assert torch.allclose(one.patches, other.patches, atol=1e-6)


def test_a_half_precision_stream_stays_in_float32():
    """Under autocast products are bfloat16; tokens, to which LayerScale adds hundred-thousandths, are not."""
    net, seen = model(layerscale=1e-5), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        net([torch.randn(2, 3, 16, 16)])
    assert seen == [(torch.float32, torch.float32)] * 2
