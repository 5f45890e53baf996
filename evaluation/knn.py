"""k-nearest-neighbour classification on frozen features, as DINOv2's evaluation does it.

N train images, M test images, D width, K neighbours, C classes.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.seeding import generator


def neighbours(
    train: Tensor, test: Tensor | None, *, k: int, device: torch.device | str = "cpu", products: int = 2**27
) -> tuple[Tensor, Tensor]:
    """Cosines [M, K] and train rows [M, K] of the nearest train images of each test image, nearest first.

    train [N, D], test [M, D], any scale. `test=None`: every train image against all others (M = N), never itself.
    products: largest number of cosines held at a time (4 bytes each).
    """
    train = F.normalize(train.to(device), dim=1)
    queries = train if test is None else F.normalize(test.to(device), dim=1)
    cosines, rows = [], []
    block = max(1, products // len(train))
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ train.T  # [block, N]
        if test is None:
            similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -torch.inf
        top = similarity.topk(k, dim=1)
        cosines.append(top.values.cpu())
        rows.append(top.indices.cpu())
    return torch.cat(cosines), torch.cat(rows)


def vote(cosines: Tensor, labels: Tensor, *, k: int, temperature: float = 0.07) -> Tensor:
    """Predicted class [M]: each of the k nearest votes for its label with weight exp(cosine / temperature).

    cosines [M, K], labels [M, K] int64 of the neighbours, nearest first, K >= k. DINOv2 takes a softmax over 200
    neighbours before it cuts to k; that divides all votes of an image by one number and changes no prediction.
    """
    weights = (cosines[:, :k] / temperature).softmax(dim=1)
    votes = weights.new_zeros(len(labels), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[:, :k], weights).argmax(dim=1)


def knn_correct(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray | None,
    test_labels: np.ndarray,
    *,
    k: Iterable[int],
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, np.ndarray]:
    """For each k, whether each test image is classified rightly: bool [M]. `test=None`: leave-one-out.

    train [N, D] and test [M, D] float32, labels int64 [N] and [M]. A k above the number of train images is lowered
    to it (the key says what was used).
    """
    largest = len(train) - (test is None)
    used = sorted({min(value, largest) for value in k})
    cosines, rows = neighbours(
        torch.from_numpy(train), None if test is None else torch.from_numpy(test), k=used[-1], device=device
    )
    labels = torch.from_numpy(train_labels)[rows]  # [M, K]
    return {value: vote(cosines, labels, k=value, temperature=temperature).numpy() == test_labels for value in used}


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray | None,
    test_labels: np.ndarray,
    *,
    k: int,
    temperature: float = 0.07,
) -> float:
    """Share of test images [M, D] that the k nearest train images [N, D] classify rightly."""
    (correct,) = knn_correct(train, train_labels, test, test_labels, k=[k], temperature=temperature).values()
    return float(correct.mean())


def bootstrap_interval(
    correct: np.ndarray, *, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of an accuracy over the drawing of test images (Efron 1979).

    correct: bool [M]. A resample with replacement of M yes-or-no values has a binomial number of yes, so that number
    is drawn instead of M indices. The train images stay as they are: their choice adds spread that is not in here.
    """
    num = len(correct)
    means = generator(seed, "bootstrap").binomial(num, correct.mean(), resamples) / num
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
