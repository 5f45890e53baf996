"""How much of the truth an index finds: recall against exact search, and the setting that reaches what is asked for."""

import time
from collections.abc import Callable, Iterator, Sequence
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


def measure(
    index: Any, sources: Sequence[Embeddings], *, queries: int, target: float, seed: int
) -> dict[str, Any] | None:
    """Recall against exact search, for a sample of the vectors as queries, themselves left out of their neighbours.

    Where the index has a knob (cells or neighbours to look at) it is turned up until recall at 10 is `target`, and left
    there. `curve` holds what was measured on the way. None with fewer than two vectors or no queries.
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
    name, turn, steps = _knob(index)
    curve = []
    for step in steps:
        turn(step)
        start = time.perf_counter()
        found = _without_self(index.search(values, depth + 1)[1], sample)
        seconds = time.perf_counter() - start
        first = found[:, 0] == truth[:, 0]
        share = (found[:, :, None] == truth[:, None, :]).any(axis=1).mean(axis=1)
        curve.append({
            name or "setting": step,
            "recall_at_1": round(float(first.mean()), 4), "interval_at_1": _interval(first),
            f"recall_at_{depth}": round(float(share.mean()), 4), f"interval_at_{depth}": _interval(share),
            "ms_per_query": round(1e3 * seconds / len(values), 4),
        })  # fmt: skip
        if share.mean() >= target:
            break
    return curve[-1] | {
        "queries": len(values),
        "threads": faiss.omp_get_max_threads(),
        "target": target,
        "curve": curve,
    }


def _knob(index: Any) -> tuple[str | None, Callable[[int], None], list[int]]:
    """What trades time for recall: its name, how it is turned, and the values to try in turn."""
    core = core_of(index)
    if isinstance(core, faiss.IndexIVF):
        cells = faiss.downcast_index(core.quantizer)

        def probe(count: int) -> None:
            core.nprobe = count
            if isinstance(cells, faiss.IndexHNSW):
                cells.hnsw.efSearch = max(64, 2 * count)

        return (
            "nprobe",
            probe,
            [2**power for power in range(core.nlist.bit_length()) if 2**power < core.nlist] + [core.nlist],
        )
    if isinstance(core, faiss.IndexHNSW):
        return "efSearch", lambda count: setattr(core.hnsw, "efSearch", count), [2**power for power in range(4, 12)]
    return None, lambda _: None, [0]


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
