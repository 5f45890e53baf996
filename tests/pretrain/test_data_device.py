"""Crops made for a whole batch at once are those of the loader, to within roundings."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pretrain.data import device
from pretrain.data.augment import BOX_NUMBERS, STD, draw, views
from pretrain.data.config import CropsConfig, MaskConfig, SizesConfig
from pretrain.data.device import RawBatch, alike, cut_all, finish, padded, resized_crops, weights
from pretrain.data.loader import batches
from pretrain.data.recipe import Decoded, Recipe
from pretrain.data.shards import ShardSet

CPU = torch.device("cpu")
CROPS = CropsConfig(global_size=32, local_size=16, num_local=3)


def recipe(crops: CropsConfig, *, batch_size: int, on_device: bool) -> Recipe:
    return Recipe(crops, MaskConfig(), 0, batch_size, 0, 1, 8, on_device)


def pictures() -> list[Decoded]:
    """Noise, smooth pictures and one pixel, of different shapes."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 45, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    small = image.resize((9, 7)).resize((120, 50), Image.Resampling.BICUBIC)
    images = [image, small, image.resize((150, 210), Image.Resampling.BICUBIC), Image.new("RGB", (1, 1), "red")]
    return [Decoded(image, 0, sample) for sample, image in enumerate(images * 3)]


def both(crops: CropsConfig, target: torch.device = CPU):
    """The same images through the loader's path and through the device's."""
    found = []
    for on_device in (False, True):
        made = recipe(crops, batch_size=12, on_device=on_device).batch(3, pictures(), skipped=["k: corrupt"])
        assert isinstance(made, RawBatch) == on_device
        found.append(finish(made, target).to(CPU))
    return found


def assert_close(one, two) -> None:
    """Equal but for roundings of a step of 255 where a crop was resized, which coloring may enlarge a little."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor) and a.dtype == torch.float32:
            assert a.shape == b.shape
            if not len(a):
                continue
            steps = (a - b).abs() * torch.tensor(STD)[:, None, None] * 255
            assert steps.max() < 6, (field.name, steps.max())
            assert steps.mean() < 0.05
            assert (steps > 2).float().mean() < 1e-3
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize(
    "crops",
    [
        CROPS,
        CropsConfig(global_size=48, local_size=16, num_local=0, gram_size=96),
        CropsConfig(global_size=16, local_size=8, num_local=2, compat="reference_blur", flip=0.0),
        CropsConfig(mixed=(SizesConfig(24, 16, 48),), num_local=2),
    ],
    ids=["plain", "gram", "reference", "mixed"],
)
def test_the_batch_is_that_of_the_loader(crops):
    assert_close(*both(crops))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_batch_of_a_gpu_is_that_of_the_loader():
    assert_close(*both(CropsConfig(global_size=32, local_size=16, num_local=3, gram_size=64), torch.device("cuda")))
    made = recipe(CROPS, batch_size=12, on_device=True).batch(0, pictures(), skipped=[]).pin_memory()
    assert made.masks.is_pinned()
    assert_close(finish(made, CPU), finish(made, torch.device("cuda")).to(CPU))


@pytest.mark.parametrize(("length", "size"), [(10, 32), (31, 32), (32, 32), (100, 32), (200, 16), (1, 16), (5, 8)])
def test_resizing_is_torchvisions(length, size):
    """Every pixel within 2 of 255 of the loader's resized crop, nearly all within 1."""
    picture = torch.from_numpy(np.random.default_rng(length).integers(0, 256, (3, 210, 230), dtype=np.uint8))
    box = torch.tensor([[[7, 5, length, min(2 * length, 205)]]])
    left, top, w, h = box.flatten().tolist()
    expected = F.resized_crop(picture, top, left, h, w, [size, size], InterpolationMode.BICUBIC, antialias=True)
    found = resized_crops(picture[None].float(), box, size)
    difference = (found[0, 0] - expected).abs()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-3


def test_weights_of_a_hand_made_case():
    """Two pixels to four: centers at 1/4 and 3/4 of a pixel, Keys' cubic at distances 1/4 and 3/4."""
    found = weights(torch.tensor([[1]]), torch.tensor([[2]]), size=4, length=4)[0, 0]
    near, far = 1.5 / 64 - 2.5 / 16 + 1, 1.5 * 27 / 64 - 2.5 * 9 / 16 + 1
    beyond = -0.5 * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
    share = near / (near + beyond), near / (near + far)
    expected = [[0, share[0], 1 - share[0], 0], [0, share[1], 1 - share[1], 0]]
    torch.testing.assert_close(found[:2], torch.tensor(expected))
    torch.testing.assert_close(found, found.flip(0, 1))
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_images_of_any_size_are_grouped_within_bounds(monkeypatch):
    monkeypatch.setattr(device, "PIXELS_AT_ONCE", 1000)
    sizes = ((10, 10), (100, 5), (9, 9), (50, 50), (10, 11), (9, 8))
    groups = list(alike(sizes))
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert len(groups) >= 3
    for group in groups:
        area = max(sizes[i][0] for i in group) * max(sizes[i][1] for i in group)
        assert len(group) == 1 or len(group) * area <= 1000
    one, two = both(CROPS)
    assert_close(one, two)


def test_padding_keeps_the_images():
    pixels = torch.arange(3 * (2 * 3 + 4 * 1), dtype=torch.uint8).view(-1, 3)
    images = padded(pixels, [0, 6], [(2, 3), (4, 1)])
    assert images.shape == (2, 3, 4, 3)
    assert torch.equal(images[0, :, :2], pixels[:6].view(2, 3, 3).permute(2, 0, 1).float())
    assert torch.equal(images[1, :, :, :1], pixels[6:].view(4, 1, 3).permute(2, 0, 1).float())


def test_autocast_does_not_reach_the_crops():
    made = recipe(CROPS, batch_size=12, on_device=True).batch(0, pictures(), skipped=[])
    expected = finish(made, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = finish(made, CPU)
    assert torch.equal(found.global_crops, expected.global_crops)
    assert found.global_crops.dtype == torch.float32


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_delivers_what_the_device_finishes(num_workers):
    pool = ShardSet.open(["embedded:pool"])
    settings = {"crops": CROPS, "mask": MaskConfig(), "seed": 0, "batch_size": 6, "start_step": 2, "num_steps": 2,
                "patch_size": 8}  # fmt: skip
    plain = list(batches(pool, **settings, num_workers=0))
    raw = list(batches(pool, **settings, num_workers=num_workers, on_device=True))
    for one, two in zip(plain, raw, strict=True):
        assert isinstance(two, RawBatch)
        assert_close(finish(one, CPU), finish(two, CPU))


def test_cuts_are_whole_numbers_for_every_view():
    made = recipe(CROPS, batch_size=12, on_device=True).batch(0, pictures(), skipped=[])
    assert isinstance(made, RawBatch)
    first, second = cut_all(made)
    assert (first.shape, second.shape) == ((2, 12, 3, 32, 32), (3, 12, 3, 16, 16))
    assert first.dtype == torch.uint8
    assert (first[:, 3, 0] == 255).all()  # the red pixel
    assert (first[:, 3, 1:] == 0).all()
    assert made.colors.shape == (12, len(views(CROPS)), draw(0, 0, 0, crops=CROPS)[0, BOX_NUMBERS:].size)
