"""Near-duplicates: proposed pairs that pass, joined into groups, of which one image stays (DINOv2 A.3).

With `dedup.verify` a pair passes when its two pictures, aligned, agree; without it the cosine decides, as in the paper.
Whatever `dedup.groups` says, the run tells what both ways of grouping leave, and what they would at other thresholds.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say

from .config import CurateConfig
from .exact import remaining
from .groups import Support, components, leaders, precedence, representatives, unsupported
from .rows import Rows
from .scoring import as_pairs
from .stage import Stage
from .survivors import survivor_curves

LOWEST_SCORE = 0.4  # where the survivor curve over scores of verified pairs begins


def dedup_stage(config: CurateConfig, rows: Rows, exact: Stage, proposed: Stage, stage: Stage) -> None:
    """Write `edges.parquet`, `groups.parquet` (row -> the row that stays) and `survivors.parquet` (at any threshold).

    edges: candidate pairs, scores, verdict. proposed: the finished stage with `pool.parquet`, which is verify or,
    without verification, join.
    """
    stage.open()
    chosen = remaining(rows, exact)
    edges = judged(proposed.table("pool.parquet"), config, threshold=config.dedup.verify_threshold)
    write_table(stage.file("edges.parquet"), edges)
    copies = read_copies(exact, len(rows.ids))
    rank = precedence(rows.area, rows.num_bytes, rows.ids)
    accepted = edges.filter(edges["accepted"])
    pairs, weights = as_pairs(accepted), strength(accepted)
    kept_for = {
        "components": representatives(components(len(rank), pairs), rows.area, rows.num_bytes, rows.ids),
        "leader": leaders(rank, pairs, weights),
    }
    of = kept_for[config.dedup.groups][copies.stands]
    gone = np.flatnonzero(of != np.arange(len(of)))
    write_table(stage.file("groups.parquet"), pa.table({"row": gone, "of": of[gone]}))
    curve, curve_points = _curves(config, edges, chosen, rank)
    write_table(stage.file("survivors.parquet"), curve)
    _, sizes = np.unique(of[gone], return_counts=True)
    left = len(surviving(chosen, stage))
    say(f"dedup: {len(pairs)} of {len(edges)} pairs are near-duplicates; {left} of {len(chosen)} images stay")
    stage.finish(
        **{"in": len(chosen), "out": left},
        candidate_pairs=len(edges),
        edges=len(pairs),
        largest_group=int(sizes.max(initial=0)) + 1,
        groups={
            name: {"out": int((kept[chosen] == chosen).sum())} | copies.support(kept, pairs).report()
            for name, kept in kept_for.items()
        },
        survivors=curve_points,
    )


def judged(pairs: pa.Table, config: CurateConfig, *, threshold: float) -> pa.Table:
    """Proposed pairs with columns `score` (null where pictures were not compared) and `accepted`.

    Where pictures were compared the score decides, else every proposed pair passes. A score is how well the two agree,
    less what their cosine lacks to `dedup.sure_cosine`: tools or banknotes of one make agree well when laid on each
    other, but a network that was trained to tell copies sees that they are two.
    """
    if "score" not in pairs.column_names:
        pairs = pairs.append_column("score", pa.nulls(len(pairs), pa.float32()))
        return pairs.append_column("accepted", pa.array(np.ones(len(pairs), dtype=bool)))
    lacking = np.maximum(0, config.dedup.sure_cosine - pairs["cosine"].to_numpy())
    score = np.maximum(0, pairs["score"].to_numpy() - lacking)
    pairs = pairs.set_column(pairs.column_names.index("score"), "score", pa.array(score, pa.float32()))
    return pairs.append_column("accepted", pa.array(score >= threshold))


def strength(edges: pa.Table) -> np.ndarray:
    """How alike the two images of each judged pair are: the score where they were compared, else the cosine."""
    cosine = edges["cosine"].to_numpy()
    return np.where(edges["score"].is_null().to_numpy(), cosine, edges["score"].fill_null(0).to_numpy())


@dataclass(frozen=True, eq=False)
class Copies:
    """What the exact stage left of N rows."""

    stands: np.ndarray  # int64 [N]: the remaining row that stands for each row, itself where it remains
    alike: np.ndarray  # bool [N]: only looks like it; other copies have its very pixels

    def support(self, of: np.ndarray, edges: np.ndarray) -> Support:
        """The unsupported removals of all rows, copies among them.

        of: int64 [N], the row kept for each remaining row. edges: int [E, 2], of remaining rows. A copy has the edges
        of the row that stands for it; one that only looks like it has an edge to that row and to no other.
        """
        found = unsupported(of, edges)
        stays = of == np.arange(len(of))
        own, none = (np.where(self.alike, ~stays[self.stands], flags[self.stands]) for flags in (found.own, found.any))
        return Support(of[self.stands] != np.arange(len(of)), own, none)


def read_copies(exact: Stage, num_rows: int) -> Copies:
    """The copies of a finished exact stage."""
    table = exact.table("duplicates.parquet")
    stands, alike = np.arange(num_rows), np.zeros(num_rows, dtype=bool)
    row = table["row"].to_numpy()
    stands[row] = table["of"].to_numpy()
    alike[row] = np.array(table["reason"].to_pylist(), dtype=object) == "same look"
    while not np.array_equal(further := stands[stands], stands):
        alike |= alike[stands]  # a copy of one that only looks like the next
        stands = further
    return Copies(stands, alike)


def _curves(config: CurateConfig, edges: pa.Table, chosen: np.ndarray, rank: np.ndarray) -> tuple[pa.Table, dict]:
    """Survivors of the chosen rows by cosine and, where pictures were compared, by score: the table, the points."""
    axes, lowest = {"cosine": edges["cosine"].to_numpy()}, {"cosine": config.dedup.threshold}
    if config.dedup.verify:
        axes["score"] = edges["score"].fill_null(np.nan).to_numpy()
        lowest["score"] = min(LOWEST_SCORE, config.dedup.verify_threshold)
    local = np.searchsorted(chosen, as_pairs(edges))
    return survivor_curves(np.argsort(np.argsort(rank[chosen])), local, axes, lowest)


def surviving(chosen: np.ndarray, dedup: Stage) -> np.ndarray:
    """The chosen rows that stay for their groups; sorted int64."""
    return np.setdiff1d(chosen, dedup.table("groups.parquet")["row"].to_numpy())
