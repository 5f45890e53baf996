"""Mixtures: a share of the selection for each source or method, as DINOv3 found best (sec. 3.1, table 1)."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from runtime.errors import UserError
from runtime.seeding import generator


def largest_total(available: Sequence[int], weights: Sequence[float]) -> int:
    """The most images that a mixture of these weights can have without repeating one."""
    shares = _shares(weights)
    return min(int(count / share) for count, share in zip(available, shares, strict=True))


def split(total: int, weights: Sequence[float]) -> list[int]:
    """`total` images in proportion to the weights: rounded down, the rest to the largest remainders, first entry first.

    Sums to `total`. Exact arithmetic on the decimals that the config gives: 0.1 is a tenth.
    """
    exact = [total * share for share in _shares(weights)]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def draw_mixture(
    members: Sequence[np.ndarray], names: Sequence[str], weights: Sequence[float], *, size: int, seed: int
) -> list[np.ndarray]:
    """What is drawn for each entry of a mixture; sorted subsets of `members`.

    members: for each entry the images it can give, int64, in an order that does not depend on the input's; no image in
    two of them. size: images in all, 0 for as many as repeat none. Raises UserError when an entry has too few.
    """
    available = [len(images) for images in members]
    for name, count in zip(names, available, strict=True):
        if not count:
            raise UserError(
                f"retrieval.mixture: no image was selected for {name!r}\n  remove it, or select more before the mixture"
            )
    total = size or largest_total(available, weights)
    counts = split(total, weights)
    for name, count, there in zip(names, counts, available, strict=True):
        if count > there:
            raise UserError(
                f"retrieval.size: {total} images need {count} of {name!r}, {there} were selected\n"
                f"  give at most {largest_total(available, weights)}, 0 for that, or another weight"
            )
    return [
        np.sort(images[generator(seed, "mixture", name).permutation(len(images))[:count]])
        for images, name, count in zip(members, names, counts, strict=True)
    ]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]
