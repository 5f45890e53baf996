"""The evaluation guard: no training image may be a copy of an evaluation image, nor belong to a group with one.

The same join as between pool images, at a stricter threshold; the whole component goes (DINOv2 A.3). Every removal
has a witness: the evaluation image and how alike they are.
"""

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say

from .config import CurateConfig
from .dedup import judged
from .groups import components
from .rows import Rows
from .scoring import as_pairs
from .stage import Stage

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("witness", pa.int64()),  # row of the evaluation image
        ("cosine", pa.float32()),  # to the witness; null where only a group-mate was hit
        ("direct", pa.bool_()),
    ]
)


def guard_stage(config: CurateConfig, rows: Rows, exact: Stage, dedup: Stage, proposed: Stage, stage: Stage) -> None:
    """Write `edges.parquet` (evaluation image, pool image, scores, verdict) and `leaks.parquet` (SCHEMA).

    proposed: the finished stage with `guard.parquet`, which is verify or, without verification, join.
    """
    stage.open()
    edges = judged(proposed.table("guard.parquet"), config, threshold=config.guard.verify_threshold)
    write_table(stage.file("edges.parquet"), edges)
    hits = _best_hits(edges.filter(edges["accepted"]))
    leaks = _with_components(rows, hits, exact, dedup)
    write_table(stage.file("leaks.parquet"), leaks)
    direct = int(np.sum(leaks["direct"].to_numpy(zero_copy_only=False)))
    say(f"guard: {direct} copies of evaluation images, {len(leaks) - direct} more in their groups")
    stage.finish(candidate_pairs=len(edges), leaks=len(leaks), direct=direct, by_group=len(leaks) - direct)


def _best_hits(hits: pa.Table) -> pa.Table:
    """For each pool row that was hit, its closest evaluation image: by score, then cosine, then row."""
    edges, cosine = as_pairs(hits), hits["cosine"].to_numpy()
    score = hits["score"].fill_null(0).to_numpy()
    order = np.lexsort((edges[:, 0], -cosine, -score, edges[:, 1]))
    edges, cosine = edges[order], cosine[order]
    rows, first = np.unique(edges[:, 1], return_index=True)
    return pa.table([rows, edges[first, 0], cosine[first], np.ones(len(rows), bool)], schema=SCHEMA)


def _with_components(rows: Rows, hits: pa.Table, exact: Stage, dedup: Stage) -> pa.Table:
    """The hits and every other row of their components, with the same witness; sorted by row.

    Components also where `dedup.groups` is leader: a chain of copies from an evaluation image is a risk in any case.
    """
    edges, copies = dedup.table("edges.parquet"), exact.table("duplicates.parquet")
    links = np.stack([copies["row"].to_numpy(), copies["of"].to_numpy()], axis=1)
    of = components(len(rows.ids), np.concatenate([as_pairs(edges.filter(edges["accepted"])), links]))
    hit, witness = hits["row"].to_numpy(), hits["witness"].to_numpy()
    # Hits are sorted by row; the first of a group lends its witness to the others.
    touched, first = np.unique(of[hit], return_index=True)
    others = np.setdiff1d(np.flatnonzero(np.isin(of, touched)), hit)
    lent = witness[first[np.searchsorted(touched, of[others])]]
    more = pa.table([others, lent, pa.nulls(len(others), pa.float32()), np.zeros(len(others), bool)], schema=SCHEMA)
    return pa.concat_tables([hits, more]).sort_by("row")
