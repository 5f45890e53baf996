"""The items and what decoding found, side by side: the table every later stage reads.

A row number is an image's name within a run; the order of rows is fixed by (role, source, key).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .items import Role
from .stage import Stage


@dataclass(frozen=True)
class Rows:
    """Columns of all N items of a run as arrays."""

    table: pa.Table  # items.SCHEMA and decoding.SCHEMA side by side
    role: np.ndarray  # str [N]
    good: np.ndarray  # bool [N]: decoded and large enough
    ids: np.ndarray  # str [N]: content ids; "" where unreadable
    area: np.ndarray  # int64 [N], pixels; 0 for rejects
    num_bytes: np.ndarray  # int64 [N]
    phash: np.ndarray  # uint64 [N, 2]: of the image and of its mirror image

    def of(self, role: Role) -> np.ndarray:
        """Row numbers of the good images of a role; int64."""
        return np.flatnonzero(self.good & (self.role == role))

    @property
    def aspect(self) -> np.ndarray:
        """Width / height; float32 [N], 1 for rejects."""
        width, height = (_ints(self.table[name]) for name in ("width", "height"))
        return np.where(height > 0, width / np.maximum(height, 1), 1.0).astype(np.float32)


def read_rows(items: Stage, decode: Stage) -> Rows:
    """Join two finished stages by their order."""
    table = items.table()
    for column in (decoded := decode.table()).column_names:
        table = table.append_column(column, decoded[column])
    return Rows(
        table=table,
        role=np.array(table["role"].to_pylist()),
        good=np.array([reason is None for reason in table["reason"].to_pylist()]),
        ids=np.array([item or "" for item in table["item_id"].to_pylist()]),
        area=_ints(table["width"]) * _ints(table["height"]),
        num_bytes=_ints(table["length"]),
        phash=np.stack([_ints(table[name], np.uint64) for name in ("phash", "phash_mirrored")], axis=1),
    )


def thumb_files(decode: Stage) -> list[Path]:
    """The arrays of grey thumbnails of the decode stage, in row order."""
    return sorted(decode.folder.glob("part-*.npy"))


def read_thumbs(files: Sequence[Path], rows: np.ndarray) -> np.ndarray:
    """Grey thumbnails of some rows; uint8 [len(rows), 64, 64]. files: `thumb_files` of the decode stage."""
    arrays = [np.load(file, mmap_mode="r") for file in files]
    starts = np.cumsum([0] + [len(array) for array in arrays])
    thumbs = np.empty((len(rows), *arrays[0].shape[1:]), dtype=np.uint8)
    part = np.searchsorted(starts, rows, side="right") - 1
    for index in np.unique(part):
        chosen = part == index
        thumbs[chosen] = arrays[index][rows[chosen] - starts[index]]
    return thumbs


def _ints(column: pa.ChunkedArray, dtype: type = np.int64) -> np.ndarray:
    return column.fill_null(0).to_numpy().astype(dtype)
