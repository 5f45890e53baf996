"""What one training step of one process is fed with."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


class Tensors:
    """A dataclass of which some fields are tensors."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same in memory from which a GPU copies by itself; called by the DataLoader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change) -> Self:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        changed = {f.name: change(v) for f in fields if isinstance(v := getattr(self, f.name), Tensor)}
        return dataclasses.replace(self, **changed)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Batch(Tensors):
    """B images of this process. Crops are float32, normalised with ImageNet's mean and std."""

    global_crops: Tensor  # [2 * B, 3, G, G]; the first crop of every image, then the second
    local_crops: Tensor  # [L * B, 3, S, S]; likewise, crop by crop; 0 rows where L is 0
    masks: Tensor  # bool [2 * B, N], N patches of a global crop in row-major order; True: hidden from the student
    samples: Tensor  # int64 [B], index of each image in the data
    skipped: tuple[str, ...]  # "key: reason" of the images that could not be decoded and were replaced
    gram_crops: Tensor | None = None  # [2 * B, 3, Q, Q]: the global crops at the Gram teacher's size; None: the same
    position: tuple[int, ...] | None = None  # where a stream of remote shards stands after this batch (stream.py)

    def split(self, parts: int) -> "list[Batch]":
        """The batch as `parts` batches of B / parts images each, in order; `skipped` stays with the first.

        `parts` must divide B.
        """
        images = len(self.samples)
        if images % parts:
            raise ValueError(f"split: {images} images do not divide into {parts} parts")
        size = images // parts

        def part(crops: Tensor, start: int) -> Tensor:
            """The rows of images start .. start + size - 1 of crops [views * B, ...], view by view."""
            views = crops.view(len(crops) // images, images, *crops.shape[1:])
            return views[:, start : start + size].flatten(0, 1)

        return [
            dataclasses.replace(
                self,
                global_crops=part(self.global_crops, start),
                local_crops=part(self.local_crops, start),
                masks=part(self.masks, start),
                samples=part(self.samples, start),
                gram_crops=None if self.gram_crops is None else part(self.gram_crops, start),
                skipped=() if start else self.skipped,
            )
            for start in range(0, images, size)
        ]
