"""Vectors of every image: decoded once in worker processes, embedded here by each model, written as unit-norm float16.

N images of the stage, D width of a model, S the side of its square input. The copy model's vectors find near-duplicates
and leaks, the retrieval model's the neighbours of seeds; where both are one model it runs once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from runtime.environment import cores
from runtime.errors import UserError
from runtime.files import require_space, write_array, write_table
from runtime.progress import Progress, say
from runtime.signals import StopRequest
from runtime.world import choose_device

from .backbone import Embedder, load_embedder, model_identity
from .config import CopyModelConfig, CurateConfig, RetrievalModelConfig, active_methods
from .pixels import PixelUnit, load_pixels
from .pool import run_units
from .previous import KnownVectors, previous_vectors
from .rows import Rows
from .stage import Share, Stage
from .threads import torch_threads
from .threshold import exact_cosines
from .unit_vectors import UnitVectors, map_parts

Purpose = Literal["copy", "retrieval"]


def embedders(config: CurateConfig) -> dict[Purpose, CopyModelConfig | RetrievalModelConfig]:
    """The models that this config needs: one where nothing is retrieved, or where one serves both purposes."""
    copy, retrieval = config.embed.copy, config.embed.retrieval
    if not active_methods(config) or (copy.model, copy.size) == (retrieval.model, retrieval.size):
        return {"copy": copy}
    return {"copy": copy, "retrieval": retrieval}


def identities(config: CurateConfig) -> dict[Purpose, str]:
    """What the vectors of each model depend on besides the pixels."""
    out = Path(config.out)
    return {p: model_identity(spec.model, out, key=f"embed.{p}.model") for p, spec in embedders(config).items()}


def embed_stage(
    config: CurateConfig, rows: Rows, chosen: np.ndarray, stage: Stage, stop: StopRequest | None, share: Share
) -> None:
    """Embed the chosen rows (sorted int64).

    Parts: float16 `part-*-copy.npy` and `part-*-retrieval.npy` [n, D] beside their rows in parquet.
    """
    stage.open(share)
    device = choose_device(config.device)
    models: dict[Purpose, Embedder] = {
        purpose: load_embedder(spec.model, spec.size, Path(config.out), device, key=f"embed.{purpose}.model")
        for purpose, spec in embedders(config).items()
    }
    sizes = tuple(sorted({model.size for model in models.values()}))
    dims: dict[Purpose, int] = {purpose: model.dim for purpose, model in models.items()}
    require_space(stage.folder, 2 * sum(dims.values()) * len(chosen), what="embedding")
    for purpose, model in models.items():
        name = embedders(config)[purpose].model
        say(f"embed: {purpose} vectors by {name} at {model.size} px, {dims[purpose]} numbers each, on {device.type}")
    taken: dict[Purpose, KnownVectors] = {
        purpose: previous_vectors(config, rows.ids[chosen].tolist(), purpose, weights)
        for purpose, weights in (identities(config).items() if config.previous else ())
    }
    known: dict[Purpose, np.ndarray] = {p: taken[p][0] if p in taken else np.zeros(len(chosen), bool) for p in models}
    new = ~np.logical_and.reduce(list(known.values()))  # needs a model
    size = config.source.part_size
    starts = range(0, len(chosen), size)
    own = share.of(range(len(starts)))
    waiting = [part for part in own if not stage.part(part).is_file()]
    at = {part: starts[part] + np.flatnonzero(new[starts[part] : starts[part] + size]) for part in waiting}
    units = [unit for part in waiting for unit in _units(config, rows, chosen[at[part]], part, sizes)]
    open_parts: dict[int, dict[Purpose, np.ndarray]] = {}
    left = {part: len(at[part]) for part in waiting}  # images of a part still to come

    def open_part(part: int) -> dict[Purpose, np.ndarray]:
        """Vectors of a part, those taken over in their places."""
        here = slice(starts[part], min(starts[part] + size, len(chosen)))
        count = here.stop - here.start
        arrays: dict[Purpose, np.ndarray] = {p: np.empty((count, dim), np.float16) for p, dim in dims.items()}
        for purpose, (mask, read) in taken.items():
            old = np.flatnonzero(mask[here])
            if len(old):
                arrays[purpose][old] = read(old + here.start)
        return arrays

    def close_part(part: int, arrays: dict[Purpose, np.ndarray]) -> None:
        for purpose, vectors in arrays.items():
            write_array(_part(stage, part, purpose), vectors)
        rows_of_part = chosen[starts[part] : starts[part] + size]
        write_table(stage.part(part), pa.table({"row": rows_of_part}))  # last: the part is done

    for part in waiting:
        if not left[part]:
            close_part(part, open_part(part))
    total = sum(int(new[starts[part] : starts[part] + size].sum()) for part in own)
    compute = max(1, cores() // 2)  # the others decode; whatever the workers, so that sums are rounded alike
    progress = Progress("embed", total=total, unit="images", done=total - sum(left.values()))
    with torch_threads(compute), progress:
        for unit, pixels in run_units(load_pixels, units, workers=config.workers, stop=stop):
            if unit.part not in open_parts:
                open_parts[unit.part] = open_part(unit.part)
            where = at[unit.part][unit.start : unit.start + len(unit.ids)]
            for purpose, model in models.items():
                if known[purpose][where].all():
                    continue
                vectors = model(torch.from_numpy(pixels[model.size]).to(device)).cpu().numpy()
                if not np.isfinite(vectors).all():
                    name = embedders(config)[purpose].model
                    raise UserError(f"embed.{purpose}.model: {name} gives vectors that are not finite")
                fresh = ~known[purpose][where]
                open_parts[unit.part][purpose][where[fresh] - starts[unit.part]] = vectors[fresh]
            left[unit.part] -= len(unit.ids)
            if not left[unit.part]:
                close_part(unit.part, open_parts.pop(unit.part))
            progress.advance(len(unit.ids))
    if share.whole:
        over = {"taken_over": {purpose: int(mask.sum()) for purpose, mask in known.items()}} if config.previous else {}
        stage.finish(images=len(chosen), dim=dims, **over)


@dataclass(frozen=True, eq=False)
class Embedded:
    """The vectors of a finished stage embed, mapped."""

    rows: np.ndarray  # int64 [N], sorted
    vectors: UnitVectors  # of these rows

    @staticmethod
    def open(stage: Stage, purpose: Purpose) -> "Embedded":
        """Retrieval reads the copy vectors where one model serves both purposes."""
        parts = sorted(stage.folder.glob(f"part-*-{purpose}.npy")) or sorted(stage.folder.glob("part-*-copy.npy"))
        return Embedded(stage.table()["row"].to_numpy(), map_parts(parts))

    def of(self, rows: np.ndarray) -> UnitVectors:
        """Vectors of some of the rows."""
        return UnitVectors(self.vectors.parts, np.searchsorted(self.rows, rows))

    def cosines(self, pairs: np.ndarray) -> np.ndarray:
        """Cosines of pairs of the rows (int64 [E, 2]); float32 [E]."""
        return exact_cosines(self.vectors, self.vectors, np.searchsorted(self.rows, pairs))


def _part(stage: Stage, index: int, purpose: Purpose) -> Path:
    return stage.folder / f"part-{index:05d}-{purpose}.npy"


def _units(
    config: CurateConfig, rows: Rows, chosen: np.ndarray, part: int, sizes: tuple[int, ...]
) -> Iterator[PixelUnit]:
    table = rows.table.select(["source", "offset", "length"]).take(pa.array(chosen)).to_pylist()
    places = [(place["source"], place["offset"], place["length"]) for place in table]
    for start in range(0, len(chosen), config.embed.batch_size):
        end = start + config.embed.batch_size
        yield PixelUnit(
            part=part,
            start=start,
            places=tuple(places[start:end]),
            ids=tuple(rows.ids[chosen[start:end]].tolist()),
            sizes=sizes,
            max_pixels=config.decode.max_pixels,
        )
