"""WebDataset shards of original bytes: copied by offset, named by content, the same bytes on every run.

A sample is `<content id>.<extension>` and its sidecars. Beside each tar lies `.idx` (a parquet table of offsets, for
random access), beside all of them `manifest.json` with sizes and check sums.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imaging.decode import IMAGE_EXTENSIONS, Rejected, decode
from runtime.errors import UserError
from runtime.files import locate, read_json, replacing, require_space, sha256, write_json, write_table, write_text
from runtime.progress import Progress
from runtime.seeding import generator
from runtime.signals import StopRequest
from runtime.tars import Member, TarWriter, group_samples, member_header, scan_tar

from .config import CurateConfig, result_hash
from .hashes import content_id
from .items import read_bytes, read_into
from .parquet import is_address
from .pool import run_units
from .rows import Rows
from .stage import Share

VERSION = 1  # of the folder's layout
BLOCK = tarfile.BLOCKSIZE
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of formats not named like their files
NAMED_REPEATS = 10  # keys met in several shards that are named; the others are counted
CHECKSUM = b"sha256"  # of the whole tar, in the metadata of its index's schema
INDEX = pa.schema([("key", pa.string()), ("extension", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])


@dataclass(frozen=True)
class Piece:
    """Bytes to copy into a shard."""

    extension: str
    source: str
    offset: int
    length: int


@dataclass(frozen=True)
class Sample:
    """An image (first piece) and its sidecars."""

    item_id: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes in a tar: header and padding included."""
        return sum([BLOCK + -(-piece.length // BLOCK) * BLOCK for piece in self.pieces])


@dataclass(frozen=True)
class ShardUnit:
    """One shard to write."""

    path: Path  # of the tar
    samples: tuple[Sample, ...]


def write_shards(
    config: CurateConfig, rows: Rows, chosen: np.ndarray, folder: Path, *, share: Share, stop: StopRequest | None
) -> dict[int, str]:
    """Write the chosen rows as shards into `folder` and return the shard's name for each row.

    The order is shuffled by config.seed and depends on nothing but the content ids. A shard appears only when it is
    whole; those that are there already, of the same selection, are kept. A share writes its own shards into a folder
    that `claim_shards` has prepared.
    """
    units = _plan(config, rows, chosen, folder)
    if share.whole:
        _claim(folder, units)
    own = share.of(units)
    waiting = [unit for unit in own if not unit.path.with_suffix(".idx").is_file()]
    require_space(folder, sum(sample.size for unit in waiting for sample in unit.samples), what="writing shards")
    total = sum(len(unit.samples) for unit in own)
    done = total - sum(len(unit.samples) for unit in waiting)
    with Progress("shards", total=total, unit="images", done=done) as progress:
        workers = config.workers if len(waiting) > 1 else 0
        for unit, _ in run_units(write_shard, waiting, workers=workers, stop=stop):
            progress.advance(len(unit.samples))
    if share.whole:
        write_json(folder / "manifest.json", _manifest(config, units))
    names = {sample.item_id: unit.path.name for unit in units for sample in unit.samples}
    return {int(row): names[str(rows.ids[row])] for row in chosen}


def claim_shards(config: CurateConfig, rows: Rows, chosen: np.ndarray, folder: Path) -> None:
    """Make `folder` ready for shares of `write_shards`: shards of another selection are removed."""
    _claim(folder, _plan(config, rows, chosen, folder))


def _plan(config: CurateConfig, rows: Rows, chosen: np.ndarray, folder: Path) -> list[ShardUnit]:
    samples = _samples(rows, chosen)
    order = np.argsort(rows.ids[chosen])
    order = order[generator(config.seed, "shard order").permutation(len(order))]
    groups = _cut([samples[i] for i in order], config)
    return [ShardUnit(folder / f"train-{number:06d}.tar", tuple(group)) for number, group in enumerate(groups)]


def write_shard(unit: ShardUnit) -> None:
    """Write one tar and its index. Raises UserError when a source has changed since it was decoded."""
    index: tuple[list, ...] = ([], [], [], [])
    with replacing(unit.path) as temporary, temporary.open("w+b", buffering=0) as file:
        unpacked = _unpack_parquet(unit, file.fileno())
        tar = TarWriter(file.fileno())
        for sample in unit.samples:
            for number, piece in enumerate(sample.pieces):
                offset, place = tar.add(f"{sample.item_id}.{piece.extension}", piece.length)
                if unpacked and is_address(piece.source):
                    os.preadv(file.fileno(), [place], offset)
                elif _read(piece, place) != piece.length:
                    raise _changed(piece)
                if number == 0 and content_id(place) != sample.item_id:
                    raise _changed(piece)
                for column, value in zip(index, (sample.item_id, piece.extension, offset, piece.length), strict=True):
                    column.append(value)
        checksum = tar.finish()
    table = pa.table([pa.array(column) for column in index], schema=INDEX.with_metadata({CHECKSUM: checksum}))
    write_table(unit.path.with_suffix(".idx"), table)  # last: its presence says that the shard is done


def _unpack_parquet(unit: ShardUnit, descriptor: int) -> bool:
    """Put what comes from parquet files at its place in the tar, in the order of the rows; whether there is any.

    A row is read with its row group; in the shuffled order of the shard each group would be read again and again.
    """
    if not any(is_address(piece.source) for sample in unit.samples for piece in sample.pieces):
        return False
    places = []
    position = 0
    for sample in unit.samples:
        for piece in sample.pieces:
            position += len(member_header(f"{sample.item_id}.{piece.extension}", piece.length))
            if is_address(piece.source):
                places.append((piece.source, piece.offset, position, piece))
            position += -(-piece.length // BLOCK) * BLOCK
    for _, _, position, piece in sorted(places, key=lambda place: place[:3]):
        data = memoryview(bytearray(piece.length))
        if _read(piece, data) != piece.length:
            raise _changed(piece)
        os.pwrite(descriptor, data, position)
    return True


def _read(piece: Piece, place: memoryview) -> int:
    """Bring the bytes of a piece to their place; how many there were."""
    try:
        return read_into(place, piece.source, piece.offset)
    except OSError as error:
        raise UserError(f"source: {piece.source} was readable before and is not now ({error})") from None


def _changed(piece: Piece) -> UserError:
    return UserError(f"source: {piece.source} has changed since it was decoded; start with another out=...")


def inspect_shards(paths: Sequence[str]) -> dict[str, Any]:
    """What tars or folders of tars hold, ours or anyone's.

    Keys: shards, indexed (those with an .idx), samples, bytes, members by extension, repeated_keys (samples whose key
    an earlier shard has), problems (one line each).
    """
    tars = _tars(paths)
    indexed = sum(tar.with_suffix(".idx").is_file() for tar in tars)
    summary: dict[str, Any] = {"shards": len(tars), "indexed": indexed, "samples": 0, "bytes": 0}
    members_by_extension: Counter[str] = Counter()
    problems: list[str] = []
    first_seen: dict[str, Path] = {}
    repeated = 0
    for tar in tars:
        members, problem = scan_tar(tar)
        samples, lines = group_samples(members)
        summary["samples"] += len(samples)
        summary["bytes"] += tar.stat().st_size
        members_by_extension.update(member.extension for member in members)
        problems += [f"{tar.name}: {line}" for line in ([problem] if problem else []) + lines]
        for sample in samples:
            other = first_seen.setdefault(sample[0].key, tar)
            if other is not tar:
                repeated += 1
                if repeated <= NAMED_REPEATS:
                    problems.append(f"{tar.name}: {sample[0].key}: in {other.name} too")
    if repeated > NAMED_REPEATS:
        problems.append(f"and {repeated - NAMED_REPEATS} more samples whose key is in an earlier shard")
    members = dict(sorted(members_by_extension.items()))
    return summary | {"members": members, "repeated_keys": repeated, "problems": problems}


def index_shards(paths: Sequence[str]) -> Iterator[tuple[Path, str, bool]]:
    """Write an .idx beside each tar that has none, so that training reads it by offset: (tar, what was done, fine).

    An index that is there is compared with the tar and left alone. A tar that is cut off gets none: training would
    take it for whole.
    """
    for tar in _tars(paths):
        members, problem = scan_tar(tar)
        index = tar.with_suffix(".idx")
        if problem:
            yield tar, f"no index written: {problem}", False
            continue
        samples, left_out = group_samples(members)
        kept = [member for sample in samples for member in sample]
        table = index_table(kept)
        if index.is_file():
            fits = _same_index(index, table)
            found = (
                "has its index" if fits else f"{index.name} does not describe it; remove that to have it written anew"
            )
            yield tar, found, fits
            continue
        write_table(index, table)
        more = f", {len(left_out)} members left out, first {left_out[0]}" if left_out else ""
        yield tar, f"indexed: {len(samples)} samples{more}", True


def index_table(members: Sequence[Member]) -> pa.Table:
    """The index of a tar with these members."""
    columns = {name: [getattr(member, name) for member in members] for name in INDEX.names}
    return pa.table(columns, schema=INDEX)


def _same_index(index: Path, table: pa.Table) -> bool:
    try:
        return pq.read_table(index, columns=INDEX.names).cast(INDEX).equals(table)
    except (pa.ArrowException, OSError):
        return False


def verify_shards(folder: Path) -> list[str]:
    """Problems of a shard folder of ours, one line each; none when every check sum, offset and image is right."""
    if not (folder / "manifest.json").is_file():
        raise UserError(f"shards: no manifest.json in {folder}; `troodon shards inspect` reads anyone's tars")
    manifest = read_json(folder / "manifest.json")
    if manifest["version"] != VERSION:
        raise UserError(f"shards: {folder} has version {manifest['version']}; this program reads {VERSION}")
    problems = []
    seen: set[str] = set()
    for entry in manifest["shards"]:
        tar = folder / entry["name"]
        problems += [f"{entry['name']}: {line}" for line in _verify_shard(tar, entry, seen)]
    extra = {path.name for path in folder.glob("*.tar")} - {entry["name"] for entry in manifest["shards"]}
    return problems + [f"{name}: not in manifest.json" for name in sorted(extra)]


def _verify_shard(tar: Path, entry: dict[str, Any], seen: set[str]) -> list[str]:
    index = tar.with_suffix(".idx")
    if not tar.is_file() or not index.is_file():
        return ["missing" if not tar.is_file() else "its .idx is missing"]
    problems = []
    if sha256(tar) != entry["sha256"]:
        problems.append("check sum differs from manifest.json")
    if sha256(index) != entry["index_sha256"]:
        problems.append("check sum of its .idx differs from manifest.json")
    members, problem = scan_tar(tar)
    if problem:
        problems.append(problem)
    listed = [Member(r["key"], r["extension"], f"{r['key']}.{r['extension']}", r["offset"], r["length"])
              for r in pq.read_table(index).to_pylist()]  # fmt: skip
    if listed != members:
        return [*problems, "its .idx does not describe it"]
    samples, lines = group_samples(members)
    if len(samples) != entry["samples"]:
        problems.append(f"{len(samples)} samples, manifest.json says {entry['samples']}")
    return problems + lines + [line for sample in samples for line in _verify_sample(tar, sample, seen)]


def _verify_sample(tar: Path, sample: tuple[Member, ...], seen: set[str]) -> list[str]:
    image = next((member for member in sample if member.extension in IMAGE_EXTENSIONS), None)
    if image is None:
        return [f"{sample[0].key}: no image"]
    if image.key in seen:
        return [f"{image.key}: in two shards"]
    seen.add(image.key)
    data = read_bytes(str(tar), image.offset, image.length)
    if content_id(data) != image.key:
        return [f"{image.key}: its bytes are not those of its name"]
    try:
        decode(data, min_side=1)
    except Rejected as error:
        return [f"{image.key}: {error}"]
    return []


def _samples(rows: Rows, chosen: np.ndarray) -> list[Sample]:
    """What to copy for each chosen row."""
    columns = ["item_id", "extension", "source", "offset", "length", "format", "sidecars"]
    samples = []
    for place in rows.table.select(columns).take(pa.array(chosen)).to_pylist():
        extension, format = str(place["extension"]), str(place["format"])
        if extension not in IMAGE_EXTENSIONS:  # a file without an extension
            extension = EXTENSIONS.get(format, format.lower())
        image = Piece(extension, place["source"], place["offset"], place["length"])
        samples.append(Sample(place["item_id"], (image, *(Piece(**sidecar) for sidecar in place["sidecars"]))))
    return samples


def _cut(samples: Sequence[Sample], config: CurateConfig) -> list[list[Sample]]:
    """The samples of each shard, in order."""
    groups: list[list[Sample]] = []
    size = 0
    for sample in samples:
        more = sample.size
        full = groups and (size + more > config.shards.max_bytes or len(groups[-1]) >= config.shards.max_samples)
        if full or not groups:
            groups.append([])
            size = 0
        groups[-1].append(sample)
        size += more
    return groups


def _claim(folder: Path, units: Sequence[ShardUnit]) -> None:
    """Make the folder that of this selection: shards of another one are removed."""
    selection = [[sample.item_id for sample in unit.samples] for unit in units]
    text = hashlib.sha256(json.dumps(selection).encode()).hexdigest()
    claim = folder / ".selection"
    if claim.is_file() and claim.read_text() == text:
        return
    for stale in [*folder.glob("train-*.tar"), *folder.glob("train-*.idx"), *folder.glob("manifest.json")]:
        stale.unlink()
    write_text(claim, text)


def _manifest(config: CurateConfig, units: Sequence[ShardUnit]) -> dict[str, Any]:
    shards = [
        {
            "name": unit.path.name,
            "samples": len(unit.samples),
            "bytes": unit.path.stat().st_size,
            "sha256": _checksum(unit.path),
            "index_sha256": sha256(unit.path.with_suffix(".idx")),
        }
        for unit in units
    ]
    return {
        "version": VERSION,
        "samples": sum(len(unit.samples) for unit in units),
        "shards": shards,
        "config_hash": result_hash(config),
        "provenance": {"tool": "troodon curate", "sources": sorted(config.source.paths), "seed": config.seed},
    }


def _checksum(tar: Path) -> str:
    """SHA-256 of a shard, as its writer left it in the index."""
    metadata = pq.read_schema(tar.with_suffix(".idx")).metadata or {}
    return metadata[CHECKSUM].decode() if CHECKSUM in metadata else sha256(tar)


def _tars(paths: Sequence[str]) -> list[Path]:
    tars: list[Path] = []
    for path in paths:
        place = locate(path)
        if not place.exists():
            raise UserError(f"shards: no file or folder {path}")
        found = sorted(place.glob("*.tar")) if place.is_dir() else [place]
        if not found:
            raise UserError(f"shards: no .tar in {path}")
        tars += found
    return tars
