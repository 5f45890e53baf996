"""Unit vectors as the joins read them: float16 parts mapped from disk (or arrays in memory), never all in float32.

N vectors of width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class UnitVectors:
    """N vectors of unit length up to the rounding of their parts to float16 (as stage embed writes them)."""

    parts: tuple[np.ndarray, ...]  # float16 or float32 [n, D] each, all of one width; may be memory maps
    chosen: np.ndarray | None = None  # int64 [N], positions in the parts one after the other; none: all

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of the first vector of each part, and of the end; int64 [len(parts) + 1]."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    @property
    def dim(self) -> int:
        return self.parts[0].shape[1]

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.chosen is None else len(self.chosen)

    def stored(self, index: slice | np.ndarray) -> np.ndarray:
        """Vectors as stored; [n, D]. A slice of one part is not copied."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            if self.chosen is not None:
                return self.stored_at(self.chosen[start:stop])
            first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
            cuts = [
                self.parts[p][max(0, start - self.starts[p]) : stop - self.starts[p]] for p in range(first, last + 1)
            ]
            return cuts[0] if len(cuts) == 1 else np.concatenate(cuts or [self.parts[0][:0]])
        return self.stored_at(index if self.chosen is None else self.chosen[index])

    def stored_at(self, position: np.ndarray) -> np.ndarray:
        """Vectors at positions in the parts (int64 [n]), as stored; [n, D]."""
        if len(self.parts) == 1:
            return np.take(self.parts[0], position, axis=0)
        order = np.argsort(position, kind="stable")
        ascending = position[order]
        cuts = np.searchsorted(ascending, self.starts)
        result = np.empty((len(position), self.dim), dtype=self.parts[0].dtype)
        for p in np.flatnonzero(np.diff(cuts)):
            here = slice(cuts[p], cuts[p + 1])
            result[order[here]] = np.take(self.parts[p], ascending[here] - self.starts[p], axis=0)
        return result

    def take(self, index: slice | np.ndarray) -> np.ndarray:
        """Vectors in float32, brought back to unit length; [n, D]."""
        values = self.stored(index).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return values


def as_vectors(values: np.ndarray | UnitVectors) -> UnitVectors:
    """An array [N, D] of unit vectors in memory, or what is UnitVectors already."""
    return values if isinstance(values, UnitVectors) else UnitVectors((values,))


def map_parts(files: Sequence[Path], chosen: np.ndarray | None = None) -> UnitVectors:
    """The vectors of `.npy` parts, mapped; `chosen` as in UnitVectors."""
    # Copy on write: nothing writes, but torch warns of arrays that it could not write to.
    parts: list[Any] = [np.load(file, mmap_mode="c") for file in files]
    return UnitVectors(tuple(parts), chosen)
