"""Near-duplicates: neighbours in a graph, verified edges, connected components, one image per component (DINOv2 A.3).

Neighbours by embedding, by perceptual hash and by window views propose pairs. Without `dedup.verify` the cosine
decides, as in the paper; with it the two pictures are aligned and compared, which separates crops and captions from
look-alikes even where the embedding cannot.
"""

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
from .scoring import score_pairs
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
    settings = config.dedup
    chosen = remaining(rows, exact)
    values = vectors.of(chosen)
    neighbours = self_pairs(knn_pairs(values, values, k=settings.k + 1, threshold=settings.threshold))
    pairs = neighbours
    if settings.verify:
        hashes = rows.phash[chosen]
        proposed = [neighbours, self_pairs(hash_pairs(hashes, hashes, distance=settings.phash_candidates))]
        if settings.views:
            thumbs = read_thumbs(thumb_files(decode), chosen)
            proposed.append(self_pairs(view_pairs(thumbs, thumbs, k=settings.views + 1)))
        pairs = np.unique(np.concatenate(proposed), axis=0)
    cosine = cosines(values, values, pairs)
    if settings.verify:
        say(f"dedup: {len(pairs)} pairs proposed for {len(chosen)} images, to be verified")
        score = score_pairs(config, rows, decode, chosen[pairs], stage, stop)
        accepted = score >= settings.verify_threshold
    else:
        score = np.full(len(pairs), np.nan, dtype=np.float32)
        accepted = np.ones(len(pairs), dtype=bool)
    edges = chosen[pairs]
    write_table(stage.file("edges.parquet"), edge_table(edges, cosine, score, accepted))
    _write_groups(rows, exact, edges[accepted], stage)
    sample = generator(config.seed, "recall sample").permutation(len(chosen))[:RECALL_SAMPLE]
    found, total = pair_recall(values, neighbours, np.sort(sample), threshold=settings.threshold)
    of = stage.table("groups.parquet")
    stage.finish(
        **{"in": len(chosen), "out": len(chosen) - int(np.isin(of["row"].to_numpy(), chosen).sum())},
        candidate_pairs=len(pairs),
        edges=int(accepted.sum()),
        largest_group=int(np.unique(of["of"].to_numpy(), return_counts=True)[1].max(initial=0)) + 1,
        pair_recall={
            "search": f"exact inner products (FAISS IndexFlatIP), k={settings.k}",
            "means": f"of the pairs with cosine >= {settings.threshold}, the share that is in the k-NN graph",
            "sampled_images": len(sample),
            "pairs": total,
            "found": found,
            "recall": found / total if total else None,
            "interval_95": wilson_interval(found, total),
        },
    )


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


def _write_groups(rows: Rows, exact: Stage, edges: np.ndarray, stage: Stage) -> None:
    """Components of near-duplicate edges and exact copies together; the rows that do not stay, sorted."""
    copies = exact.table("duplicates.parquet")
    links = np.stack([copies["row"].to_numpy(), copies["of"].to_numpy()], axis=1)
    labels = components(len(rows.ids), np.concatenate([edges.reshape(-1, 2), links]))
    best = representatives(labels, rows.area, rows.num_bytes, rows.ids)
    gone = np.flatnonzero(best != np.arange(len(best)))
    write_table(stage.file("groups.parquet"), pa.table({"row": gone, "of": best[gone]}))


def surviving(chosen: np.ndarray, dedup: Stage) -> np.ndarray:
    """The chosen rows that stay for their groups; sorted int64."""
    return np.setdiff1d(chosen, dedup.table("groups.parquet")["row"].to_numpy())
