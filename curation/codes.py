"""k-NN candidates from compressed codes (IVF with RaBitQ), scored again from the vectors on disk.

For pools whose vectors do not fit into memory: a code takes a bit per dimension and a few bytes. RaBitQ (Gao and Long
2024) trains many times faster than product quantisation for the same recall of near-duplicates. Codes only propose;
the stored vectors decide, with the same cosines as in every other join.
"""

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from runtime.files import replacing
from runtime.seeding import generator

from .cells import ITERATIONS, TRAINING_POINTS
from .threshold import Pairs, exact_cosines
from .unit_vectors import UnitVectors

BLOCK = 1 << 14  # vectors in float32 at a time
LEAST_K = 16  # candidates per vector, at least: codes rank roughly


def build_codes(vectors: UnitVectors, num_cells: int, *, seed: int) -> faiss.IndexIVF:
    """An IVF index of codes over all vectors; about D / 8 + 16 bytes each."""
    draw = generator(seed, "code training points")
    index = faiss.index_factory(vectors.dim, f"IVF{num_cells},RaBitQ", faiss.METRIC_INNER_PRODUCT)
    assert isinstance(index, faiss.IndexIVF)
    index.cp.seed = int(draw.integers(2**31))
    index.cp.niter = ITERATIONS
    index.cp.min_points_per_centroid = 1
    chosen = np.sort(draw.choice(len(vectors), min(len(vectors), TRAINING_POINTS * num_cells), replace=False))
    index.train(vectors.take(chosen))
    for start in range(0, len(vectors), BLOCK):
        index.add(vectors.take(slice(start, start + BLOCK)))
    return index


def write_codes(index: faiss.IndexIVF, path: Path) -> None:
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))


def read_codes(path: Path) -> faiss.IndexIVF:
    index = faiss.read_index(str(path))
    assert isinstance(index, faiss.IndexIVF)  # as write_codes left it
    return index


def code_pairs(
    vectors: UnitVectors,
    index: faiss.IndexIVF,
    *,
    k: int,
    num_probes: int,
    threshold: float,
    rows: tuple[int, int] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Pairs:
    """Pairs a < b of cosine >= threshold among the k candidates of each vector, and of those of `rows` only. Sorted.

    A pair found from both of its vectors comes from both of their units. `check` is called before each block.
    """
    index.nprobe = num_probes
    k = min(max(k, LEAST_K) + 1, len(vectors))  # every vector finds itself
    begin, end = rows or (0, len(vectors))
    found = []
    for start in range(begin, end, BLOCK):
        check()
        block = slice(start, min(start + BLOCK, end))
        _, near = index.search(vectors.take(block), k)
        pairs = np.stack([np.repeat(np.arange(block.start, block.stop), k), near.reshape(-1)], axis=1)
        pairs = np.sort(pairs[(near.reshape(-1) >= 0) & (pairs[:, 0] != pairs[:, 1])], axis=1)
        pairs = np.unique(pairs, axis=0)
        cosine = exact_cosines(vectors, vectors, pairs)
        close = cosine >= np.float32(threshold)
        found.append(Pairs(pairs[close], cosine[close]))
    return Pairs.joined(found).distinct()
