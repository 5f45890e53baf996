"""How do the joins that do not compare everything grow, what do they find, and how much memory do they take?

Vectors of width 384 with planted near-duplicates (`planted.py`), threshold 0.7: exact join, join in k-means cells, and
compressed codes scored again from disk, as the stages of `troodon curate` run them. Each in a process of its own:
core-seconds (all threads), wall seconds, peak resident memory (mapped vectors included) less that of the process before
it began. Recall is measured on rows drawn at random, by exact search, apart from the sample that chose the number of
probes. With more than one thread the machine must be idle: threads that wait for a busy core are counted as work.

    python benchmarks/bench_join_ivf.py [--sizes 10000 100000 1000000] [--threads 1] [--exact-up-to 100000]
                                        [--codes-up-to 1000000]

Writes benchmarks/results/join_ivf.json.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_join import DIM, THRESHOLD, in_own_process, measured
from planted import planted_vectors

from curation.cells import Cells, cell_pairs, probes_for, train_cells, visit_cells
from curation.codes import build_codes, code_pairs
from curation.join import held, sample_pairs, wilson_interval
from curation.planner import MOST_PROBES, RECALL, plan_join
from curation.threshold import threshold_pairs
from curation.unit_vectors import map_parts
from runtime.environment import describe
from runtime.files import write_json

CPU = torch.device("cpu")
SAMPLE = 4000  # rows searched exactly to measure recall
TUNING = 2000  # other rows, to choose the number of probes
Found = tuple[np.ndarray, dict[str, Any]]


def exact(path: Path) -> Found:
    return threshold_pairs(map_parts([path]), threshold=THRESHOLD).index, {}


def ivf(path: Path) -> Found:
    vectors, phases = map_parts([path]), Phases()
    plan = plan_join(len(vectors), DIM, device=CPU, memory_budget=16 * 10**9, seconds_budget=0, asked="ivf")
    centroids = train_cells(vectors, plan.num_cells, seed=0)
    phases.done("train")
    visits = visit_cells(vectors, centroids, min(MOST_PROBES, plan.num_cells), device=CPU)
    phases.done("assign")
    rows = np.sort(np.random.default_rng(1).permutation(len(vectors))[:TUNING])
    probes, meet = probes_for(visits, sample_pairs(vectors, rows, threshold=THRESHOLD), recall=RECALL)
    phases.done("choose_probes")
    cells = Cells.of(np.ascontiguousarray(visits[:, :probes]), plan.num_cells)
    del visits
    phases.done("sort")
    pairs = cell_pairs(vectors, cells, threshold=THRESHOLD, device=CPU)
    phases.done("join")
    imbalance = float(cells.costs().sum() / (probes * len(vectors) ** 2 / plan.num_cells))
    facts = {"cells": plan.num_cells, "probes": probes, "tuning_recall": round(meet, 5), "imbalance": imbalance}
    return pairs.index, facts | {"planned_core_seconds": plan.seconds, "core_seconds_by_phase": phases.seconds}


def ivf_pq(path: Path) -> Found:
    vectors, phases = map_parts([path]), Phases()
    plan = plan_join(len(vectors), DIM, device=CPU, memory_budget=16 * 10**9, seconds_budget=0, asked="ivf_pq")
    index = build_codes(vectors, plan.num_cells, seed=0)
    phases.done("build")
    probes = min(MOST_PROBES, plan.num_cells)
    pairs = code_pairs(vectors, index, k=64, num_probes=probes, threshold=THRESHOLD)
    phases.done("search")
    facts = {"cells": plan.num_cells, "probes": probes, "code_bytes": index.code_size + 8}
    return pairs.index, facts | {"planned_core_seconds": plan.seconds, "core_seconds_by_phase": phases.seconds}


class Phases:
    """Core-seconds from one point of the work to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def done(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name], self.last = round(now - self.last, 2), now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact-up-to", type=int, default=100_000)
    parser.add_argument("--codes-up-to", type=int, default=1_000_000)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "question": "cost, memory and pair recall of the joins at growing sizes",
        "date": time.strftime("%Y-%m-%d"),
        "dim": DIM,
        "threshold": THRESHOLD,
        "threads": options.threads,
        "load_average_before": os.getloadavg()[0],
        "sizes": {},
        "environment": describe(),
    }
    for num in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vectors.npy"
            planted_vectors(path, num, DIM)
            methods = [ivf]
            methods += [exact] if num <= options.exact_up_to else []
            methods += [ivf_pq] if num <= options.codes_up_to else []
            result["sizes"][num] = compare(path, num, options.threads, methods)
        write_json(Path(__file__).parent / "results" / "join_ivf.json", result)
    columns = ("vectors", "core-s", "wall s", "peak MB", "/float16", "/float32", "recall")
    print(" " * 8, *(f"{column:>8}" for column in columns))
    for num, runs in result["sizes"].items():
        for name, run in runs.items():
            print(
                f"{name:8} {num:8} {run['core_seconds']:8.1f} {run['wall_seconds']:8.1f} {run['peak_mb']:8} "
                f"{run['peak_to_float16_vectors']:8.2f} {run['peak_to_float32_vectors']:8.2f} {run['recall']:8.4f}"
            )


def compare(path: Path, num: int, threads: int, methods: list[Callable[[Path], Found]]) -> dict[str, Any]:
    """Every method on the same vectors."""
    vectors = map_parts([path])
    rows = np.sort(np.random.default_rng(2).permutation(num)[:SAMPLE])
    sampled = sample_pairs(vectors, rows, threshold=THRESHOLD)
    runs = {}
    for method in methods:
        costs, (pairs, facts) = in_own_process(measured, threads, method, path)
        found = held(sampled, pairs)
        low, high = wilson_interval(found, len(sampled))
        runs[method.__name__] = costs | {
            "peak_to_float16_vectors": round(costs["peak_mb"] * 1e6 / (2 * DIM * num), 3),
            "peak_to_float32_vectors": round(costs["peak_mb"] * 1e6 / (4 * DIM * num), 3),
            "pairs": len(pairs),
            "sampled_pairs": len(sampled),
            "recall": round(found / len(sampled), 5),
            "recall_interval_95": [round(low, 5), round(high, 5)],
            **facts,
        }
        print(num, method.__name__, runs[method.__name__], flush=True)
    return runs


if __name__ == "__main__":
    main()
