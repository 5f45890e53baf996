"""How much of the truth an index finds: recall against exact search, and the setting that reaches what is asked for."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from runtime.progress import Progress
from runtime.seeding import generator

from .embeddings import Embeddings
from .index_kinds import core_of
from .join import wilson_interval

DEPTH = 10  # recall is measured at 1 and at this many
GAIN = 0.001  # in recall, below which a step is not worth its time


def measure(
    index: Any, sources: Sequence[Embeddings], *, queries: int, target: float, seed: int
) -> dict[str, Any] | None:
    """Recall against exact search, for a sample of the vectors as queries, themselves left out of their neighbours.

    What the index lets be turned (cells or neighbours to look at, candidates to compare again) is turned up until
    recall at 10 is `target`, and left there. `curve` holds what was measured on the way. None with fewer than two
    vectors or no queries.
    """
    num = sum(len(source) for source in sources)
    depth = min(DEPTH, num - 1)
    if depth < 1 or queries < 1:
        return None
    sample = np.sort(generator(seed, "index recall").permutation(num)[:queries])
    starts = np.cumsum([0] + [len(source) for source in sources])
    values = np.concatenate([
        source.read(sample[(sample >= start) & (sample < start + len(source))] - start)
        for source, start in zip(sources, starts[:-1], strict=True)
    ])  # fmt: skip
    with Progress("index: exact search for recall", total=num, unit="vectors") as progress:
        truth = knn_ground_truth(values, _shown(sources, progress), depth + 1, faiss.METRIC_INNER_PRODUCT)[1]
    truth = _without_self(truth, sample)

    def look() -> dict[str, Any]:
        start = time.perf_counter()
        found = _without_self(index.search(values, depth + 1)[1], sample)
        seconds = time.perf_counter() - start
        first = found[:, 0] == truth[:, 0]
        share = (found[:, :, None] == truth[:, None, :]).any(axis=1).mean(axis=1)
        return {
            "recall_at_1": round(float(first.mean()), 4), "interval_at_1": _interval(first),
            f"recall_at_{depth}": round(float(share.mean()), 4), f"interval_at_{depth}": _interval(share),
            "ms_per_query": round(1e3 * seconds / len(values), 4),
        }  # fmt: skip

    best, curve = tune(_knobs(index), look, f"recall_at_{depth}", target)
    context = {"queries": len(values), "threads": faiss.omp_get_max_threads(), "target": target}
    return best | context | {"curve": curve}


@dataclass
class Knob:
    """A setting that trades time for recall."""

    name: str
    turn: Callable[[int], None]
    values: list[int]  # to try in turn
    position: int = 0

    def move(self, by: int) -> None:
        self.position += by
        self.turn(self.values[self.position])

    @property
    def at_end(self) -> bool:
        return self.position + 1 == len(self.values)


def tune(
    knobs: list[Knob], look: Callable[[], dict[str, Any]], goal: str, target: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Turn the knobs up until `goal` is `target` or none helps; what was measured there, and everything measured.

    One knob is turned as long as that gains GAIN, then back by one and the next is. More cells do not help where codes
    are too coarse to tell the neighbours in them apart; then more candidates do.
    """

    def row() -> dict[str, Any]:
        return {knob.name: knob.values[knob.position] for knob in knobs} | look()

    for knob in knobs:
        knob.move(0)
    best = row()
    curve, useless = [best], 0  # knobs in a row that did not help
    while best[goal] < target and useless < len(knobs):
        knob = knobs[0]
        gained = False
        if not knob.at_end:
            knob.move(1)
            curve.append(row())
            gained = curve[-1][goal] - best[goal] >= GAIN or curve[-1][goal] >= target
            if gained:
                best, useless = curve[-1], 0
            else:
                knob.move(-1)
        if not gained:
            useless += 1
            knobs.append(knobs.pop(0))
    return best, curve


def _knobs(index: Any) -> list[Knob]:
    """What can be turned: cells or neighbours to look at, candidates to compare again."""
    core, knobs = core_of(index), []
    if isinstance(core, faiss.IndexIVF):
        cells = faiss.downcast_index(core.quantizer)

        def probe(count: int) -> None:
            core.nprobe = count
            if isinstance(cells, faiss.IndexHNSW):
                cells.hnsw.efSearch = max(64, 2 * count)

        powers = [2**power for power in range(core.nlist.bit_length()) if 2**power < core.nlist]
        knobs.append(Knob("nprobe", probe, [*powers, core.nlist]))
    if isinstance(core, faiss.IndexHNSW):
        values = [2**power for power in range(4, 12)]
        knobs.append(Knob("efSearch", lambda count: setattr(core.hnsw, "efSearch", count), values))
    if isinstance(index, faiss.IndexRefine):
        knobs.append(Knob("k_factor", lambda count: setattr(index, "k_factor", count), [4, 8, 16, 32, 64, 128]))
    return knobs


def _without_self(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Neighbours without the query itself; int64 [Q, k] from [Q, k + 1]. If it did not find itself its last goes."""
    others = found != own[:, None]
    return np.take_along_axis(found, np.argsort(~others, axis=1, kind="stable")[:, :-1], axis=1)


def _interval(share: np.ndarray) -> list[float]:
    """95 % interval of a mean of shares, each query one observation: Wilson's, cautious where shares are not 0 or 1."""
    low, high = wilson_interval(round(float(share.sum())), len(share))
    return [round(low, 4), round(high, 4)]


def _shown(sources: Sequence[Embeddings], progress: Progress) -> Iterator[np.ndarray]:
    for source in sources:
        for chunk in source.chunks():
            yield chunk
            progress.advance(len(chunk))
