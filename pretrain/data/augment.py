"""Multi-crop augmentation (DINOv2; `dinov2/data/augmentations.py` of the reference repository).

Two global and L local views of an image: random resized crop (bicubic), flip, color jitter, gray, blur, solarize, with
the published probabilities. The reference code gives the blur the opposite probability by mistake (its global view 1 is
never blurred), and the released models were trained so: `crops.compat=reference_blur` does the same.

The Gram teacher of DINOv3 (sec. 4.3) may see the global crops at a size of its own: the same boxes, flips and colors.

What happens to a view follows from its row of uniform random numbers, so drawing, cutting and coloring are apart:
cutting is per image (torchvision on uint8), coloring is for many crops at once (color.py).

C views of an image (2 + L, and 2 more for the Gram teacher), V of them of one size, B images, n crops, S pixels a side.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from runtime.seeding import generator

from . import color
from .config import CropsConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB

ATTEMPTS = 10  # at a box inside the image, as torchvision's RandomResizedCrop
ASPECT = (3 / 4, 4 / 3)  # width / height of a box
BLUR = {"none": (1.0, 0.1, 0.5), "reference_blur": (0.0, 0.9, 0.5)}  # of the first, second and local views
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.8, 0.4, 0.4, 0.2, 0.1
GRAY = 0.2
SIGMA = (0.1, 2.0)  # pixels of the crop

BOX_NUMBERS = 2 * ATTEMPTS + 2  # area and aspect of each attempt, then the place
COLOR_NUMBERS = 14
# Pixels of crops colored together: enough to be fast, few enough to stay in a processor's cache or a GPU's memory.
PIXELS_AT_ONCE, PIXELS_AT_ONCE_ON_DEVICE = 2**17, 2**23


@dataclass(frozen=True)
class View:
    """How one view of an image is made."""

    size: int  # pixels
    scale: tuple[float, float]  # share of the image's area
    flip: float  # probability, as the next two
    blur: float
    solarize: float


def views(crops: CropsConfig) -> tuple[View, ...]:
    """Two global views, the local ones, and the global ones once more where the Gram teacher has its own size."""
    blur = BLUR[crops.compat]
    first = View(crops.global_size, crops.global_scale, crops.flip, blur[0], solarize=0.0)
    second = View(crops.global_size, crops.global_scale, crops.flip, blur[1], solarize=0.2)
    local = View(crops.local_size, crops.local_scale, crops.flip, blur[2], solarize=0.0)
    gram = [replace(view, size=crops.gram_size) for view in (first, second) if crops.gram_size]
    return first, second, *[local] * crops.num_local, *gram


def kinds(crops: CropsConfig) -> list[tuple[range, int]]:
    """Which of the views have one size, and that size: the global, the local and, if any, the Gram teacher's."""
    end = 2 + crops.num_local
    found = [(range(2), crops.global_size), (range(2, end), crops.local_size)]
    return [*found, (range(end, end + 2), crops.gram_size)] if crops.gram_size else found


def sizes_of_step(crops: CropsConfig, *, seed: int, step: int) -> CropsConfig:
    """`crops` with the sizes of one step: drawn from `mixed` by their probabilities, the same ones on every process.

    DINOv3 app. C. Without `mixed` the sizes are those of `crops`.
    """
    if not crops.mixed:
        return crops
    ends = np.cumsum([sizes.probability for sizes in crops.mixed])
    drawn = generator(seed, "sizes", step).random() * ends[-1]
    sizes = crops.mixed[int(np.searchsorted(ends, drawn, side="right"))]
    return replace(
        crops, global_size=sizes.global_size, local_size=sizes.local_size, gram_size=sizes.gram_size, mixed=()
    )


def min_side(crops: CropsConfig) -> int:
    """Short side (pixels) from which on no crop of an image as wide as high is enlarged; for draft decoding of JPEG."""
    return max(math.ceil(view.size / math.sqrt(view.scale[0] * ASPECT[0])) for view in views(crops))


def draw(seed: int, epoch: int, sample: int, *, crops: CropsConfig) -> np.ndarray:
    """The uniform random numbers [C, BOX_NUMBERS + COLOR_NUMBERS] that decide over the views of one sample."""
    numbers = generator(seed, "crops", epoch, sample).random((2 + crops.num_local, BOX_NUMBERS + COLOR_NUMBERS))
    return np.concatenate([numbers, numbers[:2]]) if crops.gram_size else numbers


def cut(image: Image.Image, numbers: np.ndarray, views: tuple[View, ...]) -> list[Tensor]:
    """The crops (uint8 [3, S, S]) of an RGB image, one for each view and row of `numbers` [C, BOX_NUMBERS]."""
    pixels = F.pil_to_tensor(image)  # [3, H, W] with channels innermost, for which torchvision resizes fastest
    height, width = pixels.shape[1:]
    crops = []
    for row, view in zip(numbers.tolist(), views, strict=True):
        left, top, w, h = box(row, width=width, height=height, scale=view.scale)
        size = [view.size, view.size]
        crops.append(F.resized_crop(pixels, top, left, h, w, size, InterpolationMode.BICUBIC, antialias=True))
    return crops


def box(numbers: list[float], *, width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels of a random part of an image (Szegedy et al. 2015, as in torchvision)."""
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for i in range(ATTEMPTS):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * numbers[2 * i])
        aspect = math.exp(low + (high - low) * numbers[2 * i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = numbers[2 * ATTEMPTS : BOX_NUMBERS]
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def color_all(crops: Tensor, numbers: np.ndarray, views: Sequence[View]) -> Tensor:
    """Crops of some views of one size (uint8 [V * B, 3, S, S], view by view), colored: float32, likewise.

    `numbers` [B, V, COLOR_NUMBERS] decide over each crop. Views that are alike are colored together.
    """
    out = torch.empty(crops.shape, device=crops.device)
    count, first = len(numbers), 0
    for view, alike in groupby(views):
        last = first + len(list(alike))
        part = slice(first * count, last * count)
        recolor(crops[part], numbers[:, first:last].swapaxes(0, 1).reshape(-1, COLOR_NUMBERS), view, out=out[part])
        first = last
    return out


def recolor(crops: Tensor, numbers: np.ndarray, view: View, *, out: Tensor) -> None:
    """Write crops of one kind (uint8 [n, 3, S, S]) flipped, colored and normalised to `out` (float32 [n, 3, S, S]).

    `numbers` [n, COLOR_NUMBERS] decide over each crop.
    """
    pixels = PIXELS_AT_ONCE if crops.device.type == "cpu" else PIXELS_AT_ONCE_ON_DEVICE
    at_once = max(1, pixels // view.size**2)
    for start in range(0, len(crops), at_once):
        part = slice(start, start + at_once)
        _recolor(out[part], crops[part], numbers[part], view)


def _recolor(images: Tensor, crops: Tensor, numbers: np.ndarray, view: View) -> None:
    """`recolor` of a few crops, written to `images`."""
    flip, jitter, gray, blur, solarize, sigma = numbers[:, :6].T
    torch.div(crops, 255, out=images)
    _change(images, flip < view.flip, lambda chosen, _: chosen.flip(-1))
    _jitter(images, jitter < JITTER, order=numbers[:, 6:10].argsort(1), strengths=numbers[:, 10:14])
    _change(images, gray < GRAY, lambda chosen, _: color.gray(chosen).expand_as(chosen))
    _change(images, blur < view.blur, color.blur, SIGMA[0] + (SIGMA[1] - SIGMA[0]) * sigma)
    _change(images, solarize < view.solarize, lambda chosen, _: color.solarize(chosen))
    mean, std = torch.tensor([MEAN, STD]).to(images.device, non_blocking=True)[:, :, None, None]
    images.sub_(mean).div_(std)


def _jitter(images: Tensor, chosen: np.ndarray, *, order: np.ndarray, strengths: np.ndarray) -> None:
    """Brightness, contrast, saturation and hue in each crop's own order [n, 4]; strengths [n, 4] are 0 to 1."""
    steps = (
        (color.brightness, 1 + BRIGHTNESS * (2 * strengths[:, 0] - 1)),
        (color.contrast, 1 + CONTRAST * (2 * strengths[:, 1] - 1)),
        (color.saturation, 1 + SATURATION * (2 * strengths[:, 2] - 1)),
        (color.hue, HUE * (2 * strengths[:, 3] - 1)),
    )
    for place in order.T:
        for i, (function, values) in enumerate(steps):
            _change(images, chosen & (place == i), function, values)


def _change(images: Tensor, chosen: np.ndarray, function, values: np.ndarray | None = None) -> None:
    """Replace the chosen images by `function(images, values)` of them."""
    index = np.flatnonzero(chosen)
    if len(index):
        # Without non_blocking each of these small copies would wait until a GPU has done all it was given before.
        move = functools.partial(Tensor.to, device=images.device, non_blocking=True)
        strengths = None if values is None else move(torch.from_numpy(values[index]).float())
        rows = move(torch.from_numpy(index)) if len(index) < len(images) else slice(None)
        images[rows] = function(images[rows], strengths)
