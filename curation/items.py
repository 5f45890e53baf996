"""Where every image lies: folders, tars and parquet files listed; nothing is decoded and nothing copied.

An item is one image file, one sample of a tar or one row of a parquet file. Items are ordered by (role, source, key),
so nothing that follows depends on the order in which sources are given or folders are read.
"""

import glob
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa

from imaging.decode import IMAGE_EXTENSIONS
from runtime.errors import UserError
from runtime.files import locate, write_table
from runtime.progress import say
from runtime.tars import group_samples, scan_tar

from . import parquet
from .config import CurateConfig
from .sources import Source, parse_source, parse_sources
from .stage import Stage

Role = Literal["pool", "seed", "guard"]

# Files beside an image of the same name that travel with it into the shards.
SIDECARS = ("json", "txt", "cls", "caption")
OPEN_FILES = 64  # that a process keeps open for reading

PLACE = pa.struct([("extension", pa.string()), ("source", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("set", pa.string()),  # seed set or evaluation set: the top-level subfolder, or the folder itself
        ("source", pa.string()),  # the file's path, or that of the tar or parquet file
        ("key", pa.string()),  # path below the given folder, the sample's key in the tar, or the row, 8 digits
        ("extension", pa.string()),  # lower case, of the image's name
        ("offset", pa.int64()),  # bytes into `source`; of a parquet file the row
        ("length", pa.int64()),  # bytes
        ("sidecars", pa.list_(PLACE)),
        ("source_name", pa.string()),  # of the entry in source.paths, seeds.paths or guard.paths
    ]
)


@dataclass
class Listing:
    """What lies in the given paths."""

    rows: list[dict] = field(default_factory=list)  # one per item, keys as in SCHEMA
    problems: list[str] = field(default_factory=list)  # damaged tars, samples without image, failed downloads
    others: int = 0  # files that are neither image, nor sidecar, nor tar, nor parquet
    tables: list[str] = field(default_factory=list)  # parquet files of something else
    seen: set[Path] = field(default_factory=set)  # resolved, so that a file reached twice counts once


def list_items(config: CurateConfig) -> tuple[pa.Table, list[str]]:
    """The items table (SCHEMA) and what was left out, one line each. Raises UserError for paths without images."""
    rows: list[dict] = []
    problems: list[str] = []
    groups: tuple[tuple[Role, str, tuple[str, ...]], ...] = (
        ("pool", "source.paths", config.source.paths),
        ("seed", "seeds.paths", config.seeds.paths),
        ("guard", "guard.paths", config.guard.paths),
    )
    if not config.source.paths:
        raise UserError(
            "source.paths: empty; give the folders or tars with your images, e.g. source.paths=[/my/images]"
        )
    for role, name, paths in groups:
        listing = Listing()
        # Names of seed and evaluation sets decide nothing, so many of them may be called "val".
        for source in parse_sources(name, paths) if role == "pool" else map(parse_source, paths):
            first = len(listing.rows)
            _list_path(source, role, f"{name}: {source.path}", listing)
            for row in listing.rows[first:]:
                row["source_name"] = source.name
        if paths and not listing.rows:
            damaged = "".join(f"; {line}" for line in (listing.problems + listing.tables)[:1])
            raise UserError(
                f"{name}: no image in {', '.join(paths)} ({listing.others} other files{damaged})\n"
                f"  looked for tars, parquet files and .{' .'.join(IMAGE_EXTENSIONS)}, in subfolders too"
            )
        rows += listing.rows
        problems += listing.problems
    rows.sort(key=lambda row: (row["role"], row["source"], row["key"]))
    return pa.Table.from_pylist(rows, schema=SCHEMA), sorted(problems)


def items_stage(config: CurateConfig, stage: Stage, table: pa.Table, problems: list[str]) -> None:
    """Write the listing in parts of `source.part_size` rows."""
    size = config.source.part_size
    for index, start in enumerate(range(0, len(table), size)):
        write_table(stage.part(index), table.slice(start, size))
    for line in problems[:5]:
        say(f"items: {line}")
    if len(problems) > 5:
        say(f"items: and {len(problems) - 5} more of this kind, in {stage.folder / 'done.json'}")
    roles = table["role"].to_pylist()
    names = Counter(name for name, role in zip(table["source_name"].to_pylist(), roles, strict=True) if role == "pool")
    stage.finish(
        **{role: roles.count(role) for role in ("pool", "seed", "guard")},
        sources=dict(sorted(names.items())),  # pool images of each source
        bytes=sum(table["length"].to_pylist()),
        problems=problems,
    )


def read_bytes(source: str, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset`, fewer where it has become shorter; of a parquet file what its row holds.

    Raises OSError.
    """
    if parquet.is_address(source):
        return parquet.read_row(_locate(source), offset)
    file = _open(_locate(source))
    data = os.pread(file.descriptor, length, offset)
    while len(data) < length and (more := os.pread(file.descriptor, length - len(data), offset + len(data))):
        data += more  # one call reads 2 GB at most
    return data


def read_into(place: memoryview, source: str, offset: int) -> int:
    """Fill `place` like `read_bytes`, without a copy; the number of bytes that were there. Raises OSError."""
    if parquet.is_address(source):
        data = parquet.read_row(_locate(source), offset)
        place[: len(data)] = data[: len(place)]
        return len(data)
    file = _open(_locate(source))
    done = os.preadv(file.descriptor, [place], offset)
    while done < len(place) and (more := os.preadv(file.descriptor, [place[done:]], offset + done)):
        done += more
    return done


class _OpenFile:
    """A descriptor that is closed when nobody holds it any more, so that a full cache closes none that is in use."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _open(path: str) -> _OpenFile:
    """A file open for reading, from the cache unless it was replaced since. Raises OSError."""
    status = os.stat(path)
    return _open_stamped(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=OPEN_FILES)
def _open_stamped(path: str, stamp: tuple[int, int, int]) -> _OpenFile:
    return _OpenFile(path)


@lru_cache(maxsize=1024)
def _locate(source: str) -> str:
    return str(locate(source))


def _list_path(source: Source, role: Role, where: str, listing: Listing) -> None:
    path = source.path
    place = locate(path)
    if place.is_dir():
        for parent, folders, names in os.walk(place):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files = [Path(parent) / name for name in sorted(names) if not name.startswith(".")]
            _list_files(path.rstrip("/"), place, files, role, listing)
    elif place.is_file():
        _list_files(os.path.dirname(path), place.parent, [place], role, listing)
    else:
        found = sorted(glob.glob(str(place), recursive=True))
        if not found:
            raise UserError(f"{where}: no such folder, tar or file")
        for match in found:
            _list_path(Source(source.name, match), role, where, listing)


def _list_files(base: str, folder: Path, files: list[Path], role: Role, listing: Listing) -> None:
    """Items among the files of one directory at or below `folder`, which tables call `base`."""
    sidecars: dict[str, list[Path]] = {}
    for file in files:
        if _extension(file) in SIDECARS:
            sidecars.setdefault(file.stem, []).append(file)
    for file in files:
        extension = _extension(file)
        if extension in SIDECARS or file.resolve() in listing.seen:
            continue
        listing.seen.add(file.resolve())
        key = file.relative_to(folder).as_posix()
        if not file.is_file():
            listing.problems.append(f"{os.path.join(base, _printable(key))}: link to nothing")
        elif extension in ("tar", "tar.gz", "tgz"):
            _list_tar(os.path.join(base, key), file, role, listing)
        elif extension == "parquet":
            _list_parquet(os.path.join(base, _printable(key)), file, role, listing)
        elif extension == "" or extension in IMAGE_EXTENSIONS:
            row = {"role": role, "set": key.split("/")[0] if "/" in key else folder.name, "key": _printable(key)}
            beside = [_place(base, folder, side) for side in sidecars.get(file.stem, [])]
            listing.rows.append({**row, **_place(base, folder, file), "sidecars": beside})
        else:
            listing.others += 1


def _place(base: str, folder: Path, file: Path) -> dict:
    source = os.path.join(base, _printable(file.relative_to(folder).as_posix()))
    return {"extension": _extension(file), "source": source, "offset": 0, "length": file.stat().st_size}


def _extension(file: Path) -> str:
    return "tar.gz" if file.name.endswith(".tar.gz") else file.suffix[1:].lower()


def _printable(name: str) -> str:
    """File names need not be UTF-8, tables must; such a file is then reported as unreadable under this name."""
    return name.encode("utf-8", "backslashreplace").decode()


def _list_tar(source: str, file: Path, role: Role, listing: Listing) -> None:
    members, problem = scan_tar(file)
    samples, problems = group_samples(members)
    listing.problems += [f"{source}: {line}" for line in ([problem] if problem else []) + problems]
    for sample in samples:
        image = next((member for member in sample if member.extension in IMAGE_EXTENSIONS), None)
        if image is None:
            listing.problems.append(
                f"{source}: {sample[0].key}: no image among .{' .'.join(m.extension for m in sample)}"
            )
            continue
        listing.rows.append(
            {
                "role": role,
                "set": Path(source).stem,
                "source": source,
                "key": image.key,
                "extension": image.extension,
                "offset": image.offset,
                "length": image.length,
                "sidecars": [
                    {"extension": m.extension, "source": source, "offset": m.offset, "length": m.length}
                    for m in sample
                    if m is not image
                ],
            }
        )


def _list_parquet(source: str, file: Path, role: Role, listing: Listing) -> None:
    rows, problems, other = parquet.list_rows(file)
    listing.problems += [f"{source}: {line}" for line in problems]
    if other is not None:
        listing.others += 1
        listing.tables.append(f"{source}: {other}")
    for row in rows:
        sidecar = {"extension": "json", "source": source + parquet.JSON, "offset": row.row}
        listing.rows.append(
            {
                "role": role,
                "set": Path(source).stem,
                "source": source,
                "key": f"{row.row:08d}",
                "extension": row.extension,
                "offset": row.row,
                "length": row.length,
                "sidecars": [sidecar | {"length": row.sidecar_length}] if row.sidecar_length else [],
            }
        )
