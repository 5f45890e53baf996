"""Pairs of images worth a closer look: nearest neighbours by embedding, neighbours by perceptual hash, and recall.

Every function joins queries with a base and returns (query, base) index pairs; a self-join passes one set twice and
drops what is not an ordered pair with `self_pairs`. The other joins: `threshold` (all pairs), `cells`, `codes`.
"""

import faiss
import numpy as np
import torch

from .hashes import as_codes
from .threshold import threshold_pairs
from .unit_vectors import UnitVectors, as_vectors

QUERIES, BASE = 4096, 1 << 16  # vectors in float32 at a time in a search of nearest neighbours


def knn_pairs(
    queries: np.ndarray | UnitVectors,
    base: np.ndarray | UnitVectors,
    *,
    k: int,
    threshold: float,
    rows: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The k nearest base vectors of each query, of cosine >= threshold; int64 [E, 2], sorted by query.

    queries, base: unit vectors [N, D]. rows: only queries in this range (a work unit). Exact search in blocks, by FAISS
    on CPU and on CUDA where it is FAISS' GPU build, else by PyTorch; needs memory for one block of either side.
    """
    queries, base, device = as_vectors(queries), as_vectors(base), torch.device(device)
    begin, end = rows or (0, len(queries))
    k = min(k, len(base))
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(begin, end if k else begin, QUERIES):
        block = queries.take(slice(start, min(start + QUERIES, end)))
        best = np.full((len(block), k), -np.inf, dtype=np.float32)
        index = np.full((len(block), k), -1, dtype=np.int64)
        for column in range(0, len(base), BASE):
            others = base.take(slice(column, column + BASE))
            similarity, near = _nearest(block, others, min(k, len(others)), device)
            best = np.concatenate([best, similarity], axis=1)
            index = np.concatenate([index, near + column], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :k]
            best, index = np.take_along_axis(best, order, axis=1), np.take_along_axis(index, order, axis=1)
        close = best >= threshold
        found.append(np.stack([np.nonzero(close)[0] + start, index[close]], axis=1))
    return np.concatenate(found)


def _nearest(queries: np.ndarray, base: np.ndarray, k: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Inner products with the k nearest of a block, and their indices; float32 and int64 [Q, k]."""
    if device.type != "cuda":
        return faiss.knn(queries, base, k, faiss.METRIC_INNER_PRODUCT)
    if hasattr(faiss, "StandardGpuResources"):
        resources = faiss.StandardGpuResources()
        return faiss.knn_gpu(resources, queries, base, k, metric=faiss.METRIC_INNER_PRODUCT)
    left, right = (torch.from_numpy(side).to(device) for side in (queries, base))
    best = (left @ right.T).topk(k)
    return best.values.cpu().numpy(), best.indices.cpu().numpy()


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
    """Distinct unordered pairs, smaller index first, sorted; int64 [E, 2]. Indices are below 2^31."""
    a, b = np.sort(pairs, axis=1).T
    keys = np.unique(a[a != b] << 32 | b[a != b])
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)


def sample_pairs(
    vectors: np.ndarray | UnitVectors, sample: np.ndarray, *, threshold: float, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Every pair with cosine >= threshold of which one row or both are in the sample, by exact search; int64 [E, 2].

    Pairs are distinct, smaller index first, sorted. For rows drawn at random every pair is as likely to be here as any
    other, so that a share of these pairs estimates the share of all.
    """
    vectors = as_vectors(vectors)
    found = threshold_pairs(UnitVectors((vectors.stored(sample),)), vectors, threshold=threshold, device=device).index
    return self_pairs(np.stack([sample[found[:, 0]], found[:, 1]], axis=1))


def held(wanted: np.ndarray, pairs: np.ndarray) -> int:
    """How many of the wanted pairs are in `pairs`; both int64 [E, 2], ordered and distinct."""
    stride = np.int64(max(wanted.max(initial=0), pairs.max(initial=0)) + 1)
    return int(np.isin(wanted @ [stride, 1], pairs @ [stride, 1]).sum())


def pair_recall(
    vectors: np.ndarray | UnitVectors,
    pairs: np.ndarray,
    sample: np.ndarray,
    *,
    threshold: float,
    device: torch.device | str = "cpu",
) -> tuple[int, int]:
    """(found, all): pairs of cosine >= threshold with a sampled row, by exact search, and how many are in `pairs`."""
    there = sample_pairs(vectors, sample, threshold=threshold, device=device)
    return held(there, pairs), len(there)


def wilson_interval(found: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927).

    It takes draws for independent; pairs that share an image are not quite, so theirs is a little narrow.
    """
    if total == 0:
        return 0.0, 1.0
    z, share = 1.96, found / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
