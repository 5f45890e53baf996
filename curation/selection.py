"""Three ways to choose among the images that are left: neighbours of seeds, cells around seeds, evenly from clusters.

Sample-based and cluster-based retrieval (DINOv2 A.4) and balanced sampling from hierarchical k-means (Vo et al. 2024,
arXiv 2405.15613). Images are given in the order of their content ids, which names and order of the input do not change.

N images to choose from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from runtime.errors import UserError
from runtime.progress import say
from runtime.seeding import generator
from runtime.world import choose_device

from .clusters import BLOCK, MOST_POINTS, assign, kmeans, most_cells, ranks, retrieve_cells
from .config import CurateConfig, active_methods
from .embed import Embedded
from .hierarchy import balanced_sample, hierarchical_kmeans, levels_for
from .join import knn_pairs
from .rows import Rows

SELECTION = pa.schema(
    [
        ("row", pa.int64()),
        ("method", pa.string()),  # the first that selected it of: seeds, sample, cluster, hierarchical; or all
        ("seed_row", pa.int64()),  # sample: the closest seed that retrieved it
        ("rank", pa.int32()),  # sample: its place among that seed's neighbours, 0 is the nearest
        ("cosine", pa.float32()),  # sample: to that seed
        ("seed_set", pa.string()),  # sample and cluster: the set that retrieved it; seeds: its own
    ]
)


@dataclass(frozen=True)
class Found:
    """What one way selects."""

    table: pa.Table  # SELECTION, each row once
    counts: dict[str, Any]
    neighbours: pa.Table | None = None  # SELECTION, every sample-based retrieval
    clusters: dict[str, np.ndarray] = field(default_factory=dict)  # columns [N] of clusters.parquet


def memory_bytes(config: CurateConfig, num_images: int, dim: int) -> int:
    """Bytes that the methods need at most beside the table of images, one after the other.

    k-means holds its training vectors as stored and in float32, and the centroids twice; searches hold one block.
    """
    options, methods = config.retrieval, active_methods(config)
    cells = [min(options.cluster.cells, most_cells(num_images))] if "cluster" in methods else []
    cells += [(options.hierarchical.levels or levels_for(num_images))[0]] if "hierarchical" in methods else []
    training = [6 * dim * min(num_images, MOST_POINTS * k) + 8 * dim * k for k in cells]
    return max(training, default=0) + 6 * dim * BLOCK + 40 * num_images


def selection_table(images: np.ndarray, method: str, **columns: Any) -> pa.Table:
    """Rows of the given images (int64 [E]) with the columns that their method has; the others are null."""
    values = {"row": images, "method": [method] * len(images)} | columns
    arrays = [
        pa.array(values[f.name], f.type) if f.name in values else pa.nulls(len(images), f.type) for f in SELECTION
    ]
    return pa.table(arrays, schema=SELECTION)


def seed_sets(rows: Rows, chosen: np.ndarray) -> list[str]:
    """The seed set of each of some seed rows."""
    return rows.table["set"].take(pa.array(chosen)).to_pylist()


def by_samples(config: CurateConfig, rows: Rows, vectors: Embedded, pool: np.ndarray) -> Found:
    """For every seed its k nearest pool images (DINOv2 A.4).

    A pool image of the seed's own bytes is not its neighbour. What several seeds retrieve is selected once, for the
    seed closest to it; the others are collisions.
    """
    k, seed_rows = config.retrieval.k, rows.of("seed")
    device = choose_device(config.device)
    least = config.retrieval.min_similarity
    pairs = knn_pairs(vectors.of(seed_rows), vectors.of(pool), k=k + 1, threshold=least, device=device)
    pairs = pairs[rows.ids[seed_rows[pairs[:, 0]]] != rows.ids[pool[pairs[:, 1]]]]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]  # equal cosines are ranked by content id
    cosine = vectors.cosines(np.stack([seed_rows[pairs[:, 0]], pool[pairs[:, 1]]], axis=1))
    rank = ranks(pairs[:, 0], -cosine)
    order = np.lexsort((rank, pairs[:, 0]))
    order = order[rank[order] < k]
    pairs, cosine, rank = pairs[order], cosine[order], rank[order]
    seeds, images = seed_rows[pairs[:, 0]], pool[pairs[:, 1]]
    table = selection_table(images, "sample", seed_row=seeds, rank=rank, cosine=cosine, seed_set=seed_sets(rows, seeds))
    order = np.lexsort((rows.ids[seeds], -cosine, images))
    first = order[np.flatnonzero(np.diff(images[order], prepend=-1))]
    ks = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
    by_k = [(few, int((rank < few).sum()), len(np.unique(images[rank < few]))) for few in ks]
    _, retrieved, unique = by_k[-1]
    say(f"retrieve: {unique} images for {len(seed_rows)} seeds ({retrieved - unique} retrieved more than once)")
    counts = {
        "retrieved": retrieved,
        "unique": unique,
        "collisions": retrieved - unique,
        "by_k": [{"k": few, "retrieved": n, "unique": u, "collisions": n - u} for few, n, u in by_k],
    }
    return Found(table.take(pa.array(first)), counts, neighbours=table)


def by_clusters(config: CurateConfig, rows: Rows, vectors: Embedded, pool: np.ndarray) -> Found:
    """For every seed set the images of the k-means cells with more than `min_seeds` of its seeds (DINOv2 A.4).

    What several sets retrieve counts for the first of them by name; the others are collisions.
    """
    options, seed_rows = config.retrieval.cluster, rows.of("seed")
    if not len(pool):
        return Found(selection_table(pool, "cluster"), {"cells": 0})
    cells = min(options.cells, most_cells(len(pool)))
    if cells < options.cells:
        say(f"retrieve: {cells} k-means cells instead of {options.cells}: {len(pool)} images give each 39 or more")
    values = vectors.of(pool)
    centroids = kmeans(values, cells, iterations=options.iterations, seed=config.seed, purpose="cells")
    cell, cosine = assign(values, centroids)
    seed_cell, _ = assign(vectors.of(seed_rows), centroids)
    closest = options.order == "closest"
    rank = ranks(cell, -cosine if closest else generator(config.seed, "order in cells").random(len(pool)))
    sets = np.array(seed_sets(rows, seed_rows), dtype=object)
    tables, counts = [], []
    for name in sorted(set(sets)):
        found = retrieve_cells(
            cell,
            rank,
            seed_cell[sets == name],
            min_seeds=options.min_seeds,
            per_cell=options.per_cell,
            per_set=options.per_set,
        )
        taken = len(found.images)
        tables.append(selection_table(pool[found.images], "cluster", seed_set=[name] * taken))
        counts.append(
            {
                "seed_set": name,
                "seeds": int((sets == name).sum()),
                "cells": found.cells,
                "retrieved": found.found,
                "taken": taken,
            }
        )
    table = pa.concat_tables(tables)
    _, first = np.unique(table["row"].to_numpy(), return_index=True)
    hit = sum(count["cells"] > 0 for count in counts)
    say(f"retrieve: {len(first)} images from cells around {hit} of {len(counts)} seed sets")
    return Found(
        table.take(pa.array(first)),
        {"cells": cells, "unique": len(first), "collisions": len(table) - len(first), "sets": counts},
        clusters={"cluster_id": cell, "cosine": cosine},
    )


def by_hierarchy(config: CurateConfig, rows: Rows, vectors: Embedded, pool: np.ndarray) -> Found:
    """`target` images, drawn evenly from hierarchical k-means (Vo et al. 2024).

    Raises UserError where fewer are left.
    """
    options, num_images = config.retrieval.hierarchical, len(pool)
    if options.target > num_images:
        raise UserError(
            f"retrieval.hierarchical.target: {options.target} images wanted, {num_images} are left to choose from\n"
            f"  give at most {num_images}"
        )
    levels: Sequence[int] = options.levels or levels_for(num_images)
    if levels[0] > num_images:
        raise UserError(
            f"retrieval.hierarchical.levels: {levels[0]} clusters of {num_images} images\n"
            f"  give fewer, or [] for {list(levels_for(num_images))}"
        )
    tree = hierarchical_kmeans(
        vectors.of(pool), levels, iterations=options.iterations, resampling=options.resampling, seed=config.seed
    )
    chosen = balanced_sample(tree, options.target, leaf=options.leaf, seed=config.seed)
    members = {level: tree.members(level) for level in range(1, len(levels) + 1)}
    counts = []
    for cluster in members.values():
        before, after = np.bincount(cluster), np.bincount(cluster[chosen])
        counts.append(
            {
                "clusters": len(before),
                "largest": int(before.max()),
                "median": float(np.median(before)),
                "drawn_from_one_at_most": int(after.max()),
            }
        )
    shape = " / ".join(str(count["clusters"]) for count in counts)
    say(f"retrieve: {len(chosen)} of {num_images} images drawn evenly from {shape} clusters")
    return Found(
        selection_table(pool[chosen], "hierarchical"),
        {"unique": len(chosen), "levels": counts},
        clusters={"cluster_id": members[1], "cosine": tree.cosine}
        | {f"level_{level}": cluster for level, cluster in members.items()},
    )
