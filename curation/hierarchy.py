"""Hierarchical k-means and balanced sampling from it (Vo et al. 2024, arXiv 2405.15613; DINOv3 sec. 3.1).

Level 1 clusters the images, level l + 1 clusters the centroids of level l. Drawing equally from the clusters of the
top level, then from theirs, and so on, evens out what plain k-means would still leave in proportion to the pool.

N images, D width of a vector, K_l clusters of level l.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.seeding import generator

from .clusters import assign, kmeans, ranks
from .unit_vectors import UnitVectors, as_vectors

PER_CLUSTER = 64  # images in a cluster of level 1 where the levels are not given (DINOv3: 85, Vo et al.: 74)
SHRINK = 10  # from one such level to the next (DINOv3: 25, 10, 8, 4)
MOST_LEVELS = 5  # as in DINOv3


@dataclass(frozen=True)
class Hierarchy:
    """A tree of clusters; each has at least one member."""

    parents: tuple[np.ndarray, ...]  # int64 [N], [K_1], [K_2], ...: the cluster one level up, for images first
    cosine: np.ndarray  # float32 [N], of each image to the centroid of its level-1 cluster

    def members(self, level: int) -> np.ndarray:
        """The cluster of each image at a level, counted from 1; int64 [N]."""
        cluster = self.parents[0]
        for parent in self.parents[1:level]:
            cluster = parent[cluster]
        return cluster

    def sizes(self, level: int) -> np.ndarray:
        """Images in each cluster of a level; int64 [K_level]."""
        return np.bincount(self.members(level))


def levels_for(num_images: int) -> tuple[int, ...]:
    """Clusters per level for a pool of this size: 64 images in a cluster of level 1, each level a tenth of the last.

    At most 5 levels, none of fewer than 4 clusters but the first.
    """
    levels = [max(1, num_images // PER_CLUSTER)]
    while len(levels) < MOST_LEVELS and levels[-1] // SHRINK >= 4:
        levels.append(levels[-1] // SHRINK)
    return tuple(levels)


def hierarchical_kmeans(
    values: np.ndarray | UnitVectors, levels: Sequence[int], *, iterations: int, resampling: int, seed: int
) -> Hierarchy:
    """Cluster unit vectors [N, D] into `levels`, most clusters first.

    Above level 1 every k-means is repeated `resampling` times on the points nearest to each centroid, half as many per
    cluster as it has on average: dense regions then weigh no more than sparse ones and the centroids spread out
    (Vo et al., resampling-clustering). A level has fewer clusters than asked for where some stay empty.
    """
    points = as_vectors(values)
    parents: list[np.ndarray] = []
    cosine = np.empty(0, dtype=np.float32)
    for level, wanted in enumerate(levels, 1):
        k = min(wanted, len(points))
        centroids = kmeans(points, k, iterations=iterations, seed=seed, purpose=f"level {level}")
        cell, closeness = assign(points, centroids)
        for step in range(resampling if level > 1 else 0):
            near = np.flatnonzero(ranks(cell, -closeness) < max(2, -(-len(points) // (2 * k))))
            centroids = kmeans(
                points.stored(near),
                min(k, len(near)),
                iterations=iterations,
                seed=seed,
                purpose=f"level {level} step {step}",
            )
            cell, closeness = assign(points, centroids)
        used, cell = np.unique(cell, return_inverse=True)
        parents.append(cell)
        points = as_vectors(centroids[used])
        if level == 1:
            cosine = closeness
    return Hierarchy(tuple(parents), cosine)


def water_fill(sizes: np.ndarray, target: int, priority: np.ndarray) -> np.ndarray:
    """How many to draw from groups of these sizes so that they give as equally as they can; int64 [n].

    min(c, size) for the largest c whose sum is at most `target`; what is then missing is drawn one each from groups
    that have more, those of smallest priority first. Sums to `target`, or to all there is.
    """
    if sizes.sum() <= target:
        return sizes.astype(np.int64)
    ordered = np.sort(sizes)
    smaller = np.concatenate([[0], np.cumsum(ordered)[:-1]])  # all of the groups before
    # If the groups before the i-th give all they have, the others can give this much each.
    level = (target - smaller) // (len(sizes) - np.arange(len(sizes)))
    quota = np.minimum(sizes, level[np.argmax(ordered > level)])
    more = np.flatnonzero(sizes > quota)
    first = more[np.argsort(priority[more], kind="stable")][: target - int(quota.sum())]
    quota[first] += 1
    return quota


def balanced_sample(hierarchy: Hierarchy, target: int, *, leaf: Literal["random", "closest"], seed: int) -> np.ndarray:
    """`target` images drawn from the top level down, each cluster's share split equally among those below it.

    Positions, sorted int64 [target]; N >= target. leaf: which images of a level-1 cluster are taken.
    """
    top = len(hierarchy.parents)
    quota = water_fill(hierarchy.sizes(top), target, _priority(seed, top, len(hierarchy.sizes(top))))
    for level in range(top - 1, 0, -1):
        sizes, parent = hierarchy.sizes(level), hierarchy.parents[level]
        priority = _priority(seed, level, len(sizes))
        order = np.argsort(parent, kind="stable")
        below = np.empty_like(sizes)
        for cluster, children in enumerate(np.split(order, np.flatnonzero(np.diff(parent[order])) + 1)):
            below[children] = water_fill(sizes[children], int(quota[cluster]), priority[children])
        quota = below
    cluster = hierarchy.parents[0]
    priority = -hierarchy.cosine if leaf == "closest" else _priority(seed, 0, len(cluster))
    return np.flatnonzero(ranks(cluster, priority) < quota[cluster])


def _priority(seed: int, level: int, count: int) -> np.ndarray:
    return generator(seed, "balanced sampling", level).random(count)
