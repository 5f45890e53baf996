"""Edits: the same draws give the same pictures, plain ones stay plain, and a warp is what plain arithmetic says."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from curation.copydetect.edits import MILD, NUM_DRAWS, STRONG, Draws, Strength, compress, edit, render_overlays, warp


def pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth coloured patterns, uint8 [count, 3, side, side]."""
    small = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(small, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def overlays():
    return render_overlays(0, 32, count=16)


def test_the_same_seed_step_and_sample_give_the_same_edit(overlays):
    images, others = pictures(6, 48), pictures(6, 32, seed=1)
    first, again, later, other_seed = (
        edit(images, others, overlays, STRONG, seed=seed, purpose="a", step=step)
        for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))
    )
    assert first.shape == (6, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other_seed)


def test_the_number_of_pictures_does_not_change_the_draws():
    few, many = (Draws(0, "a", 1, count).between(0, 1) for count in (2, 5))
    assert torch.equal(few, many[:2])


def test_edits_change_pictures_yet_keep_them_recognisable(overlays):
    images = pictures(64, 48)
    plain = torch.nn.functional.interpolate(images.float(), 32, mode="area")
    means = []
    for strength in (MILD, STRONG):
        result = edit(images, pictures(64, 32, seed=1), overlays, strength, seed=0, purpose="a", step=0).float()
        means.append((result - plain).abs().mean().item())
    assert 5 < means[0] < means[1] < 100


class Fixed(Draws):
    """Every chance is missed, so everything keeps its neutral value."""

    def __init__(self, count: int):
        self.columns = iter(torch.full((NUM_DRAWS, count), 0.999))


def test_with_no_luck_a_warp_is_a_plain_resize():
    images = pictures(3, 32).float() / 255
    result = warp(images, torch.zeros(3, 3, 32, 32), Strength(crop=0.5, inset=0.0, chance=0.5), Fixed(3))
    torch.testing.assert_close(result, images, atol=1e-5, rtol=0)


def test_compress_is_jpeg_and_leaves_quality_zero_alone():
    pixels = pictures(2, 32)
    before = pixels.clone()
    compress(pixels, torch.tensor([0.0, 30.0]))
    assert torch.equal(pixels[0], before[0])
    stream = io.BytesIO()
    Image.fromarray(before[1].permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=30)
    assert np.array_equal(pixels[1].permute(1, 2, 0).numpy(), np.array(Image.open(stream)))


def test_overlays_cover_something_but_not_all(overlays):
    covered = (overlays[:, 3] > 0).float().mean((1, 2))
    assert torch.equal(overlays, render_overlays(0, 32, count=16))
    assert (covered > 0).all()
    assert covered.mean() < 0.6
