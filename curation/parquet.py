"""Parquet files that hold images: a row is an item, its number is the item's offset, nothing is copied.

Read as Hugging Face `datasets` writes them (a column of structs `bytes` and `path`), or with a plain binary column, as
img2dataset's `output_format=parquet` does. The other columns of a row become its JSON sidecar, which is addressed as
`FILE.parquet#json` with the same row number. Rows are read by row group; a process keeps the last few row groups, so
that work in the order of the rows reads each of them once.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imaging.decode import IMAGE_EXTENSIONS
from imaging.sniff import DAMAGED_SIGNATURES

SUFFIX = ".parquet"
JSON = "#json"  # after a parquet file's name: the row's other columns instead of its image
BATCH = 256  # rows listed at a time: their images pass through the memory
GROUPS = 2  # row groups that a process keeps; a worker's memory holds this many
PREFERRED = ("image", "img", "picture", "photo", *IMAGE_EXTENSIONS)  # names of binary columns that hold images
METADATA = {"url", "key", "status"}  # columns of the table that img2dataset writes beside each of its shards


@dataclass(frozen=True)
class Layout:
    """Which columns of a file are what."""

    column: str  # holds the images
    nested: bool  # a struct of `bytes` and perhaps `path`, as Hugging Face writes it
    has_path: bool
    others: tuple[str, ...]  # columns for the sidecar

    @property
    def image_leaf(self) -> str:
        return f"{self.column}.bytes" if self.nested else self.column

    @property
    def sidecar_leaves(self) -> list[str]:
        return [*self.others, *([f"{self.column}.path"] if self.has_path else [])]


@dataclass(frozen=True)
class ImageRow:
    """One row with an image."""

    row: int
    extension: str  # lower case; "" where neither the row's path nor the column's name tells
    length: int  # bytes of the image
    sidecar_length: int  # bytes of the JSON sidecar; 0: none


@lru_cache(maxsize=1024)
def is_address(source: str) -> bool:
    """Whether a source of an item or of a sidecar is (in) a parquet file."""
    return source.removesuffix(JSON).endswith(SUFFIX)


def list_rows(path: Path) -> tuple[list[ImageRow], list[str], str | None]:
    """The rows with an image; what was left out, one line each; and what a table that is of something else holds.

    Reads the file once, `BATCH` rows at a time. A table without images that looks like img2dataset's account of its
    downloads gives no rows, and a line with its failures.
    """
    try:
        with pq.ParquetFile(path) as file:
            layout = find_layout(file)
            if layout is not None:
                return *_list(file, layout), None
            names = file.schema_arrow.names
            if set(names) >= METADATA:
                problem = _downloads(path, file)
                return [], [problem] if problem else [], "img2dataset's table"
            return [], [], f"no column of images among {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    except (pa.ArrowException, OSError) as error:
        return [], [f"not readable as parquet: {str(error).splitlines()[0]}"], None


def find_layout(file: pq.ParquetFile) -> Layout | None:
    """Which column holds the images: a struct of bytes first, then a binary column by name, then by its first bytes."""
    schema = file.schema_arrow
    structs = [field for field in schema if pa.types.is_struct(field.type) and _is_image_struct(field.type)]
    binaries = sorted(
        (field for field in schema if _is_binary(field.type)),
        key=lambda field: PREFERRED.index(field.name.lower()) if field.name.lower() in PREFERRED else len(PREFERRED),
    )
    if structs:
        chosen = structs[0]
    else:
        named = [field for field in binaries if field.name.lower() in PREFERRED]
        chosen = next(iter(named), None) or next((field for field in binaries if _starts_like_image(file, field)), None)
        if chosen is None:
            return None
    nested = pa.types.is_struct(chosen.type)
    has_path = nested and chosen.type.get_field_index("path") >= 0
    others = tuple(field.name for field in schema if field is not chosen and not _holds_binary(field.type))
    return Layout(chosen.name, nested, has_path, others)


def read_row(source: str, row: int) -> bytes:
    """An image of a file, or the JSON sidecar of a row (`FILE.parquet#json`). Raises OSError."""
    path = source.removesuffix(JSON)
    stamp = _stamp(path)
    try:
        _, ends = _open(path, stamp)
        group = int(np.searchsorted(ends, row, side="right"))
        if row < 0 or group == len(ends):
            raise OSError(f"{path}: no row {row} in a file of {ends[-1] if len(ends) else 0} rows")
        first = int(ends[group - 1]) if group else 0
        if source.endswith(JSON):
            return _as_json(_read_group(path, stamp, group, "sidecar").slice(row - first, 1).to_pylist()[0])
        return _read_group(path, stamp, group, "image").column(0)[row - first].as_py() or b""
    except pa.ArrowException as error:
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def _list(file: pq.ParquetFile, layout: Layout) -> tuple[list[ImageRow], list[str]]:
    rows: list[ImageRow] = []
    empty: Counter[str] = Counter()
    start = 0
    has_status = "status" in layout.others
    for batch in file.iter_batches(BATCH, columns=[layout.image_leaf, *layout.sidecar_leaves], use_threads=False):
        lengths = pc.binary_length(_images(batch, layout)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        values_of = _sidecars(batch, layout).to_pylist() if layout.sidecar_leaves else [{}] * len(lengths)
        for index, (length, values) in enumerate(zip(lengths, values_of, strict=True)):
            if length is None:
                empty[str(values["status"]) if has_status else "no bytes"] += 1
                continue
            rows.append(ImageRow(start + index, _extension(layout, values), length, len(_as_json(values))))
        start += len(lengths)
    if not empty:
        return rows, []
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(empty.items()))
    return rows, [f"{empty.total()} of {start} rows without image ({kinds})"]


def _images(table: Any, layout: Layout) -> Any:
    """The column of image bytes of a table or batch."""
    column = table.column(layout.column)
    return pc.struct_field(column, "bytes") if layout.nested else column  # pyright: ignore[reportAttributeAccessIssue]


def _sidecars(table: Any, layout: Layout) -> Any:
    """The columns of the sidecars of a table or batch, the image's struct reduced to its path."""
    names = [
        name for name in table.schema.names if name in layout.others or (layout.has_path and name == layout.column)
    ]
    table = table.select(names)
    if not layout.has_path:
        return table
    path = pc.struct_field(table.column(layout.column), "path")  # pyright: ignore[reportAttributeAccessIssue]
    return table.set_column(names.index(layout.column), layout.column, path)


def _as_json(values: dict[str, Any]) -> bytes:
    """A row's other columns as JSON, the image's own path under the name of its column; empty when all are null."""
    if all(value is None for value in values.values()):
        return b""
    return json.dumps(_plain(values), ensure_ascii=False, default=str).encode()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _extension(layout: Layout, values: dict[str, Any]) -> str:
    path = values.get(layout.column) if layout.has_path else None
    found = PurePosixPath(path).suffix[1:].lower() if isinstance(path, str) else layout.column.lower()
    return found if found in IMAGE_EXTENSIONS else ""


def _downloads(path: Path, file: pq.ParquetFile) -> str:
    """What img2dataset's account of a shard tells beyond its images; empty when all is well."""
    status = Counter(str(word) for word in file.read(columns=["status"])["status"].to_pylist())
    failed = {word: count for word, count in sorted(status.items()) if word != "success"}
    missing = "" if path.with_suffix(".tar").is_file() or path.with_suffix("").is_dir() else "; its tar is missing"
    if not failed:
        return f"img2dataset's table{missing}" if missing else ""
    kinds = ", ".join(f"{count} {word}" for word, count in failed.items())
    return f"img2dataset did not get {sum(failed.values())} of {status.total()} images ({kinds}){missing}"


def _is_binary(type: pa.DataType) -> bool:
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _is_image_struct(type: pa.StructType) -> bool:
    index = type.get_field_index("bytes")
    return index >= 0 and _is_binary(type.field(index).type)


def _holds_binary(type: pa.DataType) -> bool:
    inner = [type.field(index).type for index in range(type.num_fields)]
    return _is_binary(type) or pa.types.is_fixed_size_binary(type) or any(map(_holds_binary, inner))


def _starts_like_image(file: pq.ParquetFile, field: pa.Field) -> bool:
    for batch in file.iter_batches(16, columns=[field.name], use_threads=False):
        for value in batch.column(0).drop_null().to_pylist():
            wrapped = value[:4] == b"RIFF" and value[8:12] == b"WEBP"
            return wrapped or value[:2] == b"BM" or value.startswith(tuple(DAMAGED_SIGNATURES))
    return False


def _stamp(path: str) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)
def _open(path: str, stamp: tuple[int, int, int]) -> tuple[Layout, np.ndarray]:
    """Layout of a file, and the number of rows up to and with each of its row groups. Raises OSError."""
    with pq.ParquetFile(path) as file:
        layout = find_layout(file)
        if layout is None:
            raise OSError(f"{path}: no column of images")
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return layout, np.cumsum(counts, dtype=np.int64)


@lru_cache(maxsize=2 * GROUPS)
def _read_group(path: str, stamp: tuple[int, int, int], group: int, what: str) -> pa.Table:
    """The image column of a row group, or the columns of its sidecars."""
    layout, _ = _open(path, stamp)
    with pq.ParquetFile(path) as file:
        if what == "image":
            table = file.read_row_group(group, columns=[layout.image_leaf], use_threads=False)
            return pa.table({"image": _images(table, layout)})
        return _sidecars(file.read_row_group(group, columns=layout.sidecar_leaves, use_threads=False), layout)
