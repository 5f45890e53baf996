"""One vector per image: decoded in worker processes, embedded here, written as unit-norm float16 parts.

N images of the stage, D width of the model, S = embed.size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from runtime.environment import cores
from runtime.errors import UserError
from runtime.files import require_space, write_array, write_table
from runtime.progress import Progress, say
from runtime.signals import StopRequest
from runtime.world import choose_device

from .backbone import load_embedder
from .config import CurateConfig
from .pixels import PixelUnit, load_pixels
from .pool import run_units
from .rows import Rows
from .stage import Stage
from .threads import torch_threads


def embed_stage(config: CurateConfig, rows: Rows, chosen: np.ndarray, stage: Stage, stop: StopRequest | None) -> None:
    """Embed the chosen rows (sorted int64). Parts: float16 `part-*.npy` [n, D] beside their rows in parquet."""
    stage.open()
    device = choose_device(config.device)
    embedder = load_embedder(config.embed, Path(config.out), device)
    side = config.embed.size
    dim = embedder(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)).shape[1]
    require_space(stage.folder, 2 * dim * len(chosen), what="embedding")
    say(f"embed: {len(chosen)} images at {side} px by {config.embed.model}, {dim} numbers each, on {device.type}")
    size = config.source.part_size
    slices = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    waiting = [part for part in range(len(slices)) if not stage.part(part).is_file()]
    units = [unit for part in waiting for unit in _units(config, rows, slices[part], part)]
    open_parts: dict[int, np.ndarray] = {}
    left = {part: len(slices[part]) for part in waiting}  # images of a part still to come
    compute = max(1, cores() // 2)  # the others decode; whatever the workers, so that sums are rounded alike
    progress = Progress("embed", total=len(chosen), unit="images", done=len(chosen) - sum(left.values()))
    with torch_threads(compute), progress:
        for unit, pixels in run_units(load_pixels, units, workers=config.workers, stop=stop):
            part = open_parts.setdefault(unit.part, np.empty((len(slices[unit.part]), dim), dtype=np.float16))
            vectors = embedder(torch.from_numpy(pixels).to(device)).cpu().numpy()
            if not np.isfinite(vectors).all():
                raise UserError(f"embed.model: {config.embed.model} gives vectors that are not finite")
            part[unit.start : unit.start + len(vectors)] = vectors
            left[unit.part] -= len(vectors)
            if not left[unit.part]:
                write_array(stage.part(unit.part, "npy"), open_parts.pop(unit.part))
                write_table(stage.part(unit.part), pa.table({"row": slices[unit.part]}))  # last: the part is done
            progress.advance(len(vectors))
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
