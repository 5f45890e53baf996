"""Near-duplicates: neighbours in a graph, verified edges, connected components, one image per component (DINOv2 A.3).

Neighbours by embedding, by perceptual hash and by window views propose pairs. Without `dedup.verify` the cosine
decides, as in the paper; with it the two pictures are aligned and compared, which separates crops and captions from
look-alikes even where the embedding cannot.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say
from runtime.seeding import generator
from runtime.signals import StopRequest

from .config import CurateConfig
from .embed import Vectors
from .exact import remaining
from .groups import components, representatives
from .join import cosines, hash_pairs, knn_pairs, pair_recall, self_pairs, wilson_interval
from .rows import Rows, read_thumbs, thumb_files
from .scoring import judge_pairs
from .stage import Stage
from .views import view_pairs

RECALL_SAMPLE = 1000  # rows searched exactly to measure the recall of the graph


def dedup_stage(
    config: CurateConfig,
    rows: Rows,
    vectors: Vectors,
    decode: Stage,
    exact: Stage,
    stage: Stage,
    stop: StopRequest | None,
) -> None:
    """Write `edges.parquet` (candidate pairs, scores, verdict) and `groups.parquet` (row -> the row that stays)."""
    stage.open()
    chosen = remaining(rows, exact)
    values = vectors.of(chosen)
    neighbours = self_pairs(knn_pairs(values, values, k=config.dedup.k + 1, threshold=config.dedup.threshold))
    pairs = _propose(config, rows, chosen, neighbours, decode) if config.dedup.verify else neighbours
    edges = chosen[pairs]
    say(f"dedup: {len(pairs)} pairs proposed for {len(chosen)} images")
    threshold = config.dedup.verify_threshold
    score, accepted = judge_pairs(config, rows, decode, edges, stage, stop, threshold=threshold)
    write_table(stage.file("edges.parquet"), edge_table(edges, cosines(values, values, pairs), score, accepted))
    groups = _groups(rows, exact, edges[accepted])
    write_table(stage.file("groups.parquet"), groups)
    _, sizes = np.unique(groups["of"].to_numpy(), return_counts=True)
    stage.finish(
        **{"in": len(chosen), "out": len(surviving(chosen, stage))},
        candidate_pairs=len(pairs),
        edges=int(accepted.sum()),
        largest_group=int(sizes.max(initial=0)) + 1,
        pair_recall=_measure_recall(config, values, neighbours),
    )


def _propose(config: CurateConfig, rows: Rows, chosen: np.ndarray, neighbours: np.ndarray, decode: Stage) -> np.ndarray:
    """Pairs for verification: the neighbours by embedding, by perceptual hash and by window views; int64 [E, 2]."""
    hashes = rows.phash[chosen]
    proposed = [neighbours, self_pairs(hash_pairs(hashes, hashes, distance=config.dedup.phash_candidates))]
    if config.dedup.views:
        thumbs = read_thumbs(thumb_files(decode), chosen)
        proposed.append(self_pairs(view_pairs(thumbs, thumbs, k=config.dedup.views + 1)))
    return np.unique(np.concatenate(proposed), axis=0)


def _measure_recall(config: CurateConfig, values: np.ndarray, neighbours: np.ndarray) -> dict[str, Any]:
    """What the graph of nearest neighbours holds of the pairs above the threshold, by exact search for a sample."""
    sample = np.sort(generator(config.seed, "recall sample").permutation(len(values))[:RECALL_SAMPLE])
    found, total = pair_recall(values, neighbours, sample, threshold=config.dedup.threshold)
    role = "; with verification they are proposals, beside those by hash and by views" if config.dedup.verify else ""
    return {
        "search": f"exact inner products (FAISS IndexFlatIP), k={config.dedup.k}",
        "means": f"of the pairs with cosine >= {config.dedup.threshold}, the share that is in the k-NN graph{role}",
        "sampled_images": len(sample),
        "pairs": total,
        "found": found,
        "recall": found / total if total else None,
        "interval_95": wilson_interval(found, total),
    }


def edge_table(edges: np.ndarray, cosine: np.ndarray, score: np.ndarray, accepted: np.ndarray) -> pa.Table:
    """Candidate pairs of rows (int64 [E, 2]); score is null where pictures were not compared."""
    missing = np.isnan(score)
    return pa.table(
        {
            "row_a": edges[:, 0],
            "row_b": edges[:, 1],
            "cosine": cosine,
            "score": pa.array(score, mask=missing),
            "accepted": accepted,
        }
    )


def _groups(rows: Rows, exact: Stage, edges: np.ndarray) -> pa.Table:
    """Components of near-duplicate edges and exact copies together: the rows that do not stay, and which stays."""
    copies = exact.table("duplicates.parquet")
    links = np.stack([copies["row"].to_numpy(), copies["of"].to_numpy()], axis=1)
    labels = components(len(rows.ids), np.concatenate([edges, links]))
    best = representatives(labels, rows.area, rows.num_bytes, rows.ids)
    gone = np.flatnonzero(best != np.arange(len(best)))
    return pa.table({"row": gone, "of": best[gone]})


def surviving(chosen: np.ndarray, dedup: Stage) -> np.ndarray:
    """The chosen rows that stay for their groups; sorted int64."""
    return np.setdiff1d(chosen, dedup.table("groups.parquet")["row"].to_numpy())
