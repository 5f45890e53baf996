"""Decoded images to the batch of a step: crops, cut and colored here or left to the device, and masks.

B images of a process, C views of an image, N patches of a global crop.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from .augment import BOX_NUMBERS, box, color_all, cut, draw, kinds, min_side, sizes_of_step, views
from .batch import Batch
from .config import CropsConfig, MaskConfig
from .device import RawBatch
from .masks import draw_masks


@dataclass(frozen=True)
class Decoded:
    """An image that has its place in a batch."""

    image: Image.Image  # RGB
    epoch: int  # of the data that it comes from
    sample: int  # index in the data


@dataclass(frozen=True)
class Recipe:
    """How the images of a step become a batch; a function of the step and the images, on any process."""

    crops: CropsConfig
    mask: MaskConfig
    seed: int
    batch_size: int  # over all ranks
    rank: int
    world_size: int
    patch_size: int
    on_device: bool = False  # crops are cut and colored by `device.finish`

    @property
    def slots(self) -> np.ndarray:
        """This rank's part [B] of the places of a global batch."""
        size = self.batch_size // self.world_size
        return np.arange(size) + self.rank * size

    def min_side(self, step: int) -> int:
        """Pixels that the short side of an image needs at this step."""
        return min_side(sizes_of_step(self.crops, seed=self.seed, step=step))

    def batch(
        self, step: int, images: Iterable[Decoded], *, skipped: list[str], position: tuple[int, ...] | None = None
    ) -> Batch | RawBatch:
        """The batch of `step`; `images` gives one for each slot, and may add to `skipped` on the way."""
        crops = sizes_of_step(self.crops, seed=self.seed, step=step)
        make = self._raw if self.on_device else self._finished
        return make(crops, images, masks=self._masks(step, crops), skipped=skipped, position=position)

    def _finished(self, crops: CropsConfig, images: Iterable[Decoded], *, masks, skipped, position) -> Batch:
        recipe = views(crops)
        samples, pixels, numbers = [], [], []
        for each in images:
            drawn = draw(self.seed, each.epoch, each.sample, crops=crops)
            pixels.append(cut(each.image, drawn[:, :BOX_NUMBERS], recipe))
            numbers.append(drawn[:, BOX_NUMBERS:])
            samples.append(each.sample)

        colors = np.stack(numbers)  # [B, C, COLOR_NUMBERS]
        made = []
        for which, size in kinds(crops):
            cuts = [row[i] for i in which for row in pixels]
            stacked = torch.stack(cuts) if cuts else torch.empty(0, 3, size, size, dtype=torch.uint8)
            made.append(color_all(stacked, colors[:, which], [recipe[i] for i in which]))
        return Batch(
            global_crops=made[0],
            local_crops=made[1],
            gram_crops=made[2] if crops.gram_size else None,
            masks=masks,
            samples=torch.tensor(samples),
            skipped=tuple(skipped),
            position=position,
        )

    def _raw(self, crops: CropsConfig, images: Iterable[Decoded], *, masks, skipped, position) -> RawBatch:
        recipe = views(crops)
        samples, pixels, boxes, colors = [], [], [], []
        for each in images:
            drawn = draw(self.seed, each.epoch, each.sample, crops=crops)
            width, height = each.image.size
            rows = zip(drawn[:, :BOX_NUMBERS].tolist(), recipe, strict=True)
            boxes.append([box(row, width=width, height=height, scale=view.scale) for row, view in rows])
            colors.append(drawn[:, BOX_NUMBERS:])
            pixels.append(F.pil_to_tensor(each.image).permute(1, 2, 0))  # [H, W, 3]
            samples.append(each.sample)
        return RawBatch(
            pixels=torch.cat([image.reshape(-1, 3) for image in pixels]),
            sizes=tuple((image.shape[0], image.shape[1]) for image in pixels),
            boxes=torch.tensor(boxes),
            colors=np.stack(colors),
            crops=crops,
            masks=masks,
            samples=torch.tensor(samples),
            skipped=tuple(skipped),
            position=position,
        )

    def _masks(self, step: int, crops: CropsConfig) -> Tensor:
        """Masks [2 * B, N] of this rank's global crops; those of all ranks are numbered first crops, then second."""
        side = crops.global_size // self.patch_size
        numbers = np.concatenate([self.slots, self.batch_size + self.slots])
        return draw_masks(
            self.seed, step, num_crops=2 * self.batch_size, crops=numbers, grid=(side, side), config=self.mask
        )
