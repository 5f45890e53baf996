"""What one training step of one process is fed with."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B images of this process. Crops are float32, normalised with ImageNet's mean and std."""

    global_crops: Tensor  # [2 * B, 3, G, G]; the first crop of every image, then the second
    local_crops: Tensor  # [L * B, 3, S, S]; likewise, crop by crop; 0 rows where L is 0
    masks: Tensor  # bool [2 * B, N], N patches of a global crop in row-major order; True: hidden from the student
    samples: Tensor  # int64 [B], index of each image in the shard set
    skipped: tuple[str, ...]  # "key: reason" of the images that could not be decoded and were replaced

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)
