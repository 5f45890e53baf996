"""Crops of several sizes as one sequence of tokens (DINOv2 sec. 5, "Sequence packing").

S sequences, L tokens of one sequence, T = sum of all L, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedTokens(NamedTuple):
    """Tokens of many sequences, one after the other. A NamedTuple, so that FSDP2's hooks find the tensor in it."""

    values: Tensor  # [T, D]
    groups: tuple[tuple[int, int], ...]  # runs of sequences of equal length: (number of sequences, their length)

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each sequence starts, and T: int32 [S + 1], on the tokens' device."""
        lengths = torch.cat([torch.full((count,), length) for count, length in self.groups])
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(self.values.device, torch.int32)


def pack(batches: Sequence[Tensor]) -> PackedTokens:
    """One `PackedTokens` from batches [S_i, L_i, D], in order."""
    groups = tuple((batch.shape[0], batch.shape[1]) for batch in batches)
    return PackedTokens(torch.cat([batch.flatten(0, 1) for batch in batches]), groups)


def unpack(packed: PackedTokens) -> list[Tensor]:
    """The batches [S_i, L_i, D] that `pack` was given; views, no copy."""
    parts = packed.values.split([count * length for count, length in packed.groups])
    return [part.unflatten(0, group) for part, group in zip(parts, packed.groups, strict=True)]
