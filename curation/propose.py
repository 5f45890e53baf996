"""Candidate pairs: neighbours by copy vectors and by perceptual hash propose, pixels decide later.

Without `dedup.verify` the cosine decides, as in DINOv2 A.3, and only neighbours by vectors are proposed. Stage `index`
plans how the vectors are searched and prepares it; stage `join` searches, in units that can be shared out.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import torch

from runtime.environment import cores
from runtime.files import read_json, write_json, write_table
from runtime.progress import Progress, say
from runtime.seeding import generator
from runtime.signals import StopRequest
from runtime.world import choose_device

from .cells import Cells, cell_pairs, probes_for, train_cells, visit_cells
from .codes import build_codes, code_pairs, read_codes, write_codes
from .config import CurateConfig
from .embed import Embedded, identities
from .join import hash_pairs, held, knn_pairs, sample_pairs, self_pairs, wilson_interval
from .planner import MOST_PROBES, RECALL, JoinPlan, plan_join
from .previous import previous_pairs
from .rows import Rows
from .stage import Share, Stage
from .threads import torch_threads
from .threshold import Pairs, count_pairs, even_ranges, exact_cosines, threshold_pairs, triangle_costs
from .unit_vectors import UnitVectors

RECALL_SAMPLE = 2000  # rows searched exactly, to measure what the join finds and to expect how many pairs there are
MOST_SAMPLED = 5_000_000  # pairs of the sampled rows; where there are more, fewer rows are searched
GUARD_BLOCK = 8192  # evaluation or pool images of a unit of the guard's join
SCHEMA = pa.schema([("row_a", pa.int64()), ("row_b", pa.int64()), ("cosine", pa.float32())])


def index_stage(config: CurateConfig, rows: Rows, embed: Stage, chosen: np.ndarray, stage: Stage) -> None:
    """Write `plan.json`, how the pairs will be searched, and what the search needs: cells or an index of codes.

    chosen: pool rows without exact copies, sorted. `sample.parquet` holds all pairs of some random rows, by exact
    search: what the join finds of them is its recall.
    """
    stage.open()
    device = choose_device(config.device)
    embedded = Embedded.open(embed, "copy")
    vectors = embedded.of(chosen)
    expected, num_sampled, sampled = _sample(config, vectors, "recall sample", device)
    write_table(stage.file("sample.parquet"), _table(Pairs(chosen[sampled], exact_cosines(vectors, vectors, sampled))))
    plan = plan_join(
        len(chosen),
        vectors.dim,
        device=device,
        memory_budget=config.dedup.join_memory,
        seconds_budget=config.dedup.join_seconds,
        asked=config.dedup.join,
        edges=expected,
        most_edges=config.dedup.k * len(chosen),
    )
    say(f"index: {plan.reasons[0]}")
    say(f"index: {'; '.join(plan.reasons[1:])}")
    if plan.method == "ivf":
        centroids = train_cells(vectors, plan.num_cells, seed=config.seed)
        visits = visit_cells(vectors, centroids, min(MOST_PROBES, plan.num_cells), device=device)
        _, _, tuning = _sample(config, vectors, "probe sample", device)  # another one: the first is to judge
        probes, meet = probes_for(visits, tuning, recall=RECALL)
        plan = replace(plan, num_probes=probes)
        say(f"index: {plan.num_cells} cells; with {probes} visited by each image {meet:.2%} of sampled pairs meet")
        Cells.of(np.ascontiguousarray(visits[:, :probes]), plan.num_cells).write(stage.folder)
    elif plan.method == "ivf_pq":
        plan = replace(plan, num_probes=min(MOST_PROBES, plan.num_cells))
        write_codes(build_codes(vectors, plan.num_cells, seed=config.seed), stage.file("codes.faiss"))
    guarded = _guarded(config, rows, embedded)
    exact = config.dedup.join != "knn" and _few_hits(
        config, embedded.of(rows.of("guard")), embedded.of(guarded), device
    )
    report = {"images": len(chosen), "sampled_images": num_sampled, "expected_pairs": round(expected)}
    write_json(stage.file("plan.json"), {"pool": asdict(plan), "guard": "exact" if exact else "knn", **report})
    stage.finish(method=plan.method, **report)


def join_stage(
    config: CurateConfig,
    rows: Rows,
    embed: Stage,
    index: Stage,
    chosen: np.ndarray,
    stage: Stage,
    stop: StopRequest | None,
    share: Share,
) -> None:
    """Write `pool.parquet` and `guard.parquet`: pairs worth a closer look, with their cosine (SCHEMA).

    chosen: pool rows without exact copies, sorted. Pool pairs are (smaller row, larger row), guard pairs are
    (evaluation image, pool image or seed that passes); both sorted.
    """
    stage.open(share)
    embedded = Embedded.open(embed, "copy")
    evaluation, guarded = rows.of("guard"), _guarded(config, rows, embedded)
    search = Search(config, embedded, index, chosen, evaluation, guarded, rows.ids[chosen])
    units = search.units()
    waiting = [(n, unit) for n, unit in share.of(list(enumerate(units))) if not stage.part(n).is_file()]
    _search_units(search, waiting, stage, stop)
    if not share.whole:
        return
    found: dict[str, list[Pairs]] = {"pool": [], "guard": []}
    for n, unit in enumerate(units):
        found["pool" if unit.kind == "pool" else "guard"].append(_as_pairs(stage.table(stage.part(n).name)))
    found["pool"].append(_renamed(search.before[1], chosen, chosen))
    neighbours = Pairs.joined(found["pool"]).distinct()
    recall = _recall(config, search.plan, index, neighbours)
    if config.dedup.verify:
        for name, ours, theirs in (("pool", chosen, chosen), ("guard", evaluation, guarded)):
            near = _look_alikes(config, rows, ours, theirs)
            near = self_pairs(near) if name == "pool" else near
            cosine = exact_cosines(embedded.of(ours), embedded.of(theirs), near)
            found[name].append(Pairs(np.stack([ours[near[:, 0]], theirs[near[:, 1]]], axis=1), cosine))
    counts = {}
    for name, several in found.items():
        pairs = Pairs.joined(several).distinct()
        write_table(stage.file(f"{name}.parquet"), _table(pairs))
        counts[name] = len(pairs)
    say(f"join: {counts['pool']} pairs of {len(chosen)} images proposed")
    if len(evaluation):
        say(f"join: {counts['guard']} pairs of {len(evaluation)} evaluation images with the pool proposed")
    over = {"taken_over": {"images": len(chosen) - len(search.new), "pairs": len(search.before[1])}}
    over = over if config.previous else {}
    stage.finish(pool_pairs=counts["pool"], guard_pairs=counts["guard"], pair_recall=recall, **over)


@dataclass(frozen=True)
class JoinUnit:
    """A range of the pool's rows (or cells), of evaluation rows, or of guarded rows looking for evaluation images."""

    kind: Literal["pool", "guard", "back"]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Search:
    """What the units of a join search in, opened when the first of them needs it."""

    config: CurateConfig
    embedded: Embedded
    index: Stage
    chosen: np.ndarray  # int64, rows of the pool
    evaluation: np.ndarray  # int64, rows
    guarded: np.ndarray  # int64, rows that may lie in the shards
    ids: np.ndarray  # str, content ids of `chosen`

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.config.device)

    @cached_property
    def written(self) -> dict[str, Any]:
        return read_json(self.index.file("plan.json"))

    @property
    def plan(self) -> JoinPlan:
        return JoinPlan(**self.written["pool"] | {"reasons": tuple(self.written["pool"]["reasons"])})

    @cached_property
    def pool(self) -> UnitVectors:
        return self.embedded.of(self.chosen)

    @cached_property
    def ours(self) -> UnitVectors:
        return self.embedded.of(self.evaluation)

    @cached_property
    def theirs(self) -> UnitVectors:
        return self.embedded.of(self.guarded)

    @cached_property
    def before(self) -> tuple[np.ndarray, Pairs]:
        """Which of the pool's rows an earlier run has joined exactly (bool [N]), and their pairs of positions.

        None where that saves nothing: new rows meet all rows, while without them only half of all products are needed.
        """
        known, none = np.zeros(len(self.chosen), dtype=bool), Pairs.joined([])
        if not self.config.previous or self.plan.method != "exact":
            return known, none
        found, pairs, cosine = previous_pairs(self.config, self.ids, identities(self.config)["copy"])
        return (found, Pairs(pairs, cosine)) if 2 * found.sum() > len(found) else (known, none)

    @cached_property
    def new(self) -> np.ndarray:
        """Positions of the pool's rows that no earlier run has joined; int64."""
        return np.flatnonzero(~self.before[0])

    @cached_property
    def cells(self) -> Cells:
        return Cells.read(self.index.folder)

    @cached_property
    def codes(self) -> faiss.IndexIVF:
        return read_codes(self.index.file("codes.faiss"))

    def units(self) -> list[JoinUnit]:
        """The units of this plan, the same in every share and on every machine."""
        plan, block, num = self.plan, self.plan.block, len(self.chosen)
        if plan.method == "ivf":
            costs = self.cells.costs()
        elif plan.method == "exact" and self.before[0].any():
            num = len(self.new)
            costs = np.ones(-(-num // block))  # each new row meets all rows
        elif plan.method == "exact":
            costs = triangle_costs(num, block)
        else:
            costs = np.ones(-(-num // block))
        ranges = even_ranges(costs, plan.num_units)
        if plan.method != "ivf":
            ranges = [(block * start, min(num, block * stop)) for start, stop in ranges]
        units = [JoinUnit("pool", start, stop) for start, stop in ranges]
        sides: list[tuple[Literal["guard", "back"], int]] = [("guard", len(self.evaluation))]
        if self.written["guard"] == "knn" and len(self.evaluation):
            sides.append(("back", len(self.guarded)))
        for kind, count in sides:
            starts = range(0, count, GUARD_BLOCK)
            units += [JoinUnit(kind, start, min(start + GUARD_BLOCK, count)) for start in starts]
        return units

    def pairs(self, unit: JoinUnit, stop: StopRequest | None) -> Pairs:
        """What a unit finds: pairs of rows, sorted."""
        config, span = self.config, (unit.start, unit.stop)
        if unit.kind == "pool":
            return _renamed(self._pool_pairs(span, stop), self.chosen, self.chosen)
        threshold, k = config.guard.threshold, config.guard.k
        if self.written["guard"] == "exact":
            pairs = threshold_pairs(self.ours, self.theirs, threshold=threshold, device=self.device, rows=span)
            return _renamed(pairs, self.evaluation, self.guarded)
        sides = (self.ours, self.theirs) if unit.kind == "guard" else (self.theirs, self.ours)
        near = knn_pairs(*sides, k=k, threshold=threshold, rows=span, device=self.device)
        near = near if unit.kind == "guard" else near[:, ::-1]
        pairs = Pairs(near, exact_cosines(self.ours, self.theirs, near))
        return _renamed(pairs, self.evaluation, self.guarded).sorted()

    def _pool_pairs(self, span: tuple[int, int], stop: StopRequest | None) -> Pairs:
        """Pairs a < b of positions in the pool's rows."""
        plan, k, threshold = self.plan, self.config.dedup.k, self.config.dedup.threshold
        check = stop.check if stop is not None else lambda: None
        if plan.method == "exact" and self.before[0].any():
            new = self.embedded.of(self.chosen[self.new])
            pairs = threshold_pairs(new, self.pool, threshold=threshold, device=self.device, rows=span)
            index = np.stack([self.new[pairs.index[:, 0]], pairs.index[:, 1]], axis=1)
            other = index[:, 0] != index[:, 1]  # every row finds itself
            return Pairs(np.sort(index[other], axis=1), pairs.cosine[other]).distinct()
        if plan.method == "exact":
            return threshold_pairs(self.pool, threshold=threshold, device=self.device, rows=span)
        if plan.method == "ivf":
            return cell_pairs(self.pool, self.cells, threshold=threshold, device=self.device, which=span, check=check)
        if plan.method == "ivf_pq":
            probes = plan.num_probes
            return code_pairs(
                self.pool, self.codes, k=k, num_probes=probes, threshold=threshold, rows=span, check=check
            )
        near = knn_pairs(self.pool, self.pool, k=k + 1, threshold=threshold, rows=span, device=self.device)
        near = self_pairs(near)  # every image finds itself
        return Pairs(near, exact_cosines(self.pool, self.pool, near))


def _search_units(
    search: Search, waiting: Sequence[tuple[int, JoinUnit]], stage: Stage, stop: StopRequest | None
) -> None:
    """Write the parts of units that wait. In threads of one core each: torch and FAISS let go of the interpreter."""

    def work(item: tuple[int, JoinUnit]) -> None:
        if stop is not None:
            stop.check()
        number, unit = item
        write_table(stage.part(number), _table(search.pairs(unit, stop)))

    if not waiting:
        return
    workers = 1 if search.device.type == "cuda" else min(cores(), max(1, search.config.workers))
    with Progress("join", total=len(waiting), unit="units") as progress, torch_threads(1):
        pool = ThreadPoolExecutor(workers, initializer=faiss.omp_set_num_threads, initargs=(1,))
        try:
            for _ in pool.map(work, waiting):
                progress.advance(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _guarded(config: CurateConfig, rows: Rows, embedded: Embedded) -> np.ndarray:
    """Rows that could come to lie in the shards: the pool, and the seeds where they pass; sorted int64."""
    seeds = rows.of("seed") if config.retrieval.keep_seeds else rows.of("seed")[:0]
    return np.intersect1d(np.union1d(rows.of("pool"), seeds), embedded.rows)


def _sample(
    config: CurateConfig, vectors: UnitVectors, purpose: str, device: torch.device
) -> tuple[float, int, np.ndarray]:
    """Pairs expected in all, rows sampled, and every pair of those rows (positions a < b, int64 [E, 2])."""
    threshold, num = config.dedup.threshold, len(vectors)
    draw = generator(config.seed, purpose).permutation(num)[:RECALL_SAMPLE]
    some = UnitVectors((vectors.stored(draw),))
    passing = count_pairs(some, vectors, threshold=threshold, device=device) - len(draw)  # each finds itself
    expected = max(0, passing) * num / max(1, 2 * len(draw))
    if passing > MOST_SAMPLED:
        draw = draw[: max(1, len(draw) * MOST_SAMPLED // passing)]
    return expected, len(draw), sample_pairs(vectors, np.sort(draw), threshold=threshold, device=device)


def _few_hits(config: CurateConfig, evaluation: UnitVectors, guarded: UnitVectors, device: torch.device) -> bool:
    """Whether all pairs above the guard's threshold are no more than nearest neighbours from both sides could be."""
    if not len(evaluation):
        return True
    draw = np.sort(generator(config.seed, "guard sample").permutation(len(evaluation))[:RECALL_SAMPLE])
    some = UnitVectors((evaluation.stored(draw),))
    passing = count_pairs(some, guarded, threshold=config.guard.threshold, device=device)
    expected, most = passing * len(evaluation) / len(draw), config.guard.k * (len(evaluation) + len(guarded))
    taken = "all are taken" if expected <= most else f"more than {most:.2g}, so the {config.guard.k} nearest are taken"
    say(f"index: about {expected:.2g} pairs with evaluation images above {config.guard.threshold}: {taken}")
    return expected <= most


def _look_alikes(config: CurateConfig, rows: Rows, queries: np.ndarray, base: np.ndarray) -> np.ndarray:
    """(query, base) index pairs whose pictures look alike, mirrored or not, by perceptual hash; int64 [E, 2]."""
    ours, theirs = rows.phash[queries], rows.phash[base]
    distance = config.dedup.phash_candidates
    found = [hash_pairs(ours, theirs, distance=distance), hash_pairs(theirs, ours, distance=distance)[:, ::-1]]
    return np.unique(np.concatenate(found), axis=0)


def _recall(config: CurateConfig, plan: JoinPlan, index: Stage, neighbours: Pairs) -> dict[str, Any]:
    """What the search by vectors found of all pairs of the sampled rows."""
    sampled = _as_pairs(index.table("sample.parquet"))
    found, total = held(sampled.index, neighbours.index), len(sampled)
    role = "; with verification they are proposals, beside those by hash" if config.dedup.verify else ""
    cells = f"{plan.num_probes} of {plan.num_cells} k-means cells"
    return {
        "search": {
            "exact": "exact: every pair, blocked bfloat16 products and a float32 check of what passes",
            "knn": f"exact nearest neighbours (FAISS), k={config.dedup.k}",
            "ivf": f"every pair that meets in a cell, each image visits {cells}",
            "ivf_pq": f"compressed codes (FAISS RaBitQ), k={config.dedup.k} in {cells}, scored again from the vectors",
        }[plan.method],
        "means": f"of the pairs with cosine >= {config.dedup.threshold}, the share that the search finds{role}; "
        "measured by exact search for random images",
        "sampled_images": index.report()["counts"]["sampled_images"],
        "pairs": total,
        "found": found,
        "recall": found / total if total else None,
        "interval_95": wilson_interval(found, total),
    }


def _renamed(pairs: Pairs, ours: np.ndarray, theirs: np.ndarray) -> Pairs:
    """Pairs of positions as pairs of rows."""
    return Pairs(np.stack([ours[pairs.index[:, 0]], theirs[pairs.index[:, 1]]], axis=1), pairs.cosine)


def _table(pairs: Pairs) -> pa.Table:
    return pa.table([pairs.index[:, 0], pairs.index[:, 1], pairs.cosine], schema=SCHEMA)


def _as_pairs(table: pa.Table) -> Pairs:
    index = np.stack([table["row_a"].to_numpy(), table["row_b"].to_numpy()], axis=1)
    return Pairs(index, table["cosine"].to_numpy())
