"""One vector per image: decoded in worker processes, embedded here, written as unit-norm float16 parts.

N images of the stage, D width of the model, S = embed.size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from imaging.decode import Rejected, decode
from runtime.errors import UserError
from runtime.files import require_space, write_array, write_table
from runtime.progress import Progress, say
from runtime.signals import StopRequest
from runtime.world import choose_device

from .backbone import load_embedder
from .config import CurateConfig
from .hashes import content_id
from .items import read_bytes
from .pool import run_units
from .rows import Rows
from .stage import Stage


@dataclass(frozen=True)
class PixelUnit:
    """One batch of images to decode for the model."""

    part: int
    start: int  # of the batch within the part
    places: tuple[tuple[str, int, int], ...]  # source, offset, length
    ids: tuple[str, ...]
    size: int  # pixels
    max_pixels: int


def embed_stage(config: CurateConfig, rows: Rows, chosen: np.ndarray, stage: Stage, stop: StopRequest | None) -> None:
    """Embed the chosen rows (sorted int64). Parts: `part-*.npy` float16 [n, D] beside `part-*.parquet` with their rows."""
    stage.open()
    device = choose_device(config.device)
    embedder = load_embedder(config.embed, stage.folder.parent.parent, device)
    probe = embedder(torch.zeros(1, 3, config.embed.size, config.embed.size, dtype=torch.uint8, device=device))
    dim = probe.shape[1]
    require_space(stage.folder, 2 * dim * len(chosen), what="embedding")
    say(
        f"embed: {len(chosen)} images at {config.embed.size} px by {config.embed.model}, {dim} numbers each, on {device}"
    )
    size = config.source.part_size
    slices = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    waiting = [part for part in range(len(slices)) if not stage.part(part).is_file()]
    done = len(chosen) - sum(len(slices[part]) for part in waiting)
    with Progress("embed", total=len(chosen), unit="images", done=done) as progress:
        for part in waiting:  # one at a time: only the batches of a part wait in memory
            vectors = np.empty((len(slices[part]), dim), dtype=np.float16)
            units = list(_units(config, rows, slices[part], part))
            for unit, pixels in run_units(load_pixels, units, workers=config.workers, stop=stop):
                batch = torch.from_numpy(pixels).to(device)
                vectors[unit.start : unit.start + len(batch)] = embedder(batch).cpu().numpy()
                progress.advance(len(batch))
            if not np.isfinite(vectors).all():
                raise UserError(f"embed.model: {config.embed.model} gives vectors that are not finite")
            write_array(stage.part(part, "npy"), vectors)
            write_table(stage.part(part), pa.table({"row": slices[part]}))  # last: says that the part is done
    stage.finish(images=len(chosen), dim=dim)


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of N rows."""

    rows: np.ndarray  # int64 [N], sorted
    values: np.ndarray  # float32 [N, D]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some of the rows; float32 [len(rows), D]."""
        return self.values[np.searchsorted(self.rows, rows)]


def read_vectors(stage: Stage) -> Vectors:
    """The vectors of a finished stage, brought back to unit length after their rounding to float16."""
    parts = [np.load(part).astype(np.float32) for part in sorted(stage.folder.glob("part-*.npy"))]
    values = np.concatenate(parts)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Vectors(stage.table()["row"].to_numpy(), values)


def load_pixels(unit: PixelUnit) -> np.ndarray:
    """Images of a unit resized to size x size; uint8 [n, 3, size, size]. Raises UserError when a file has changed."""
    pixels = np.empty((len(unit.places), unit.size, unit.size, 3), dtype=np.uint8)
    for index, (place, item_id) in enumerate(zip(unit.places, unit.ids, strict=True)):
        try:
            data = read_bytes(*place)
            if content_id(data) != item_id:
                raise UserError(f"source: {place[0]} has changed since it was decoded; start with another out=...")
            image, _ = decode(data, max_pixels=unit.max_pixels, min_side=unit.size)
        except (OSError, Rejected) as error:
            raise UserError(f"source: {place[0]} was readable before and is not now ({error})") from None
        pixels[index] = np.asarray(image.resize((unit.size, unit.size), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _units(config: CurateConfig, rows: Rows, chosen: np.ndarray, part: int) -> Iterator[PixelUnit]:
    table = rows.table.select(["source", "offset", "length"]).take(pa.array(chosen)).to_pylist()
    places = [(place["source"], place["offset"], place["length"]) for place in table]
    for start in range(0, len(chosen), config.embed.batch_size):
        end = start + config.embed.batch_size
        yield PixelUnit(
            part=part,
            start=start,
            places=tuple(places[start:end]),
            ids=tuple(rows.ids[chosen[start:end]].tolist()),
            size=config.embed.size,
            max_pixels=config.decode.max_pixels,
        )
