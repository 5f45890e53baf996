"""Shares are exact, totals are the largest that repeat nothing, and what cannot be is named."""

from collections.abc import Sequence

import numpy as np
import pytest

from curation.mixture import draw_mixture, largest_total, split
from runtime.errors import UserError


def draw(sizes: Sequence[int], weights: Sequence[float], size: int = 0, seed: int = 0) -> list[np.ndarray]:
    starts = np.cumsum([0, *sizes[:-1]])
    members = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return draw_mixture(members, [f"part{i}" for i in range(len(sizes))], weights, size=size, seed=seed)


@pytest.mark.parametrize(
    ("available", "weights"), [([100, 50], [1, 1]), ([7, 100, 3], [0.5, 0.3, 0.2]), ([5, 5, 5], [0.1, 0.1, 0.1])]
)
def test_the_largest_total_fits_and_one_more_does_not(available, weights):
    total = largest_total(available, weights)
    assert sum(split(total, weights)) == total
    assert all(n <= there for n, there in zip(split(total, weights), available, strict=True))
    exact = [(total + 1) * weight / sum(weights) for weight in weights]
    assert any(n > there + 1e-9 for n, there in zip(exact, available, strict=True))


def test_counts_follow_the_weights():
    assert split(10, [1, 1]) == [5, 5]
    assert split(10, [0.1, 0.2, 0.7]) == [1, 2, 7]
    assert split(11, [1, 1, 1]) == [4, 4, 3]


def test_a_mixture_repeats_nothing_and_is_the_same_again():
    drawn = draw([100, 40, 60], [2, 1, 1])
    assert [len(images) for images in drawn] == [80, 40, 40]
    everything = np.concatenate(drawn)
    assert len(np.unique(everything)) == len(everything)
    for once, again in zip(drawn, draw([100, 40, 60], [2, 1, 1]), strict=True):
        np.testing.assert_array_equal(once, again)
    assert draw([100, 40, 60], [2, 1, 1], seed=1)[0].tolist() != drawn[0].tolist()
    assert [len(images) for images in draw([100, 40, 60], [2, 1, 1], size=20)] == [10, 5, 5]


def test_too_large_a_size_is_named_with_the_largest_one():
    with pytest.raises(UserError, match=r"retrieval.size: 100 images need 50 of 'part1', 20 were selected\n.*most 40"):
        draw([100, 20], [1, 1], size=100)


def test_an_entry_without_images_is_named():
    with pytest.raises(UserError, match=r"retrieval.mixture: no image was selected for 'part1'"):
        draw([100, 0], [1, 1])
