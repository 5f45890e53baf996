"""The evaluation guard: no training image may be a copy of an evaluation image, nor belong to a group with one.

The same join as between pool images, at a stricter threshold; the whole component goes (DINOv2 A.3). Every removal
has a witness: the evaluation image and how alike they are.
"""

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say
from runtime.signals import StopRequest

from .config import CurateConfig
from .dedup import edge_table
from .embed import Vectors
from .join import cosines, hash_pairs, knn_pairs
from .rows import Rows, read_thumbs, thumb_files
from .scoring import judge_pairs
from .stage import Stage
from .views import view_pairs

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("witness", pa.int64()),  # row of the evaluation image
        ("cosine", pa.float32()),  # to the witness; null where only a group-mate was hit
        ("direct", pa.bool_()),
    ]
)


def guard_stage(
    config: CurateConfig,
    rows: Rows,
    vectors: Vectors,
    decode: Stage,
    dedup: Stage,
    stage: Stage,
    stop: StopRequest | None,
) -> None:
    """Write `edges.parquet` (evaluation image, pool image, scores, verdict) and `leaks.parquet` (SCHEMA)."""
    stage.open()
    evaluation = rows.of("guard")
    pool = np.intersect1d(rows.of("pool"), vectors.rows)
    pairs = _candidates(config, rows, vectors, evaluation, pool, decode)
    cosine = cosines(vectors.of(evaluation), vectors.of(pool), pairs)
    edges = np.stack([evaluation[pairs[:, 0]], pool[pairs[:, 1]]], axis=1)
    say(f"guard: {len(pairs)} pairs of {len(evaluation)} evaluation images with the pool proposed")
    threshold = config.guard.verify_threshold
    score, accepted = judge_pairs(config, rows, decode, edges, stage, stop, threshold=threshold)
    write_table(stage.file("edges.parquet"), edge_table(edges, cosine, score, accepted))
    hits = _best_hits(edges[accepted], cosine[accepted], score[accepted])
    leaks = _with_groups(rows, hits, dedup)
    write_table(stage.file("leaks.parquet"), leaks)
    direct = int(np.sum(leaks["direct"].to_numpy(zero_copy_only=False)))
    say(f"guard: {direct} copies of evaluation images, {len(leaks) - direct} more in their groups")
    stage.finish(candidate_pairs=len(pairs), leaks=len(leaks), direct=direct, by_group=len(leaks) - direct)


def _candidates(
    config: CurateConfig, rows: Rows, vectors: Vectors, evaluation: np.ndarray, pool: np.ndarray, decode: Stage
) -> np.ndarray:
    """(evaluation, pool) index pairs, sorted; int64 [E, 2]. Neighbours are taken from both sides."""
    ours, theirs = vectors.of(evaluation), vectors.of(pool)
    k, threshold = config.guard.k, config.guard.threshold
    proposed = [
        knn_pairs(ours, theirs, k=k, threshold=threshold),
        knn_pairs(theirs, ours, k=k, threshold=threshold)[:, ::-1],
    ]
    if config.dedup.verify:
        ours, theirs = rows.phash[evaluation], rows.phash[pool]
        distance = config.dedup.phash_candidates
        proposed += [
            hash_pairs(ours, theirs, distance=distance),
            hash_pairs(theirs, ours, distance=distance)[:, ::-1],
        ]
        if config.dedup.views:
            ours, theirs = (read_thumbs(thumb_files(decode), side) for side in (evaluation, pool))
            proposed += [
                view_pairs(ours, theirs, k=config.dedup.views),
                view_pairs(theirs, ours, k=config.dedup.views)[:, ::-1],
            ]
    return np.unique(np.concatenate(proposed), axis=0)


def _best_hits(edges: np.ndarray, cosine: np.ndarray, score: np.ndarray) -> pa.Table:
    """For each pool row that was hit, its closest evaluation image: by score, then cosine, then row."""
    order = np.lexsort((edges[:, 0], -cosine, -np.nan_to_num(score), edges[:, 1]))
    edges, cosine = edges[order], cosine[order]
    rows, first = np.unique(edges[:, 1], return_index=True)
    return pa.table([rows, edges[first, 0], cosine[first], np.ones(len(rows), bool)], schema=SCHEMA)


def _with_groups(rows: Rows, hits: pa.Table, dedup: Stage) -> pa.Table:
    """The hits and every other row of their groups, with the same witness; sorted by row."""
    groups = dedup.table("groups.parquet")
    of = np.arange(len(rows.ids))
    of[groups["row"].to_numpy()] = groups["of"].to_numpy()
    hit, witness = hits["row"].to_numpy(), hits["witness"].to_numpy()
    # Hits are sorted by row; the first of a group lends its witness to the others.
    touched, first = np.unique(of[hit], return_index=True)
    others = np.setdiff1d(np.flatnonzero(np.isin(of, touched)), hit)
    lent = witness[first[np.searchsorted(touched, of[others])]]
    more = pa.table([others, lent, pa.nulls(len(others), pa.float32()), np.zeros(len(others), bool)], schema=SCHEMA)
    return pa.concat_tables([hits, more]).sort_by("row")
