"""Crops follow the published recipe and depend on nothing but their random numbers."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pretrain.data import augment, color
from pretrain.data.augment import BOX_NUMBERS, COLOR_NUMBERS, box, cut, draw, min_side, recolor, sizes_of_step, views
from pretrain.data.config import CropsConfig, SizesConfig
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


def test_blur_is_not_inverted_unless_asked_for():
    """The reference code hands over 1 - p by mistake, and the released models were trained so (method 2.4)."""
    assert [view.blur for view in views(CropsConfig(num_local=1))] == [1.0, 0.1, 0.5]
    assert [view.blur for view in views(CropsConfig(num_local=1, compat="reference_blur"))] == [0.0, 0.9, 0.5]


def test_gram_crops_are_the_global_ones_at_another_size():
    """Boxes, flips and colors agree: averaged down, a Gram crop of a smooth picture is nearly its global crop."""
    crops = CropsConfig(global_size=16, local_size=8, num_local=1, gram_size=32, global_scale=(0.8, 1.0))
    recipe = views(crops)
    assert [view.size for view in recipe] == [16, 16, 8, 32, 32]
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((80, 80))
    for sample in range(8):
        numbers = draw(0, 0, sample, crops=crops)
        assert (numbers[3:] == numbers[:2]).all()
        assert (numbers[:3] == draw(0, 0, sample, crops=replace(crops, gram_size=0))).all()
        pixels = cut(picture, numbers[:, :BOX_NUMBERS], recipe)
        for i in (0, 1):
            colors = numbers[i : i + 1, BOX_NUMBERS:]
            small = recolored(pixels[i][None], colors, recipe[i])
            large = recolored(pixels[3 + i][None], colors, recipe[3 + i])
            assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.15, (sample, i)
            assert (small.flip(-1) - small).abs().mean() > 0.2  # so that a wrong flip would show


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_follows_its_option(flip):
    view = views(CropsConfig(global_size=16, flip=flip, compat="reference_blur"))[0]
    crop = torch.arange(16, dtype=torch.uint8).expand(1, 3, 16, 16)
    numbers = np.full((1, COLOR_NUMBERS), 0.999)  # nothing but a flip
    numbers[:, 0] = 0.5
    plain = recolored(crop, numbers, replace(view, flip=0.0))
    assert torch.equal(recolored(crop, numbers, view), plain.flip(-1) if flip else plain)


def test_sizes_of_a_step_are_drawn_by_their_probabilities():
    """The high-resolution stage of DINOv3 (app. C): five sizes, within 5 standard deviations of 2000 steps."""
    table = [(512, 112, 768, 0.3), (768, 112, 1152, 0.3), (768, 168, 1152, 0.3), (768, 224, 1152, 0.05),
             (768, 336, 1152, 0.05)]  # fmt: skip
    crops = CropsConfig(mixed=tuple(SizesConfig(*row) for row in table))
    drawn = [sizes_of_step(crops, seed=0, step=step) for step in range(2000)]
    for *sizes, probability in table:
        count = sum([each.global_size, each.local_size, each.gram_size] == sizes for each in drawn)
        assert abs(count / 2000 - probability) < 5 * np.sqrt(probability * (1 - probability) / 2000)
    assert [sizes_of_step(crops, seed=0, step=step) for step in range(20)] == drawn[:20]  # whichever process asks
    assert [sizes_of_step(crops, seed=1, step=step) for step in range(20)] != drawn[:20]
    assert sizes_of_step(CropsConfig(), seed=0, step=3) == CropsConfig()


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
    numbers = draw(0, 0, 5, crops=SMALL)
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
    (crop, *_) = cut(Image.new("RGB", (1, 1), (10, 20, 30)), draw(0, 0, 0, crops=SMALL), views(SMALL))
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
    crops = torch.stack([cut(photograph(60, 60), draw(0, 0, i, crops=SMALL), views(SMALL))[kind] for i in range(60)])
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
    crop = cut(photograph(40, 40), draw(0, 0, 0, crops=SMALL), views(SMALL))[-1]
    for kind, expected_blur, expected_solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)):
        seen.clear()
        numbers = np.stack([draw(0, 0, i, crops=SMALL)[kind, BOX_NUMBERS:] for i in range(count)])
        result = recolored(crop.expand(count, 3, 8, 8), numbers, views(SMALL)[kind])
        pixels = result * torch.tensor(augment.STD)[:, None, None] + torch.tensor(augment.MEAN)[:, None, None]
        seen["gray"] = int(((pixels.amax(1) - pixels.amin(1)) < 1e-4).all((1, 2)).sum())
        expected = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.8)
        expected |= {"blur": expected_blur, "solarize": expected_solarize, "gray": 0.2}
        for name, share in expected.items():
            assert abs(seen.get(name, 0) / count - share) <= 5 * np.sqrt(share * (1 - share) / count), (kind, name)


def test_numbers_depend_on_seed_epoch_and_sample_only():
    numbers = draw(1, 2, 3, crops=CropsConfig(num_local=2))
    assert numbers.shape == (4, BOX_NUMBERS + COLOR_NUMBERS)
    assert (
        draw(1, 2, 3, crops=CropsConfig())[:4] == numbers
    ).all()  # more local crops leave the first ones as they are
    for other in (
        draw(0, 2, 3, crops=CropsConfig(num_local=2)),
        draw(1, 0, 3, crops=CropsConfig(num_local=2)),
        draw(1, 2, 0, crops=CropsConfig(num_local=2)),
    ):
        assert not (other == numbers).any()


def test_no_global_generator_is_touched():
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    numbers = draw(0, 0, 0, crops=SMALL)
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
    assert min_side(CropsConfig(gram_size=448)) == 915  # the Gram teacher's crops count too
