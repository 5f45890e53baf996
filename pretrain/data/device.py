"""Crops of a whole batch cut and colored on the device that trains (`train.augment_on: device`).

Loader processes then only decode: they deliver the images as they are, with the boxes and random numbers of their
crops. A resized crop is a product with two banded matrices, one per axis, whose rows are the weights of the antialiased
bicubic filter; so all crops of many images of any size are a few batched products. The filter, its limits to the box
and the rounding to bytes after each axis are torchvision's, to within one step of 255 (tests hold both paths to it).

B images, C views of an image, V views of one size, n images at once, H and W pixels of the largest of them, S pixels
a side of a crop.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .augment import color_all, kinds, views
from .batch import Batch, Tensors
from .config import CropsConfig

PIXELS_AT_ONCE = 2**22  # of images padded to one size; with the weights and products a pixel takes some 100 bytes
CUBIC = -0.5  # Keys' cubic filter, as Pillow and torchvision take it for antialiasing


@dataclass(frozen=True)
class RawBatch(Tensors):
    """B decoded images and what their crops are made by."""

    pixels: Tensor  # uint8 [pixels of all images, 3], image by image, row by row
    sizes: tuple[tuple[int, int], ...]  # height and width of each image
    boxes: Tensor  # int64 [B, C, 4]; left, top, width and height of each crop
    colors: np.ndarray  # float64 [B, C, COLOR_NUMBERS], for `recolor`
    crops: CropsConfig  # with the sizes of this step
    masks: Tensor  # this and what follows as in Batch
    samples: Tensor
    skipped: tuple[str, ...]
    position: tuple[int, ...] | None = None


def finish(batch: Batch | RawBatch, device: torch.device) -> Batch:
    """The batch on the device, its crops cut and colored there if they are not yet."""
    batch = batch.to(device)
    if isinstance(batch, Batch):
        return batch
    recipe = views(batch.crops)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        made = [
            color_all(cuts.flatten(0, 1), batch.colors[:, which], [recipe[i] for i in which])
            for cuts, (which, _) in zip(cut_all(batch), kinds(batch.crops), strict=True)
        ]
    return Batch(
        global_crops=made[0],
        local_crops=made[1],
        gram_crops=made[2] if batch.crops.gram_size else None,
        masks=batch.masks,
        samples=batch.samples,
        skipped=batch.skipped,
        position=batch.position,
    )


def cut_all(batch: RawBatch) -> list[Tensor]:
    """The crops, uint8 [V, B, 3, S, S], of the global views, the local ones and, if any, the Gram teacher's."""
    count, groups = len(batch.sizes), kinds(batch.crops)
    results = [batch.pixels.new_empty(len(which), count, 3, size, size) for which, size in groups]
    starts = np.cumsum([0, *(height * width for height, width in batch.sizes)])[:-1]
    for chosen in alike(batch.sizes):
        rows = torch.tensor(chosen).to(batch.pixels.device, non_blocking=True)
        images = padded(batch.pixels, [int(starts[i]) for i in chosen], [batch.sizes[i] for i in chosen])
        boxes = batch.boxes[rows]  # [n, C, 4]
        for (which, size), out in zip(groups, results, strict=True):
            if which:
                part = boxes[:, which.start : which.stop]
                out[:, rows] = resized_crops(images, part, size).byte()
    return results


def alike(sizes: tuple[tuple[int, int], ...]) -> Iterator[list[int]]:
    """The numbers of the images in groups of similar size, so that little is padded and memory is bounded."""
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        height, width = (max(sizes[j][axis] for j in [*group, i]) for axis in (0, 1))
        if group and (len(group) + 1) * height * width > PIXELS_AT_ONCE:
            yield group
            group = []
        group.append(i)
    yield group


def padded(pixels: Tensor, starts: list[int], sizes: list[tuple[int, int]]) -> Tensor:
    """Images, float32 [n, 3, H, W], from rows of `pixels`; what lies outside an image is any pixel."""
    table = torch.tensor([starts, [height for height, _ in sizes], [width for _, width in sizes]])
    start, heights, widths = table.to(pixels.device, non_blocking=True)[:, :, None, None]  # [n, 1, 1] each
    y = torch.arange(max(height for height, _ in sizes), device=pixels.device)[:, None]
    x = torch.arange(max(width for _, width in sizes), device=pixels.device)
    where = start + torch.minimum(y, heights - 1) * widths + torch.minimum(x, widths - 1)  # [n, H, W]
    return pixels[where].permute(0, 3, 1, 2).float()


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops, float32 [V, n, 3, S, S] of whole numbers, of images [n, 3, H, W] at boxes [n, V, 4]."""
    count, _, height, width = images.shape
    num = boxes.shape[1]
    left, top, w, h = boxes.unbind(-1)
    across = weights(left, w, size=size, length=width).flatten(1, 2)  # [n, V * S, W]
    down = weights(top, h, size=size, length=height).flatten(0, 1)  # [n * V, S, H]
    rows = _bytes(images.flatten(1, 2) @ across.mT)  # [n, 3 * H, V * S]
    rows = rows.view(count, 3, height, num, size).permute(0, 3, 2, 1, 4)  # [n, V, H, 3, S]
    crops = _bytes(down @ rows.reshape(count * num, height, 3 * size))  # [n * V, S, 3 * S]
    return crops.view(count, num, size, 3, size).permute(1, 0, 3, 2, 4)


def weights(starts: Tensor, lengths: Tensor, *, size: int, length: int) -> Tensor:
    """What each of `length` pixels gives to each of `size` new ones: float32 [n, V, S, length], rows of sum 1.

    Bicubic with antialiasing over the pixels starts .. starts + lengths - 1 ([n, V] each), as if there were no others.
    """
    starts, lengths = starts[..., None, None].float(), lengths[..., None, None].float()
    step = lengths / size
    pixel = torch.arange(length, device=starts.device) + 0.5 - starts  # [n, V, 1, length], from the box's edge
    center = (torch.arange(size, device=starts.device)[:, None] + 0.5) * step
    x = ((pixel - center) / step.clamp_min(1)).abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
    values = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    values = torch.where((pixel > 0) & (pixel < lengths), values, 0.0)
    return values / values.sum(-1, keepdim=True)


def _bytes(values: Tensor) -> Tensor:
    """Values as a picture of bytes would hold them."""
    return values.round_().clamp_(0, 255)
