"""Every image decoded once: its content id, verdict, size, hashes and a grey thumbnail.

Units of images run in worker processes. No image ends a run: damaged ones become rows with a reason, and one that
kills its decoder is rejected after doing so twice.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from imaging.decode import Rejected, decode
from runtime.errors import UserError
from runtime.files import require_space, write_array, write_table
from runtime.progress import Progress, say
from runtime.signals import StopRequest

from .config import CurateConfig, DecodeConfig
from .hashes import content_id, perceptual_hashes, pixel_hash
from .items import read_bytes
from .pool import run_units
from .previous import Decoded, previous_decoded
from .stage import Share, Stage

ENOUGH = 256  # pixels; large JPEGs are decoded at a reduced scale with at least this short side
THUMB = 64  # pixels per side of the thumbnails that pixel verification aligns (aspect ignored)

SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),  # content id; null where the bytes could not be read
        ("reason", pa.string()),  # why the image is rejected; null for a good one
        ("detail", pa.string()),
        ("width", pa.int32()),  # upright pixels; null for rejects
        ("height", pa.int32()),
        ("format", pa.string()),
        ("orientation", pa.int8()),
        ("frames", pa.int32()),
        ("pixel_hash", pa.string()),  # of the decoded pixels; large JPEGs at reduced scale
        ("phash", pa.uint64()),
        ("phash_mirrored", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class DecodeUnit:
    """One part of the items table, to become one part of the decode stage."""

    items: Path
    table: Path
    thumbs: Path
    config: DecodeConfig
    previous: Decoded | None = None  # what an earlier run decoded
    deadly: tuple[int, ...] = ()  # rows that ended their process twice

    @property
    def journal(self) -> Path:
        """Holds the row being decoded, so that the parent can tell which image a dead worker died of."""
        return self.table.with_suffix(".now")


def decode_stage(config: CurateConfig, items: Stage, stage: Stage, stop: StopRequest | None, share: Share) -> None:
    """Decode all items. Raises UserError when no pool image can be decoded."""
    stage.open(share)
    num_items = sum(items.report()["counts"][role] for role in ("pool", "seed", "guard"))
    require_space(stage.folder, num_items * (THUMB * THUMB + 200), what="decoding")
    previous = previous_decoded(config, stage)
    units = share.of(
        [
            DecodeUnit(part, stage.part(index), stage.part(index, "npy"), config.decode, previous)
            for index, part in enumerate(sorted(items.folder.glob("part-*.parquet")))
        ]
    )
    num_images = sum(_num_rows(unit.items) for unit in units)
    waiting = [unit for unit in units if not unit.table.is_file()]
    done = num_images - sum(_num_rows(unit.items) for unit in waiting)
    graves: dict[Path, int] = {}

    def on_death(unit: DecodeUnit) -> DecodeUnit:
        row = int(unit.journal.read_text() or -1) if unit.journal.is_file() else -1
        unit.journal.unlink(missing_ok=True)  # a process that dies before its first image must not blame this one
        twice = row >= 0 and graves.get(unit.table) == row
        graves[unit.table] = row
        return replace(unit, deadly=(*unit.deadly, row)) if twice else unit

    with Progress("decode", total=num_images, unit="images", done=done) as progress:
        for _, count in run_units(decode_unit, waiting, workers=config.workers, stop=stop, on_death=on_death):
            progress.advance(count)
    if share.whole:
        _finish(items, stage, previous)


def decode_unit(unit: DecodeUnit) -> int:
    """Write the table and thumbnails of one part; the number of its images."""
    places = pq.read_table(unit.items, columns=["source", "offset", "length"]).to_pylist()
    thumbs = np.zeros((len(places), THUMB, THUMB), dtype=np.uint8)
    rows = []
    with unit.journal.open("wb", buffering=0) as journal:
        for index, place in enumerate(places):
            os.pwrite(journal.fileno(), b"%-12d" % index, 0)
            if index in unit.deadly:
                rows.append({"reason": "corrupt", "detail": "its decoder's process died, twice"})
            else:
                rows.append(describe(place, unit.config, thumbs[index], unit.previous))
    write_array(unit.thumbs, thumbs)
    write_table(unit.table, pa.Table.from_pylist(rows, schema=SCHEMA))  # last: its presence says the part is done
    unit.journal.unlink()
    return len(rows)


def describe(place: dict, config: DecodeConfig, thumb: np.ndarray, previous: Decoded | None = None) -> dict:
    """One row of SCHEMA; fills `thumb` [THUMB, THUMB]. Bytes that `previous` holds are not decoded again."""
    try:
        data = read_bytes(place["source"], place["offset"], place["length"])
    except OSError as error:
        return {"reason": "unreadable", "detail": str(error)}
    row = {"item_id": content_id(data)}
    if previous is not None and (known := previous.look_up(row["item_id"])) is not None:
        thumb[:] = known[1]
        return known[0]
    try:
        image, header = decode(data, max_pixels=config.max_pixels, min_side=max(ENOUGH, config.min_side))
    except Rejected as error:
        return row | {"reason": error.reason, "detail": error.detail}
    row |= {
        "width": header.width,
        "height": header.height,
        "format": header.format,
        "orientation": header.orientation,
        "frames": header.frames,
    }
    if min(image.size) < config.min_side:
        return row | {
            "reason": "too small",
            "detail": f"{header.width}x{header.height}; decode.min_side={config.min_side}",
        }
    thumb[:] = np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BICUBIC))
    phash, phash_mirrored = perceptual_hashes(image)
    return row | {"pixel_hash": pixel_hash(image), "phash": phash, "phash_mirrored": phash_mirrored}


def _finish(items: Stage, stage: Stage, previous: Decoded | None) -> None:
    roles = np.array(items.table()["role"].to_pylist())
    reasons = np.array([reason or "" for reason in stage.table()["reason"].to_pylist()])
    counts: dict[str, Any] = {}
    for role in ("pool", "seed", "guard"):
        found, numbers = np.unique(reasons[roles == role], return_counts=True)
        counts[role] = {str(word) or "good": int(number) for word, number in zip(found, numbers, strict=True)}
        bad = {word: number for word, number in counts[role].items() if word != "good"}
        if bad:
            words = ", ".join(f"{number} {word}" for word, number in bad.items())
            say(f"decode: {sum(bad.values())} of {role} rejected ({words})")
        if role == "pool" and "good" not in counts[role]:
            detail = stage.table()["detail"].to_pylist()[int(np.flatnonzero(roles == role)[0])]
            raise UserError(f"source.paths: none of {sum(bad.values())} images can be used\n  the first: {detail}")
    if previous is not None:
        counts["taken_over"] = previous.count(stage.table()["item_id"].to_pylist())
        say(f"decode: {counts['taken_over']} images taken over from the previous run")
    stage.finish(**counts)


def _num_rows(path: Path) -> int:
    return pq.read_metadata(path).num_rows
