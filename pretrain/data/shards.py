"""Images in WebDataset shards, read by number.

A shard is a tar. The `.idx` that curation writes beside it says where each member lies; a tar without one (anyone's
WebDataset) is scanned once, headers only, and what was found is kept beside it, or in a folder of the run where nothing
can be written there. A sample is a key with an image; of several images the first counts.
"""

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imaging.decode import IMAGE_EXTENSIONS
from runtime.errors import UserError
from runtime.files import EMBEDDED, locate, write_table
from runtime.progress import say
from runtime.tars import group_samples, scan_tar

OPEN_FILES = 64  # shards kept open by one process


@dataclass(frozen=True)
class Shard:
    """Where the images of one tar lie."""

    path: Path
    keys: pa.StringArray
    offsets: np.ndarray  # int64, bytes
    lengths: np.ndarray  # int64, bytes


@dataclass(frozen=True)
class ShardSet:
    """All images of some shards, numbered shard by shard in tar order."""

    shards: tuple[Shard, ...]
    ends: np.ndarray  # int64, number of images up to and with each shard
    fingerprint: str  # hash of shard names, keys, offsets and lengths; not of the place
    files: dict[int, BinaryIO] = field(default_factory=dict, repr=False)  # open shards, oldest first

    @classmethod
    def open(cls, paths: Sequence[str], *, index: Path | None = None) -> "ShardSet":
        """The set behind folders, tars and globs, in the given order. Raises UserError, naming the shard at fault.

        `index` is a folder for scans of tars beside which nothing can be written.
        """
        shards = tuple(_open_shard(path, index) for path in _find_tars(paths))
        ends = np.cumsum([len(shard.keys) for shard in shards])
        if not ends[-1]:
            raise UserError(f"data.shards: no image in {', '.join(paths)}")
        return cls(shards, ends, _fingerprint(shards))

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def num_images(self) -> int:
        return len(self)

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded bytes of an image."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        row = index - int(self.ends[number]) + len(shard.keys)
        data = os.pread(self._file(number).fileno(), int(shard.lengths[row]), int(shard.offsets[row]))
        return shard.keys[row].as_py(), data

    def _file(self, number: int) -> BinaryIO:
        if number not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.pop(next(iter(self.files))).close()
            self.files[number] = self.shards[number].path.open("rb", buffering=0)
        return self.files[number]


def _find_tars(paths: Sequence[str]) -> list[Path]:
    if not paths:
        raise UserError("data.shards: empty; give WebDataset folders, tars or globs, e.g. data.shards=[out/shards]")
    tars: list[Path] = []
    for text in paths:
        path = locate(text)
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
            inside = next((sub for sub in sorted(path.glob("*/")) if any(sub.glob("*.tar"))), None)
            hint = f"did you mean {inside}?" if inside else "expected WebDataset tars (troodon curate writes them)"
        elif path.exists():
            found, hint = [path], ""
        else:
            found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            hint = (
                "braces are not expanded; use a glob such as train-*.tar" if "{" in text else "no such file or folder"
            )
        if not found:
            raise UserError(f"data.shards: no .tar in {text}\n  {hint}")
        tars += found
    return tars


def _open_shard(path: Path, folder: Path | None) -> Shard:
    index = path.with_suffix(".idx")
    table = _read_index(path, index) if index.is_file() else _scan_once(path, folder)
    keys = table["key"].to_numpy()
    endings = [extension.rpartition(".")[2] for extension in table["extension"].to_pylist()]
    images = np.flatnonzero(np.isin(endings, IMAGE_EXTENSIONS))
    first = np.ones(len(images), bool)
    first[1:] = keys[images[1:]] != keys[images[:-1]]
    rows = images[first]
    if len(table) and not len(rows):
        raise UserError(
            f"data.shards: no image in {path}; its {len(table)} members end in {', '.join(sorted(set(endings))[:5])}\n"
            f"  expected one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    offsets, lengths = table["offset"].to_numpy()[rows], table["length"].to_numpy()[rows]
    return Shard(path, pa.array(keys[rows], pa.string()), offsets, lengths)


def _read_index(path: Path, index: Path) -> pa.Table:
    """The index of a shard, which must fit the tar."""
    try:
        table = pq.read_table(index, columns=["key", "extension", "offset", "length"])
    except (pa.ArrowInvalid, OSError) as error:
        found = str(error).splitlines()[0]
        raise UserError(
            f"data.shards: {index} is no index of ours: {found}\n  remove it: the tar is scanned then"
        ) from error
    size = path.stat().st_size
    end = max((table["offset"].to_numpy() + table["length"].to_numpy()).tolist(), default=0)
    if end > size:
        raise UserError(
            f"data.shards: {path} has {size} bytes, but its index reaches to byte {end}: cut off, or not its index\n"
            f"  copy the tar again, or remove {index.name} if the tar is another one: it is scanned then"
        )
    return table


def _scan_once(path: Path, folder: Path | None) -> pa.Table:
    """`_scan` of this very state of the tar, kept beside it or else in `folder`."""
    state = path.stat()
    name = f".{path.name}.{state.st_size}-{state.st_mtime_ns}.scan"
    places = [] if path.is_relative_to(locate(EMBEDDED)) else [path.with_name(name)]  # a package stays as it is
    if folder is not None:
        places.append(folder / f"{hashlib.blake2b(str(path.absolute()).encode(), digest_size=8).hexdigest()}{name}")
    for place in places:
        if place.is_file():
            return _read_index(path, place)
    table = _scan(path)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_table(place, table)
        except OSError:
            continue  # a folder that only others may write to
        for old in place.parent.glob(f"{glob.escape(place.name.removesuffix(name))}.{glob.escape(path.name)}.*.scan"):
            if old != place:
                old.unlink(missing_ok=True)
        break
    return table


def _scan(path: Path) -> pa.Table:
    """The same table from the headers of the tar."""
    members, damage = scan_tar(path)
    if damage:
        raise UserError(f"data.shards: {path} is damaged: {damage}\n  copy it again or leave it out")
    samples, left_out = group_samples(members)
    if left_out:
        say(f"{path}: left out {len(left_out)} of {len(members)} members, first {left_out[0]}")
    rows = [member for sample in samples for member in sample]
    return pa.table(
        {
            "key": pa.array([member.key for member in rows], pa.string()),
            "extension": pa.array([member.extension for member in rows], pa.string()),
            "offset": pa.array([member.offset for member in rows], pa.int64()),
            "length": pa.array([member.length for member in rows], pa.int64()),
        }
    )


def _fingerprint(shards: Sequence[Shard]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update("\0".join([shard.path.name, *shard.keys.to_pylist()]).encode())
        digest.update(shard.offsets.tobytes() + shard.lengths.tobytes())
    return digest.hexdigest()
