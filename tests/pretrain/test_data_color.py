"""Coloring many crops at once gives what torchvision gives for each alone."""

import pytest
import torch
import torchvision.transforms.v2.functional as F

from pretrain.data import color


@pytest.fixture
def images():
    """Random pixels, gray, primary colors, black, half white, and equal channels in pairs."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=random)
    images[1] = images[1, :1]
    images[2] = (images[2] > 0.5).float()
    images[3] = 0
    images[4, :, :8] = 1
    images[5, 1] = images[5, 2]
    return images


FACTORS = torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4, 0.9])
SHIFTS = torch.tensor([-0.1, 0.1, 0.07, -0.03, 0.0, 0.5])


@pytest.mark.parametrize(
    ("ours", "theirs", "strengths"),
    [
        (color.brightness, F.adjust_brightness, FACTORS),
        (color.contrast, F.adjust_contrast, FACTORS),
        (color.saturation, F.adjust_saturation, FACTORS),
        (color.hue, F.adjust_hue, SHIFTS),
        (color.blur, lambda image, sigma: F.gaussian_blur(image, [9, 9], [sigma, sigma]), 2 * FACTORS - 1.1),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "blur"],
)
def test_equals_torchvision(images, ours, theirs, strengths):
    expected = torch.stack([theirs(image, float(value)) for image, value in zip(images, strengths, strict=True)])
    torch.testing.assert_close(ours(images, strengths), expected, atol=3e-6, rtol=0)


def test_gray_equals_torchvision(images):
    torch.testing.assert_close(color.gray(images), F.rgb_to_grayscale(images), atol=1e-6, rtol=0)


def test_solarize_equals_torchvision_on_bytes():
    image = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = F.solarize(image, 128)
    assert torch.equal((color.solarize(image / 255) * 255).round().to(torch.uint8), expected)


def test_hue_of_primary_colors():
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
    turned = torch.cat([color.hue(red, torch.tensor([turn / 3])) for turn in (0, 1, 2, 3)])
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    torch.testing.assert_close(turned[:, :, 0, 0], expected, atol=1e-5, rtol=0)


def test_blur_of_a_point_is_the_kernel():
    image = torch.zeros(1, 3, 17, 17)
    image[:, :, 8, 8] = 1
    blurred = color.blur(image, torch.tensor([1.5]))[0, 0]
    weights = torch.tensor([2.718281828 ** (-(i**2) / (2 * 1.5**2)) for i in range(-4, 5)])
    weights /= weights.sum()
    torch.testing.assert_close(blurred[4:13, 4:13], torch.outer(weights, weights), atol=1e-6, rtol=0)
    assert blurred[:4].abs().sum() == 0  # nothing beyond 4 pixels


@pytest.mark.parametrize("function", [color.brightness, color.contrast, color.saturation, color.hue, color.blur])
def test_bits_depend_neither_on_neighbours_nor_on_threads(function):
    images = torch.rand(3, 3, 200, 200, generator=torch.Generator().manual_seed(1))
    strengths = torch.tensor([0.3, 0.7, 1.1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([function(images[i : i + 1], strengths[i : i + 1]) for i in range(3)])
        torch.set_num_threads(3)
        together = function(images, strengths)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)
