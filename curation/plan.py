"""What a curation will take, before it is run: units, memory of a task, time and disk of every stage.

The sources are listed, so counts are real; everything later is counted as if no image fell out, so it is an upper
bound. Rates are measured here on a few of the images, in seconds; nothing is written.
"""

import hashlib
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from runtime.environment import cores
from runtime.files import human_bytes, read_json
from runtime.world import choose_device

from .backbone import load_embedder
from .config import CurateConfig, in_order
from .decoding import THUMB, describe
from .embed import embedders
from .inputs import checked_items
from .items import read_bytes
from .pixels import PixelUnit, load_pixels
from .planner import plan_join
from .retrieve import selects
from .scoring import UNIT
from .selection import memory_bytes
from .threads import torch_threads
from .verify import verify_pairs

SAMPLE = 24  # images measured
PAIRS = 64  # compared
BATCH = 16  # images embedded at most
ITEM = 2_000  # bytes of an item while sources are listed and while the tables of a stage are held
PICTURE = 20  # bytes per pixel while a picture with transparency is decoded and put on white; measured
WORKER = 150_000_000  # bytes of a worker process without torch
SPECTRUM = 60_000_000  # bytes of one thread that compares pictures
PAIR = 64  # bytes of a candidate pair while tables of them are joined


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    stage: str
    units: int  # of work that can be shared out; 1 for a stage that is done in one piece
    count: int  # images or pairs
    what: str  # "images" or "pairs"
    memory: int  # bytes of one task at most, interpreter included
    formula: str  # of the memory
    seconds: float | None  # on this machine with config.workers; None where nothing is known
    basis: str  # of the seconds
    disk: int  # bytes written at most


@dataclass(frozen=True)
class Measured:
    """Rates of this machine on some of the images."""

    listing: float  # seconds that it took to list the sources
    decode: float  # images per second of one core, first pass
    pixels: float | None  # images per second of one core, decoded for the models
    embed: float | None  # images per second through the models; None where a model does not exist yet
    dims: dict[str, int]  # numbers per vector of each model; empty where one does not exist yet
    weights: int  # bytes of the models
    sizes: tuple[int, ...]  # pixels, of the models' inputs
    verify: float | None  # pairs per second of one core, or of the GPU
    copy: float  # bytes per second read and summed by one core
    base: int  # bytes of this process, with the libraries and models loaded


def plan(config: CurateConfig) -> list[StagePlan]:
    """The plan of all stages that this config has work for. Raises UserError as `curate` does for wrong input."""
    config = in_order(config)
    start = time.monotonic()
    table, _ = checked_items(config)
    return plan_stages(config, table, measure(config, table, time.monotonic() - start))


def plan_stages(config: CurateConfig, table: pa.Table, rates: Measured) -> list[StagePlan]:
    """The plan from the items table (items.SCHEMA) and the rates of this machine."""
    roles = np.array(table["role"].to_pylist())
    lengths = table["length"].to_numpy()
    num, pool, guard = len(roles), int((roles == "pool").sum()), int((roles == "guard").sum())
    pool_bytes = int(lengths[roles == "pool"].sum()) + 1024 * pool
    workers = max(1, config.workers)
    busy = min(workers, cores())
    comparing = 1 if choose_device(config.device).type == "cuda" else busy
    rows = ITEM * num
    base = rates.base
    part, units = config.source.part_size, -(-num // config.source.part_size)
    before = _Before(Path(config.out))
    stages: list[StagePlan] = []

    def add(
        stage: str,
        units: int,
        count: int,
        memory: int,
        formula: str,
        seconds: tuple[float | None, str],
        disk: int,
        what: str = "images",
    ) -> None:
        stages.append(StagePlan(stage, units, count, what, base + memory, f"process + {formula}", *seconds, disk))

    add("items", 1, num, rows, "items x 2 KB", (rates.listing, "just measured"), table.nbytes)
    add(
        "decode",
        units,
        num,
        workers * (WORKER + PICTURE * config.decode.max_pixels + part * THUMB * THUMB) + rows,
        "workers x (process + decode.max_pixels x 20 B + source.part_size x 4 KB) + items x 2 KB",
        (num / (rates.decode * busy), f"measured: {rates.decode:.0f} images/s per core"),
        num * (THUMB * THUMB + 200),
    )
    held = "items x 2 KB"
    add("exact", 1, pool, rows + SPECTRUM * workers, f"{held} + workers x 60 MB", before.seconds("exact"), 20 * pool)
    if _needs_training(config):
        basis = "depends on bootstrap.train; its raw shards hold the pool once more"
        add("bootstrap", 1, pool, rows, "what the training takes", (None, basis), pool_bytes)
    pixels = sum(3 * size * size for size in rates.sizes)
    dims = sum(rates.dims.values()) or 384
    add(
        "embed",
        units,
        num,
        rates.weights
        + workers * WORKER
        + (2 * workers + 1) * config.embed.batch_size * pixels
        + 2 * dims * part
        + rows,
        "models + workers x process + (2 workers + 1) batches of pixels + part x width x 2 B + items x 2 KB",
        _embedding(rates, num, busy),
        num * (2 * dims + 16),
    )
    join = plan_join(
        pool,
        rates.dims.get("copy", 384),
        device=choose_device(config.device),
        memory_budget=config.dedup.join_memory,
        seconds_budget=config.dedup.join_seconds,
        asked=config.dedup.join,
    )
    stated = f"{join.method}, by the planner's stated rates; without the evaluation sets"
    add("index", 1, pool, join.memory_bytes + rows, f"join plan ({join.method}) + {held}", before.seconds("index"), 0)
    pairs, basis = before.pairs(config, pool, guard)
    memory = join.memory_bytes + rows + PAIR * pairs
    formula = f"join plan ({join.method}) + {held} + pairs x 64 B"
    add("join", join.num_units, pool, memory, formula, (join.seconds, stated), 40 * pairs)
    if config.dedup.verify:
        speed = None if rates.verify is None else pairs / (rates.verify * comparing)
        said = (
            "no images to measure with"
            if rates.verify is None
            else f"measured: {rates.verify:.0f} pairs/s per core or GPU"
        )
        formula = f"workers x 60 MB + {held} + pairs x 64 B; {basis}"
        memory = SPECTRUM * workers + rows + PAIR * pairs
        add("verify", -(-pairs // UNIT), pairs, memory, formula, (speed, f"{said}"), 24 * pairs, "pairs")
    add("dedup", 1, pool, rows + PAIR * pairs, f"{held} + pairs x 64 B", before.seconds("dedup"), 24 * pairs)
    if config.guard.paths:
        add("guard", 1, guard, rows + PAIR * pairs, f"{held} + pairs x 64 B", before.seconds("guard"), 24 * pairs)
    if selects(config):
        add(
            "retrieve",
            1,
            pool,
            rows + memory_bytes(config, pool, dims),
            f"{held} + k-means training vectors + blocks of vectors",
            before.seconds("retrieve"),
            0,
        )
    size = min(config.shards.max_bytes, max(1, pool_bytes))
    shards = max(-(-pool_bytes // size), -(-pool // config.shards.max_samples))
    add(
        "shards",
        shards,
        pool,
        rows + workers * (WORKER + int(lengths.max(initial=0))),
        f"{held} + workers x (process + largest image)",
        (
            pool_bytes / (rates.copy * busy),
            f"measured: {human_bytes(rates.copy)}/s per core, without the disk's writing",
        ),
        pool_bytes,
    )
    return stages


def measure(config: CurateConfig, table: pa.Table, listing: float) -> Measured:
    """Decode, embed and compare a few of the pool's images, evenly spaced. Writes nothing."""
    indices = np.flatnonzero(np.array(table["role"].to_pylist()) == "pool")
    indices = indices[np.linspace(0, len(indices) - 1, min(SAMPLE, len(indices))).astype(int)]
    places = table.select(["source", "offset", "length"]).take(pa.array(indices)).to_pylist()
    thumbs = np.zeros((len(places), THUMB, THUMB), dtype=np.uint8)
    describe(places[0], config.decode, thumbs[0])  # the first one also loads the decoder
    found, seconds = _timed(lambda: [describe(p, config.decode, t) for p, t in zip(places, thumbs, strict=True)])
    good = [index for index, row in enumerate(found) if row.get("reason") is None]
    device = choose_device(config.device)
    pixels, embed, dims, weights, sizes = _measure_models(config, [(places[i], found[i]) for i in good], device)
    return Measured(
        listing=listing,
        decode=len(places) / seconds,
        pixels=pixels,
        embed=embed,
        dims=dims,
        weights=weights,
        sizes=sizes,
        verify=_measure_pairs(thumbs[good], device) if config.dedup.verify else None,
        copy=_measure_copy(places),
        base=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _measure_models(
    config: CurateConfig, images: list[tuple[dict, dict]], device: torch.device
) -> tuple[float | None, float | None, dict[str, int], int, tuple[int, ...]]:
    """Images per second of one core decoded for the models, images per second embedded, widths, bytes, input sizes."""
    specs = embedders(config)
    if _needs_training(config):
        return None, None, {}, 0, tuple(sorted({spec.size or 224 for spec in specs.values()}))
    models = {
        purpose: load_embedder(spec.model, spec.size, Path(config.out), device, key=f"embed.{purpose}.model")
        for purpose, spec in specs.items()
    }
    sizes = tuple(sorted({model.size for model in models.values()}))
    dims: dict[str, int] = {purpose: model.dim for purpose, model in models.items()}
    weights = sum(p.numel() * p.element_size() for model in models.values() for p in model.model.parameters())
    if not images:
        return None, None, dims, weights, sizes
    images = images[:BATCH]
    unit = PixelUnit(
        part=0,
        start=0,
        places=tuple((place["source"], place["offset"], place["length"]) for place, _ in images),
        ids=tuple(row["item_id"] for _, row in images),
        sizes=sizes,
        max_pixels=config.decode.max_pixels,
    )
    pixels, decoding = _timed(lambda: load_pixels(unit))

    def embed() -> None:
        for model in models.values():
            model(torch.from_numpy(pixels[model.size]).to(device)).cpu()

    with torch_threads(max(1, cores() // 2)):
        embed()  # the first pass also allocates
        _, embedding = _timed(embed)
    return len(images) / decoding, len(images) / embedding, dims, weights, sizes


def _measure_pairs(thumbs: np.ndarray, device: torch.device) -> float | None:
    """Pairs per second of one core."""
    if len(thumbs) < 2:
        return None
    pairs = np.stack(np.triu_indices(len(thumbs), 1), axis=1)[:PAIRS].astype(np.int64)
    aspect = np.ones(len(thumbs), dtype=np.float32)
    with torch_threads(1):
        verify_pairs(thumbs, aspect, pairs[:8], device)
        _, seconds = _timed(lambda: verify_pairs(thumbs, aspect, pairs, device))
    return len(pairs) / seconds


def _measure_copy(places: list[dict]) -> float:
    """Bytes per second read and summed."""

    def copy() -> None:
        for place in places:
            hashlib.sha256(read_bytes(place["source"], place["offset"], place["length"]))

    return max(1, sum(place["length"] for place in places)) / _timed(copy)[1]


def _embedding(rates: Measured, num: int, busy: int) -> tuple[float | None, str]:
    """Seconds of the embed stage: workers decode while the models run, so the slower of the two counts."""
    if rates.embed is None or rates.pixels is None:
        return None, "its model is trained first"
    seconds = max(num / (rates.pixels * busy), num / rates.embed)
    return seconds, f"measured: models {rates.embed:.0f} images/s, decoding {rates.pixels:.0f} per core"


def _needs_training(config: CurateConfig) -> bool:
    """Whether a model is trained on the pool first."""
    trained = Path(config.out) / "bootstrap" / "model" / "card.json"
    return any(spec.model == "bootstrap" for spec in embedders(config).values()) and not trained.is_file()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, max(time.perf_counter() - start, 1e-6)


@dataclass(frozen=True)
class _Before:
    """What an earlier run in the output folder took, for what cannot be measured on a few images."""

    out: Path

    def report(self, stage: str) -> dict[str, Any] | None:
        path = self.out / "stages" / stage / "done.json"
        return read_json(path) if path.is_file() else None

    def seconds(self, stage: str) -> tuple[float | None, str]:
        report = self.report(stage)
        return (report["seconds"], "an earlier run in this folder") if report else (None, "short; known after a run")

    def pairs(self, config: CurateConfig, pool: int, guard: int) -> tuple[int, str]:
        """Candidate pairs of pool and evaluation images, and where the number comes from."""
        report = self.report("join")
        if report:
            return report["counts"]["pool_pairs"] + report["counts"]["guard_pairs"], "pairs of an earlier run"
        if not config.dedup.verify:
            return 4 * pool, "four pairs an image: a guess, known after the join"
        several = 8 * pool + config.guard.k * (pool + guard if guard else 0)
        return several, "eight pairs an image, and guard.k with evaluation images: a guess, known after the join"


def free_space(folder: Path) -> int:
    """Bytes free on the disk that will hold a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
