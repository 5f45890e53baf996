"""What does the exact threshold join cost beside FAISS' exact search of neighbours, and does it find every pair?

100,000 vectors of width 384 with planted near-duplicates (`planted.py`), threshold 0.7. Interleaved repeats, every one
in a process of its own: core-seconds of the process (all threads), wall seconds, peak resident memory (mapped vectors
included) less that of the process before it began. The truth is float32 brute force on the same vectors. With more
than one thread the machine must be idle: threads that wait for a busy core are counted as work.

    python benchmarks/bench_join.py [--num 100000] [--repeats 3] [--threads 1]

Writes benchmarks/results/join.json.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from planted import planted_vectors

from curation import threshold as exact
from curation.join import held, self_pairs
from curation.unit_vectors import map_parts
from runtime.environment import describe
from runtime.files import write_json

DIM, THRESHOLD, K = 384, 0.7, 64


def faiss_flat(path: Path) -> np.ndarray:
    """IndexFlatIP with k = 64, float32: what DINOv2's k-NN graph takes."""
    values = map_parts([path]).take(slice(None))
    index = faiss.IndexFlatIP(DIM)
    index.add(values)
    similarity, found = index.search(values, K + 1)
    near = similarity >= THRESHOLD
    return self_pairs(np.stack([np.nonzero(near)[0], found[near]], axis=1))


def threshold_join(path: Path) -> np.ndarray:
    """All pairs, with the filter that is faster on this machine."""
    return exact.threshold_pairs(map_parts([path]), threshold=THRESHOLD).index


def threshold_join_float32(path: Path) -> np.ndarray:
    """All pairs, with float32 products as the filter."""
    exact.filter_dtype = lambda device: torch.float32
    return threshold_join(path)


METHODS = (faiss_flat, threshold_join, threshold_join_float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {method.__name__: [] for method in METHODS}
    result: dict[str, Any] = {
        "question": "core-seconds and pair recall of the exact threshold join beside IndexFlatIP k=64",
        "date": time.strftime("%Y-%m-%d"),
        "vectors": options.num,
        "dim": DIM,
        "threshold": THRESHOLD,
        "threads": options.threads,
        "load_average_before": os.getloadavg()[0],  # core-seconds and their ratios are the fair figures when busy
        "filter": str(exact.filter_dtype(torch.device("cpu"))),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        planted_vectors(path, options.num, DIM)
        truth = brute_force(path)
        result["true_pairs"] = len(truth)
        for repeat in range(options.repeats):
            for method in METHODS:
                run, pairs = in_own_process(measured, options.threads, method, path)
                run |= {"pairs": len(pairs), "recall": held(truth, pairs) / len(truth)}
                runs[method.__name__].append(run)
                print(f"{repeat} {method.__name__:24} {run}", flush=True)
            medians, ratios = summarise(runs)
            result |= {"repeats": repeat + 1, "medians": medians, "core_seconds_ratio_to_faiss_flat": ratios}
            result |= {"runs": runs, "environment": describe()}
            write_json(Path(__file__).parent / "results" / "join.json", result)
    print(f"\n{len(truth)} pairs of cosine >= {THRESHOLD} among {options.num} vectors; medians of {options.repeats}")
    print(f"{'':24} {'core-s':>8} {'ratio':>7} {'wall s':>8} {'peak MB':>8} {'recall':>8}")
    medians, ratios = summarise(runs)
    for name, median in medians.items():
        print(
            f"{name:24} {median['core_seconds']:8.1f} {ratios[name]:7.3f} {median['wall_seconds']:8.1f} "
            f"{median['peak_mb']:8.0f} {median['recall']:8.4f}"
        )


def summarise(runs: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Medians of each method's figures, and of its core-seconds to those of faiss_flat in the same repeat."""
    medians, ratios = {}, {}
    for name, several in runs.items():
        medians[name] = {key: statistics.median(run[key] for run in several) for key in several[0]}
        both = zip(several, runs["faiss_flat"], strict=True)
        ratios[name] = round(statistics.median(run["core_seconds"] / flat["core_seconds"] for run, flat in both), 4)
    return medians, ratios


def brute_force(path: Path) -> np.ndarray:
    """Pairs a < b with cosine >= THRESHOLD by plain float32 products, a thousand rows at a time; int64 [E, 2]."""
    values = map_parts([path]).take(slice(None))
    found = []
    for start in range(0, len(values), 1000):
        a, b = np.nonzero(values[start : start + 1000] @ values[start:].T >= np.float32(THRESHOLD))
        found.append(np.stack([a, b], axis=1)[a < b] + start)
    return np.concatenate(found)


def measured(threads: int, work: Callable[..., Any], *arguments: Any) -> tuple[dict[str, Any], Any]:
    """Costs and result of one call, in the process that it is called in."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    before = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(*arguments)
    costs = {
        "core_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "peak_mb": round((peak_memory() - before) / 1e6),
        "baseline_mb": round(before / 1e6),
    }
    return costs, result


def peak_memory() -> int:
    """Most resident bytes of this process so far, mapped files included; getrusage's figure is of its parents too."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(peak)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh interpreter, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
