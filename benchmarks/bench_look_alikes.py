"""What proposals by perceptual hash and the comparison of pictures cost.

Hashes are compared all with all, so the script measures them at growing sizes, on random hashes, and gives the seconds
per pair. The comparison of pictures is measured on random pairs of the embedded evaluation images.

    python benchmarks/bench_look_alikes.py

Core-seconds of one process on one thread. Writes benchmarks/results/look_alikes.json.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image

from curation.join import hash_pairs
from curation.verify import verify_pairs
from quickset import __file__ as quickset
from runtime.environment import describe
from runtime.files import write_json

HASHES = (25_000, 50_000, 100_000)
PAIRS = 512
SIDE = 64


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    load, draw = os.getloadavg()[0], np.random.default_rng(0)
    results: dict[str, Any] = {"hashes": {}}
    for num in HASHES:
        hashes = draw.integers(0, 2**63, size=(num, 2)).astype(np.uint64)
        seconds = timed(lambda hashes=hashes: hash_pairs(hashes, hashes, distance=12))
        results["hashes"][str(num)] = {
            "core_seconds": seconds,
            "nanoseconds_per_pair": round(1e9 * seconds / num**2, 3),
        }
    thumbs = pool_thumbs()
    pairs = draw.integers(0, len(thumbs), size=(PAIRS, 2))
    aspect = np.ones(len(thumbs), dtype=np.float32)
    verify_pairs(thumbs, aspect, pairs[:8], torch.device("cpu"))
    seconds = timed(lambda: verify_pairs(thumbs, aspect, pairs, torch.device("cpu")))
    results["verify"] = {"pairs": PAIRS, "core_seconds": seconds, "pairs_per_core_second": round(PAIRS / seconds)}
    report = {
        "question": "core-seconds of proposals by hash and of the comparison of pictures",
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": load,
        **results,
        "environment": describe(),
    }
    print(results)
    write_json(Path(__file__).parent / "results" / "look_alikes.json", report)


def timed(work: Callable[[], Any]) -> float:
    """Processor seconds of this process."""
    start = time.process_time()
    work()
    return round(time.process_time() - start, 2)


def pool_thumbs() -> np.ndarray:
    """Grey thumbnails of the embedded evaluation images; uint8 [N, 64, 64]."""
    files = sorted((Path(quickset).parent / "eval").rglob("*.jpg"))
    thumbs = []
    for file in files:
        with Image.open(file) as image:
            thumbs.append(np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return np.stack(thumbs)


if __name__ == "__main__":
    main()
