"""Vectors as they lie on disk: parts of a stage beside their tables, or anyone's `.npy` matrices.

N vectors of width D. They are mapped, not read; what is used comes as unit vectors in float32.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import UserError

from .unit_vectors import UnitVectors, map_parts

PART = re.compile(r"(part-\d+)(?:-(\w+))?\.npy")  # part-00000.npy, part-00000-copy.npy
CHUNK_BYTES = 128 * 2**20  # of float32 vectors at a time


@dataclass(frozen=True, eq=False)
class Embeddings:
    """N vectors of one model."""

    source: str  # as the user gave it
    name: str | None  # of the parts that were chosen
    files: tuple[Path, ...]
    tables: tuple[Path, ...]  # of the same rows, one beside each file; empty where there are none
    vectors: UnitVectors

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        return self.vectors.dim

    @property
    def chunk(self) -> int:
        """Vectors that are read at a time."""
        return max(1024, CHUNK_BYTES // (4 * self.dim))

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        """Unit vectors by position; float32 [n, D]. Raises UserError for zeros and for what is not a number."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = self.vectors.take(index)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            position = np.arange(len(self))[index][bad[0]]
            raise UserError(f"{self.source}: vector {position} is zero or not finite; it has no direction to compare")
        return values

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Unit vectors from `start` to `stop` in order; float32 [n, D] each."""
        end = len(self) if stop is None else min(stop, len(self))
        for begin in range(start, end, self.chunk):
            yield self.read(slice(begin, min(begin + self.chunk, end)))

    def names(self) -> pa.Array | None:
        """Names of the vectors: `item_id` of their tables, else `row`; None where there is neither."""
        for column in ("item_id", "row"):
            if self.tables and all(column in pq.read_schema(table).names for table in self.tables):
                return pa.concat_arrays(
                    [pq.read_table(table, columns=[column])[column].combine_chunks() for table in self.tables]
                )
        return None

    def identity(self) -> list[list[str | int]]:
        """What changes when the files change: name, size and time of each."""
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]


def open_embeddings(source: str, name: str | None = None) -> Embeddings:
    """The vectors of a folder or of one `.npy` file. Raises UserError.

    A folder holds parts of a curation stage (`part-00000-NAME.npy`, of which `name` chooses) or `.npy` matrices of any
    name, which follow each other in the order of their names.
    """
    path = Path(source).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _choose(source, sorted(path.glob("*.npy")), name)
    else:
        raise UserError(f"{source}: no such folder or file; give a folder with .npy parts, or one .npy matrix")
    width = None
    for file in files:
        shape = _shape(file)
        if width not in (None, shape[1]):
            raise UserError(f"{file}: vectors of {shape[1]} numbers beside others of {width} in {source}")
        width = shape[1]
    embeddings = Embeddings(source, name, tuple(files), tuple(_tables(files)), map_parts(files))
    if not len(embeddings):
        raise UserError(f"{source}: no vectors, {len(files)} empty files")
    return embeddings


def _choose(source: str, files: list[Path], name: str | None) -> list[Path]:
    """Files of one set of vectors: the parts of the name, or all files where none is a part."""
    if not files:
        raise UserError(f"{source}: no .npy file in this folder; vectors of a curation lie in OUT/stages/embed")
    parts: dict[str | None, list[Path]] = {}
    for file in files:
        if match := PART.fullmatch(file.name):
            parts.setdefault(match[2], []).append(file)
    if not parts and name is None:
        return files
    if name is None and len(parts) == 1:
        return next(iter(parts.values()))
    names = ", ".join(sorted(str(key) for key in parts if key)) or "none"
    if name is None:
        raise UserError(f"{source}: vectors of several models; choose with --vectors NAME, one of: {names}")
    if name not in parts:
        raise UserError(f"{source}: no vectors called {name!r}; there are: {names}")
    return parts[name]


def _shape(file: Path) -> tuple[int, int]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file}: not a whole .npy file ({error})") from None
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(
            f"{file}: a matrix of floats, one vector a row, was expected; found {array.dtype} {array.shape}"
        )
    return array.shape


def _tables(files: list[Path]) -> list[Path]:
    """The table beside each file, of as many rows; none where one is missing."""
    tables = [file.with_name(re.sub(r"^(part-\d+)-\w+$", r"\1", file.stem) + ".parquet") for file in files]
    if not all(table.is_file() for table in tables):
        return []
    for file, table in zip(files, tables, strict=True):
        rows, vectors = pq.read_metadata(table).num_rows, _shape(file)[0]
        if rows != vectors:
            raise UserError(f"{table}: {rows} rows beside {vectors} vectors in {file.name}")
    return tables
