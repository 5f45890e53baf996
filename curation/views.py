"""Which images may be a crop of which: whole pictures searched among windows of the others, with nothing trained.

Each image gives V windows (the whole, and 3 x 3 windows at three sizes); each window becomes 64 numbers, an 8 x 8
thumbnail of normalised local contrast. A cropped copy's whole lies near one window of its original, and of a mirror
image the mirrored whole does. It finds the pairs that a general embedding ranks low; pixel verification then decides.

N images, V windows, D = GRID * GRID.
"""

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8  # cells per side of a window
RADIUS = 8  # pixels of a thumbnail, of the window in which contrast is normalised
SIZES = (1.0, 0.87, 0.75, 0.66)  # of a window's side to the image's
NOISE = 16.0  # grey levels squared
CHUNK = 512  # images computed at a time


def windows(side: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of every window in a thumbnail of `side` pixels; the whole comes first."""
    found = []
    for size in SIZES:
        width = round(side * size)
        steps = sorted({0, (side - width) // 2, side - width})
        found += [(top, left, width) for top in steps for left in steps]
    return found


def describe(thumbs: np.ndarray, *, only_whole: bool = False, mirrored: bool = False) -> np.ndarray:
    """Unit vectors of the windows of thumbnails; float16 [V, N, D] (V = 1 with only_whole).

    thumbs: uint8 [N, T, T].
    """
    cuts = windows(thumbs.shape[-1])[: 1 if only_whole else None]
    result = np.empty((len(cuts), len(thumbs), GRID * GRID), dtype=np.float16)
    for start in range(0, len(thumbs), CHUNK):
        images = torch.from_numpy(thumbs[start : start + CHUNK]).float()[:, None]
        contrast = _local_contrast(images.flip(-1) if mirrored else images)
        for index, (top, left, width) in enumerate(cuts):
            cells = F.adaptive_avg_pool2d(contrast[:, :, top : top + width, left : left + width], GRID).flatten(1)
            vectors = F.normalize(cells - cells.mean(1, keepdim=True), dim=1)
            result[index, start : start + CHUNK] = vectors.numpy()
    return result


def view_pairs(queries: np.ndarray, base: np.ndarray, *, k: int) -> np.ndarray:
    """(query, base) index pairs: for each query image the k base images that hold its whole best; int64 [E, 2].

    queries, base: thumbnails, uint8 [N, T, T]. An image that is in both sets finds itself too.
    """
    k = min(k, len(base))
    views = describe(base)
    wholes = [describe(queries, only_whole=True, mirrored=mirrored)[0] for mirrored in (False, True)]
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    index = np.full((len(queries), k), -1, dtype=np.int64)
    for view in views:
        for whole in wholes:
            similarity, found = faiss.knn(
                whole.astype(np.float32), view.astype(np.float32), k, faiss.METRIC_INNER_PRODUCT
            )
            best, index = _merge(best, index, similarity, found)
    pairs = np.stack([np.repeat(np.arange(len(queries)), k), index.reshape(-1)], axis=1)
    return pairs[pairs[:, 1] >= 0]


def _merge(
    best: np.ndarray, index: np.ndarray, similarity: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k best distinct images of two result lists, similarity and index [Q, k] each."""
    k = best.shape[1]
    similarity, found = np.concatenate([best, similarity], 1), np.concatenate([index, found], 1)
    order = np.lexsort((found, -similarity))
    similarity, found = np.take_along_axis(similarity, order, 1), np.take_along_axis(found, order, 1)
    again = np.tril(found[:, :, None] == found[:, None, :], -1).any(2)  # ranks higher already
    similarity, found = np.where(again, -np.inf, similarity), np.where(again, -1, found)
    order = np.argsort(again, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1).astype(np.float32), np.take_along_axis(found, order, 1)


def _local_contrast(images: Tensor) -> Tensor:
    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * RADIUS + 1, stride=1, padding=RADIUS, count_include_pad=False)

    deviation = images - mean(images)
    return deviation / (mean(deviation.square()) + NOISE).sqrt()
