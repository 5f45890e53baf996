"""Candidate pairs: neighbours by copy vectors, by perceptual hash and by window views propose, pixels decide later.

Without `dedup.verify` the cosine decides, as in DINOv2 A.3, and only neighbours by vectors are proposed.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from runtime.files import write_json, write_table
from runtime.progress import Progress, say
from runtime.seeding import generator
from runtime.signals import StopRequest

from .config import CurateConfig
from .embed import Vectors
from .join import cosines, hash_pairs, knn_pairs, pair_recall, self_pairs, wilson_interval
from .rows import Rows, read_thumbs, thumb_files
from .stage import Share, Stage
from .views import view_pairs

RECALL_SAMPLE = 1000  # rows searched exactly to measure the recall of the graph
BLOCK = 4096  # query images of a unit


def index_stage(config: CurateConfig, chosen: np.ndarray, stage: Stage) -> None:
    """Write `plan.json`: how the pairs of the chosen rows will be searched."""
    stage.open()
    write_json(stage.file("plan.json"), {"method": "knn", "images": len(chosen)})
    stage.finish(method="knn")


def join_stage(
    config: CurateConfig,
    rows: Rows,
    vectors: Vectors,
    chosen: np.ndarray,
    decode: Stage,
    stage: Stage,
    stop: StopRequest | None,
    share: Share,
) -> None:
    """Write `pool.parquet` and `guard.parquet`: pairs worth a closer look, with their cosine.

    chosen: pool rows without exact copies, sorted. Pool pairs are (smaller row, larger row), guard pairs are
    (evaluation image, pool image or seed that passes); both sorted.
    """
    stage.open(share)
    evaluation, pool = rows.of("guard"), np.intersect1d(_guarded(config, rows), vectors.rows)
    ours, theirs = vectors.of(evaluation), vectors.of(pool)
    values = vectors.of(chosen)
    units = [("pool", start) for start in range(0, len(chosen), BLOCK)]
    units += [("guard", start) for start in range(0, len(evaluation), BLOCK)]
    waiting = [(index, unit) for index, unit in share.of(list(enumerate(units))) if not stage.part(index).is_file()]
    with Progress("join", total=len(waiting), unit="blocks") as progress:
        for index, (kind, start) in waiting:
            if stop is not None:
                stop.check()
            block = slice(start, start + BLOCK)
            if kind == "pool":
                pairs = knn_pairs(values[block], values, k=config.dedup.k + 1, threshold=config.dedup.threshold)
                found = chosen[pairs + np.array([start, 0])]
            else:
                pairs = knn_pairs(ours[block], theirs, k=config.guard.k, threshold=config.guard.threshold)
                found = np.stack([evaluation[pairs[:, 0] + start], pool[pairs[:, 1]]], axis=1)
            write_table(stage.part(index), pa.table({"row_a": found[:, 0], "row_b": found[:, 1]}))
            progress.advance(1)
    if not share.whole:
        return
    parts = [pa_pairs(stage, index) for index in range(len(units))]
    none = [np.empty((0, 2), dtype=np.int64)]
    neighbours = self_pairs(np.concatenate([p for p, u in zip(parts, units, strict=True) if u[0] == "pool"] + none))
    hits = np.concatenate([p for p, u in zip(parts, units, strict=True) if u[0] == "guard"] + none)
    back = knn_pairs(theirs, ours, k=config.guard.k, threshold=config.guard.threshold)
    hits = np.concatenate([hits, np.stack([evaluation[back[:, 1]], pool[back[:, 0]]], axis=1)])
    recall = _measure_recall(config, values, np.searchsorted(chosen, neighbours))
    if config.dedup.verify:
        neighbours = np.concatenate([neighbours, chosen[_look_alikes(config, rows, chosen, chosen, decode)]])
        more = _look_alikes(config, rows, evaluation, pool, decode)
        hits = np.concatenate([hits, np.stack([evaluation[more[:, 0]], pool[more[:, 1]]], axis=1)])
    counts = {}
    for name, found in (("pool", self_pairs(neighbours)), ("guard", np.unique(hits, axis=0))):
        at = np.searchsorted(vectors.rows, found)
        cosine = cosines(vectors.values, vectors.values, at)
        table = pa.table({"row_a": found[:, 0], "row_b": found[:, 1], "cosine": cosine})
        write_table(stage.file(f"{name}.parquet"), table)
        counts[name] = len(found)
    say(f"join: {counts['pool']} pairs of {len(chosen)} images proposed")
    if len(evaluation):
        say(f"join: {counts['guard']} pairs of {len(evaluation)} evaluation images with the pool proposed")
    stage.finish(pool_pairs=counts["pool"], guard_pairs=counts["guard"], pair_recall=recall)


def _guarded(config: CurateConfig, rows: Rows) -> np.ndarray:
    """Rows that could come to lie in the shards: the pool, and the seeds where they pass; sorted int64."""
    seeds = rows.of("seed") if config.retrieval.keep_seeds else rows.of("seed")[:0]
    return np.union1d(rows.of("pool"), seeds)


def pa_pairs(stage: Stage, index: int) -> np.ndarray:
    """The pairs of one part; int64 [E, 2]."""
    table = stage.table(stage.part(index).name)
    return np.stack([table["row_a"].to_numpy(), table["row_b"].to_numpy()], axis=1)


def _look_alikes(config: CurateConfig, rows: Rows, queries: np.ndarray, base: np.ndarray, decode: Stage) -> np.ndarray:
    """(query, base) index pairs, near by perceptual hash or by window views of either; int64 [E, 2]."""
    ours, theirs = rows.phash[queries], rows.phash[base]
    distance = config.dedup.phash_candidates
    found = [hash_pairs(ours, theirs, distance=distance), hash_pairs(theirs, ours, distance=distance)[:, ::-1]]
    if config.dedup.views:
        ours, theirs = (read_thumbs(thumb_files(decode), side) for side in (queries, base))
        found.append(view_pairs(ours, theirs, k=config.dedup.views))
        found.append(view_pairs(theirs, ours, k=config.dedup.views)[:, ::-1])
    return np.unique(np.concatenate(found), axis=0)


def _measure_recall(config: CurateConfig, values: np.ndarray, neighbours: np.ndarray) -> dict[str, Any]:
    """What the graph of nearest neighbours holds of the pairs above the threshold, by exact search for a sample."""
    sample = np.sort(generator(config.seed, "recall sample").permutation(len(values))[:RECALL_SAMPLE])
    found, total = pair_recall(values, neighbours, sample, threshold=config.dedup.threshold)
    role = "; with verification they are proposals, beside those by hash and by views" if config.dedup.verify else ""
    return {
        "search": f"exact inner products (FAISS IndexFlatIP), k={config.dedup.k}",
        "means": f"of the pairs with cosine >= {config.dedup.threshold}, the share that is in the k-NN graph{role}",
        "sampled_images": len(sample),
        "pairs": total,
        "found": found,
        "recall": found / total if total else None,
        "interval_95": wilson_interval(found, total),
    }
