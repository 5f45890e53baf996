"""Near-duplicates: proposed pairs that pass, joined into groups, of which one image stays (DINOv2 A.3).

With `dedup.verify` a pair passes when its two pictures, aligned, agree; without it the cosine decides, as in the paper.
"""

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say

from .config import CurateConfig
from .exact import remaining
from .groups import components, representatives
from .rows import Rows
from .scoring import as_pairs
from .stage import Stage


def dedup_stage(config: CurateConfig, rows: Rows, exact: Stage, proposed: Stage, stage: Stage) -> None:
    """Write `edges.parquet` (candidate pairs, scores, verdict) and `groups.parquet` (row -> the row that stays).

    proposed: the finished stage with `pool.parquet`, which is verify or, without verification, join.
    """
    stage.open()
    chosen = remaining(rows, exact)
    edges = judged(proposed.table("pool.parquet"), threshold=config.dedup.verify_threshold)
    write_table(stage.file("edges.parquet"), edges)
    accepted = edges["accepted"].to_numpy()
    groups = _groups(rows, exact, as_pairs(edges)[accepted])
    write_table(stage.file("groups.parquet"), groups)
    _, sizes = np.unique(groups["of"].to_numpy(), return_counts=True)
    left = len(surviving(chosen, stage))
    say(f"dedup: {int(accepted.sum())} of {len(edges)} pairs are near-duplicates; {left} of {len(chosen)} images stay")
    stage.finish(
        **{"in": len(chosen), "out": left},
        candidate_pairs=len(edges),
        edges=int(accepted.sum()),
        largest_group=int(sizes.max(initial=0)) + 1,
    )


def judged(pairs: pa.Table, *, threshold: float) -> pa.Table:
    """Proposed pairs with columns `score` (null where pictures were not compared) and `accepted`.

    Where pictures were compared the score decides, else every proposed pair passes.
    """
    if "score" not in pairs.column_names:
        pairs = pairs.append_column("score", pa.nulls(len(pairs), pa.float32()))
        return pairs.append_column("accepted", pa.array(np.ones(len(pairs), dtype=bool)))
    return pairs.append_column("accepted", pa.array(pairs["score"].to_numpy() >= threshold))


def _groups(rows: Rows, exact: Stage, edges: np.ndarray) -> pa.Table:
    """Components of near-duplicate edges and exact copies together: the rows that do not stay, and which stays."""
    copies = exact.table("duplicates.parquet")
    links = np.stack([copies["row"].to_numpy(), copies["of"].to_numpy()], axis=1)
    labels = components(len(rows.ids), np.concatenate([edges, links]))
    best = representatives(labels, rows.area, rows.num_bytes, rows.ids)
    gone = np.flatnonzero(best != np.arange(len(best)))
    return pa.table({"row": gone, "of": best[gone]})


def surviving(chosen: np.ndarray, dedup: Stage) -> np.ndarray:
    """The chosen rows that stay for their groups; sorted int64."""
    return np.setdiff1d(chosen, dedup.table("groups.parquet")["row"].to_numpy())
