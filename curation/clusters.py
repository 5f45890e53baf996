"""Spherical k-means cells, and the retrieval of whole cells around seed sets (DINOv2 A.4).

N pool images, K cells, D width of a vector.
"""

from dataclasses import dataclass

import faiss
import numpy as np

from runtime.seeding import generator

from .unit_vectors import UnitVectors, as_vectors

BLOCK = 1 << 16  # vectors that are compared with the centroids at a time
LEAST_POINTS = 39  # per cell: below this FAISS calls a k-means badly trained
MOST_POINTS = 256  # per cell: more do not move the centroids (FAISS' default)


def kmeans(values: np.ndarray | UnitVectors, k: int, *, iterations: int, seed: int, purpose: str) -> np.ndarray:
    """Unit-length centroids of spherical k-means; float32 [k, D].

    values: unit vectors [N, D], N >= k. At most 256 vectors per cell are trained on, drawn by
    (seed, purpose). The same centroids, bit by bit, for any number of threads.
    """
    vectors, draw = as_vectors(values), generator(seed, purpose)
    chosen = np.arange(len(vectors))
    if len(chosen) > MOST_POINTS * k:
        chosen = np.sort(draw.choice(len(vectors), MOST_POINTS * k, replace=False))
    model = faiss.Kmeans(
        vectors.dim,
        k,
        niter=iterations,
        spherical=True,
        seed=int(draw.integers(2**31)),
        min_points_per_centroid=1,  # the caller decides how few are too few
        max_points_per_centroid=MOST_POINTS,
    )
    model.train(vectors.take(chosen))
    assert model.centroids is not None  # since it is trained
    return as_vectors(model.centroids).take(np.arange(k))


def assign(values: np.ndarray | UnitVectors, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closest centroid of each vector and the cosine to it; int64 [N] and float32 [N].

    Exact, in blocks: of unit vectors that are mapped from disk [N, D] it holds one block in memory.
    """
    vectors = as_vectors(values)
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    cell = np.empty(len(vectors), dtype=np.int64)
    cosine = np.empty(len(vectors), dtype=np.float32)
    for start in range(0, len(vectors), BLOCK):
        similarity, found = index.search(vectors.take(slice(start, start + BLOCK)), 1)
        cell[start : start + BLOCK], cosine[start : start + BLOCK] = found[:, 0], similarity[:, 0]
    return cell, cosine.clip(-1, 1)


def most_cells(num_images: int) -> int:
    """The largest number of cells that this many images can train."""
    return max(1, num_images // LEAST_POINTS)


def ranks(cell: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """The place of each member within its cell, by ascending priority, then position; int64 [N], 0 is the first."""
    order = np.lexsort((priority, cell))
    starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
    result = np.empty(len(cell), dtype=np.int64)
    result[order] = np.arange(len(cell)) - np.repeat(starts, np.diff(starts, append=len(cell)))
    return result


@dataclass(frozen=True)
class SetRetrieval:
    """What one seed set retrieves."""

    images: np.ndarray  # int64 [E] positions in the pool, sorted
    cells: int  # that hold enough of its seeds
    found: int  # images before the cap per set


def retrieve_cells(
    cell: np.ndarray,
    rank: np.ndarray,
    seed_cell: np.ndarray,
    *,
    min_seeds: int,
    per_cell: int,
    per_set: int,
) -> SetRetrieval:
    """The images of every cell that holds more than `min_seeds` of one set's seeds (DINOv2 A.4).

    cell: int64 [N]; rank: int64 [N], place of an image in its cell; seed_cell: int64 [M], cells of the set's seeds.
    The first `per_cell` of a cell are taken. The paper does not say which images its cap of 1M per set leaves; here
    the cells give in turn, so that none is left out before the others.
    """
    counts = np.bincount(seed_cell, minlength=int(cell.max(initial=-1)) + 1)
    hit = counts > min_seeds
    images = np.flatnonzero(hit[cell] & (rank < per_cell))
    found = len(images)
    if found > per_set:
        images = np.sort(images[np.lexsort((cell[images], rank[images]))[:per_set]])
    return SetRetrieval(images, int(hit.sum()), found)
