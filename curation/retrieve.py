"""Sample-based retrieval: for every seed image its nearest pool images (DINOv2 A.4)."""

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say

from .config import CurateConfig
from .embed import Vectors
from .join import cosines, knn_pairs
from .rows import Rows
from .stage import Stage


def retrieve_stage(config: CurateConfig, rows: Rows, vectors: Vectors, pool: np.ndarray, stage: Stage) -> None:
    """Write `neighbours.parquet` (every retrieval) and `selection.parquet` (every retrieved pool row once).

    pool: the rows to choose from, sorted int64. A pool image that several seeds retrieve is selected once, for the seed
    closest to it; the others are collisions.
    """
    stage.open()
    seed_rows = rows.of("seed")
    ours, theirs = vectors.of(seed_rows), vectors.of(pool)
    pairs = knn_pairs(ours, theirs, k=config.retrieval.k, threshold=config.retrieval.min_similarity)
    cosine = cosines(ours, theirs, pairs)
    order = np.lexsort((pairs[:, 1], -cosine, pairs[:, 0]))
    pairs, cosine = pairs[order], cosine[order]
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    rank = np.arange(len(pairs)) - np.repeat(starts, np.diff(starts, append=len(pairs)))
    seeds = seed_rows[pairs[:, 0]]
    table = pa.table(
        {
            "seed_row": seeds,
            "rank": rank,  # 0: the seed's nearest
            "row": pool[pairs[:, 1]],
            "cosine": cosine,
            "seed_set": rows.table["set"].take(pa.array(seeds)),
        }
    )
    write_table(stage.file("neighbours.parquet"), table)
    order = np.lexsort((seeds, -cosine, pairs[:, 1]))
    first = order[np.flatnonzero(np.diff(pairs[order, 1], prepend=-1))]
    write_table(stage.file("selection.parquet"), table.take(pa.array(first)).sort_by("row"))
    collisions = len(pairs) - len(first)
    say(f"retrieve: {len(first)} images for {len(seed_rows)} seeds ({collisions} retrieved more than once)")
    stage.finish(
        **{"in": len(pool), "out": len(first)},
        seeds=len(seed_rows),
        retrieved=len(pairs),
        collisions=collisions,
    )
