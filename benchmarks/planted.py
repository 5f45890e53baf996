"""Vectors with planted near-duplicates, for the benchmarks of the join.

Long-tailed clusters of unit vectors (cosine about 0.42 within a cluster); 20 % of the rows are in planted groups, each
member at cosine 0.72 to 0.99 to the group's first.
"""

from pathlib import Path

import numpy as np

CHUNK = 100_000
IN_CLUSTER = 0.42  # cosine
LARGEST = 50  # rows of a planted group
PLANTED = 0.2  # share of rows in groups of near-duplicates


def planted_vectors(path: Path, num: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Write unit vectors as float16 `.npy` [num, dim] to `path`; the groups, one label per row, -1 for none: int64."""
    draw = np.random.default_rng(seed)
    num_clusters = max(8, num // 200)
    weight = 1 / np.arange(1, num_clusters + 1) ** 0.8
    centres = _unit(draw.standard_normal((num_clusters, dim), dtype=np.float32))
    cluster = draw.choice(num_clusters, num, p=weight / weight.sum())
    sizes = np.minimum(2 + draw.pareto(1.5, num).astype(np.int64), LARGEST)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), PLANTED * num) + 1]
    place = draw.permutation(num)[: sizes.sum()]
    group = np.full(num, -1, dtype=np.int64)
    group[place] = np.repeat(np.arange(len(sizes)), sizes)[: len(place)]
    firsts = place[np.cumsum(sizes) - sizes]
    base = np.empty((len(sizes), dim), dtype=np.float32)  # of each group, its first vector
    base[:] = _around(centres[cluster[firsts]], IN_CLUSTER**0.5, draw)
    result = np.lib.format.open_memmap(path, "w+", dtype=np.float16, shape=(num, dim))
    for start in range(0, num, CHUNK):
        rows = np.arange(start, min(start + CHUNK, num))
        values = _around(centres[cluster[rows]], IN_CLUSTER**0.5, draw)
        member = np.flatnonzero(group[rows] >= 0)
        cosine = draw.uniform(0.72, 0.99, (len(member), 1)).astype(np.float32)
        values[member] = _around(base[group[rows[member]]], cosine, draw)
        first = np.flatnonzero(np.isin(rows, firsts))
        values[first] = base[group[rows[first]]]
        result[rows] = values
    result.flush()
    return group


def _around(centre: np.ndarray, cosine: float | np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Unit vectors at a cosine to their centres (about: noise is nearly orthogonal in many dimensions)."""
    noise = _unit(draw.standard_normal(centre.shape, dtype=np.float32))
    return _unit(cosine * centre + np.sqrt(1 - np.square(cosine)) * noise)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)
