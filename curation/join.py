"""Pairs of images worth a closer look: neighbours by embedding and by perceptual hash.

Every function joins queries with a base and returns (query, base) index pairs; a self-join passes one set twice and
drops what is not an ordered pair with `self_pairs`. At the sizes a laptop curates, exact search is also the fastest.
"""

import faiss
import numpy as np

from .hashes import as_codes

CHUNK = 1 << 16  # pairs whose cosines are computed at a time


def knn_pairs(queries: np.ndarray, base: np.ndarray, *, k: int, threshold: float) -> np.ndarray:
    """The k nearest base vectors of each query, of cosine >= threshold; int64 [E, 2].

    queries, base: unit vectors, float32 [N, D]. Exact search (FAISS IndexFlatIP).
    """
    if not len(queries) or not len(base):
        return np.empty((0, 2), dtype=np.int64)
    index = faiss.IndexFlatIP(base.shape[1])
    index.add(base)
    similarity, found = index.search(queries, min(k, len(base)))
    close = similarity >= threshold
    return np.stack([np.nonzero(close)[0], found[close]], axis=1)


def hash_pairs(queries: np.ndarray, base: np.ndarray, *, distance: int) -> np.ndarray:
    """Pairs whose 64-bit hashes differ in at most `distance` bits; int64 [E, 2].

    queries, base: uint64 [N, 2], the hash of an image and of its mirror image. Exact (FAISS IndexBinaryFlat). Images of
    one hash are searched once; of many such images the first stands for all, so that a thousand blank pictures give a
    thousand pairs and not a million.
    """
    if not len(queries) or not len(base):
        return np.empty((0, 2), dtype=np.int64)
    values, first = np.unique(base[:, 0], return_index=True)
    index = faiss.IndexBinaryFlat(64)
    index.add(as_codes(values))
    pairs = []
    for hashes in queries.T:
        lims, _, found = index.range_search(as_codes(np.ascontiguousarray(hashes)), distance + 1)  # "closer than"
        pairs.append(
            np.stack([np.repeat(np.arange(len(hashes)), np.diff(lims.astype(np.int64))), first[found]], axis=1)
        )
    return np.concatenate(pairs)


def self_pairs(pairs: np.ndarray) -> np.ndarray:
    """Distinct unordered pairs, smaller index first, sorted; int64 [E, 2]."""
    pairs = np.sort(pairs, axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def cosines(vectors: np.ndarray, others: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine of each pair of unit vectors (float32 [N, D]); float32 [E], at most 1."""
    result = np.empty(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), CHUNK):
        a, b = pairs[start : start + CHUNK].T
        result[start : start + CHUNK] = np.einsum("ed,ed->e", vectors[a], others[b])
    return result.clip(-1, 1)


def pair_recall(vectors: np.ndarray, pairs: np.ndarray, sample: np.ndarray, *, threshold: float) -> tuple[int, int]:
    """(found, all): pairs of cosine >= threshold with a sampled row, by exact search, and how many are in `pairs`."""
    exact = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(sample), 256):
        rows = sample[start : start + 256]
        a, b = np.nonzero(vectors[rows] @ vectors.T >= threshold)
        exact.append(np.stack([rows[a], b], axis=1))
    there, known = (edges @ [len(vectors), 1] for edges in (self_pairs(np.concatenate(exact)), pairs))
    return int(np.isin(there, known).sum()), len(there)


def wilson_interval(found: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.96, found / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
