"""Crops of several sizes as one sequence of tokens (DINOv2 sec. 5, "Sequence packing").

S sequences, L tokens of one sequence, T = sum of all L, D width.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

Groups = tuple[tuple[int, int], ...]  # runs of sequences of equal length: (number of sequences, their length)


def lengths_of(groups: Groups) -> Tensor:
    """The length of each sequence: int64 [S], on the CPU."""
    return torch.cat([torch.full((count,), length) for count, length in groups])


def starts_of(lengths: Tensor, device: torch.device) -> Tensor:
    """Where each sequence starts, and T: int32 [S + 1]."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)


class PackedTokens(NamedTuple):
    """Tokens of many sequences, one after the other."""

    values: Tensor  # [T, D]
    groups: Groups

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each sequence starts, and T: int32 [S + 1], on the tokens' device."""
        return starts_of(lengths_of(self.groups), self.values.device)

    @classmethod
    def from_nested(cls, nested: Tensor) -> "PackedTokens":
        """The tokens of a jagged `torch.nested` tensor [S, L of each, D], without a copy."""
        jagged: Any = nested  # its methods are missing from torch's type stubs
        if nested.layout != torch.jagged or nested.dim() != 3 or jagged.lengths() is not None:
            raise ValueError(
                f"packed tokens: found layout {nested.layout} with {nested.dim()} dimensions; expected a nested tensor "
                "[S, L, D] with layout=torch.jagged and no holes between its sequences"
            )
        lengths = jagged.offsets().diff().tolist()
        return cls(nested.values(), tuple((len(list(run)), length) for length, run in groupby(lengths)))

    def to_nested(self) -> Tensor:
        """A jagged `torch.nested` tensor [S, L of each, D] over the same memory."""
        return torch.nested.nested_tensor_from_jagged(self.values, offsets=self.cu_seqlens.long())


def pack(batches: Sequence[Tensor]) -> PackedTokens:
    """One `PackedTokens` from batches [S_i, L_i, D], in order."""
    groups = tuple((batch.shape[0], batch.shape[1]) for batch in batches)
    return PackedTokens(torch.cat([batch.flatten(0, 1) for batch in batches]), groups)


def unpack(packed: PackedTokens) -> list[Tensor]:
    """The batches [S_i, L_i, D] that `pack` was given; views, no copy."""
    parts = packed.values.split([count * length for count, length in packed.groups])
    return [part.unflatten(0, group) for part, group in zip(parts, packed.groups, strict=True)]
