"""Crops follow the published recipe and depend on nothing but their random numbers."""

import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pretrain.data import augment, color
from pretrain.data.augment import BOX_NUMBERS, COLOR_NUMBERS, box, cut, draw, min_side, recolor, views
from pretrain.data.config import CropsConfig
from runtime.seeding import generator

SMALL = CropsConfig(global_size=16, local_size=8, num_local=3)


def photograph(width: int, height: int) -> Image.Image:
    """A smooth picture with noise, RGB."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_views_carry_the_published_probabilities():
    first, second, *local = views(CropsConfig())
    assert (first.size, first.scale, first.blur, first.solarize) == (224, (0.32, 1.0), 1.0, 0.0)
    assert (second.size, second.scale, second.blur, second.solarize) == (224, (0.32, 1.0), 0.1, 0.2)
    assert [(view.size, view.scale, view.blur, view.solarize) for view in local] == [(96, (0.05, 0.32), 0.5, 0.0)] * 8
    assert len(views(CropsConfig(num_local=0))) == 2


@pytest.mark.parametrize(("width", "height"), [(120, 80), (64, 64), (500, 60)])
def test_boxes_are_distributed_as_torchvisions(width, height):
    """Mean and spread of area, aspect and centre within 5 standard errors of 4000 draws each."""
    scale, count = (0.05, 0.5), 4000
    rows = generator(0, "test").random((count, BOX_NUMBERS))
    ours = np.array([box(row, width=width, height=height, scale=scale) for row in rows.tolist()])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in theirs])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    for measure in (lambda x: x[:, 2] * x[:, 3], lambda x: np.log(x[:, 2] / x[:, 3]), lambda x: x[:, 0] + x[:, 2] / 2,
                    lambda x: x[:, 1] + x[:, 3] / 2):  # fmt: skip
        a, b = measure(ours), measure(theirs)
        error = np.sqrt((a.var() + b.var()) / count)
        assert abs(a.mean() - b.mean()) < 5 * error
        assert a.std() == pytest.approx(b.std(), rel=0.1)


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (0, 0, 1, 1)), ((300, 10), (143, 0, 13, 10)), ((10, 300), (0, 143, 10, 13))]
)
def test_images_too_small_or_long_for_a_box_give_their_centre(size, expected):
    width, height = size
    numbers = generator(0, "test").random(BOX_NUMBERS).tolist()
    assert box(numbers, width=width, height=height, scale=(1.0, 1.0)) == expected


def test_cut_equals_crop_and_bicubic_resize_of_pillow():
    image = photograph(120, 90)
    numbers = draw(0, 0, 5, num_views=5)
    crops = cut(image, numbers, views(SMALL))
    for crop, row, view in zip(crops, numbers.tolist(), views(SMALL), strict=True):
        left, top, w, h = box(row, width=120, height=90, scale=view.scale)
        expected = image.crop((left, top, left + w, top + h)).resize((view.size,) * 2, Image.Resampling.BICUBIC)
        assert crop.shape == (3, view.size, view.size)
        assert crop.dtype == torch.uint8
        difference = np.asarray(expected).astype(int) - crop.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 8  # fixed-point roundings of the two differ where little is averaged
        assert abs(difference).mean() < 0.5


def test_one_pixel_becomes_a_crop():
    (crop, *_) = cut(Image.new("RGB", (1, 1), (10, 20, 30)), draw(0, 0, 0, num_views=5), views(SMALL))
    assert (crop == torch.tensor([10, 20, 30])[:, None, None]).all()


def recolored(crops: torch.Tensor, numbers: np.ndarray, view: augment.View) -> torch.Tensor:
    out = torch.full(crops.shape, torch.nan)
    recolor(crops, numbers, view, out=out)
    return out


def slow_recolor(crop: torch.Tensor, numbers: np.ndarray, view: augment.View) -> torch.Tensor:
    """One crop through torchvision, the recipe written out."""
    flip, jitter, gray, blur, solarize, sigma = numbers[:6]
    image = F.to_dtype(crop, torch.float32, scale=True)
    if flip < 0.5:
        image = F.horizontal_flip(image)
    if jitter < 0.8:
        b, c, s, h = numbers[10:14]
        changes = [
            lambda x: F.adjust_brightness(x, 0.6 + 0.8 * b),
            lambda x: F.adjust_contrast(x, 0.6 + 0.8 * c),
            lambda x: F.adjust_saturation(x, 0.8 + 0.4 * s),
            lambda x: F.adjust_hue(x, -0.1 + 0.2 * h),
        ]
        for i in np.argsort(numbers[6:10]):
            image = changes[i](image)
    if gray < 0.2:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if blur < view.blur:
        image = F.gaussian_blur(image, [9, 9], [0.1 + 1.9 * sigma] * 2)
    if solarize < view.solarize:
        image = F.solarize(image, 0.5)
    return F.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_recolor_equals_the_recipe_in_torchvision(kind):
    view = views(SMALL)[kind]
    crops = torch.stack([cut(photograph(60, 60), draw(0, 0, i, num_views=5), views(SMALL))[kind] for i in range(60)])
    numbers = generator(3, "test").random((60, COLOR_NUMBERS))
    expected = torch.stack([slow_recolor(crop, row, view) for crop, row in zip(crops, numbers, strict=True)])
    torch.testing.assert_close(recolored(crops, numbers, view), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [16, 224])
def test_a_crop_does_not_depend_on_those_colored_with_it(size):
    view = views(CropsConfig(global_size=size))[1]
    crops = (torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    numbers = generator(0, "test").random((5, COLOR_NUMBERS))
    together = recolored(crops, numbers, view)
    alone = torch.cat([recolored(crops[i : i + 1], numbers[i : i + 1], view) for i in range(5)])
    assert torch.equal(together, alone)
    assert recolored(crops[:0], numbers[:0], view).shape == (0, 3, size, size)


def test_changes_come_as_often_as_published(monkeypatch):
    """Counts of changed crops among 4000 of each kind, within 5 standard deviations."""
    count, seen = 4000, {}

    def counted(name, function):
        def count_and_call(images, *strengths):
            seen[name] = seen.get(name, 0) + len(images)
            return function(images, *strengths)

        return count_and_call

    for name in ("brightness", "contrast", "saturation", "hue", "blur", "solarize"):
        monkeypatch.setattr(color, name, counted(name, getattr(color, name)))
    crop = cut(photograph(40, 40), draw(0, 0, 0, num_views=5), views(SMALL))[-1]
    for kind, expected_blur, expected_solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)):
        seen.clear()
        numbers = np.stack([draw(0, 0, i, num_views=5)[kind, BOX_NUMBERS:] for i in range(count)])
        result = recolored(crop.expand(count, 3, 8, 8), numbers, views(SMALL)[kind])
        pixels = result * torch.tensor(augment.STD)[:, None, None] + torch.tensor(augment.MEAN)[:, None, None]
        seen["gray"] = int(((pixels.amax(1) - pixels.amin(1)) < 1e-4).all((1, 2)).sum())
        expected = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.8)
        expected |= {"blur": expected_blur, "solarize": expected_solarize, "gray": 0.2}
        for name, share in expected.items():
            assert abs(seen.get(name, 0) / count - share) <= 5 * np.sqrt(share * (1 - share) / count), (kind, name)


def test_numbers_depend_on_seed_epoch_and_sample_only():
    numbers = draw(1, 2, 3, num_views=4)
    assert numbers.shape == (4, BOX_NUMBERS + COLOR_NUMBERS)
    assert (draw(1, 2, 3, num_views=10)[:4] == numbers).all()  # more local crops leave the first ones as they are
    for other in (draw(0, 2, 3, num_views=4), draw(1, 0, 3, num_views=4), draw(1, 2, 0, num_views=4)):
        assert not (other == numbers).any()


def test_no_global_generator_is_touched():
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    numbers = draw(0, 0, 0, num_views=5)
    crops = cut(photograph(50, 50), numbers, views(SMALL))
    recolored(torch.stack(crops[2:]), numbers[2:, BOX_NUMBERS:], views(SMALL)[2])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_draft_decoding_enlarges_no_crop_of_a_square():
    side = min_side(CropsConfig())
    assert side == 496
    for area, size in ((0.32, 224), (0.05, 96)):
        assert np.sqrt(area * 3 / 4) * side >= size
