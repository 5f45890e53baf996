"""The order is a fair shuffle of each epoch, computed place by place."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from pretrain.data import order
from pretrain.data.order import samples_at


@pytest.mark.parametrize("n", [1, 2, 3, 5, 63, 64, 65, 1000, 4097])
def test_every_sample_once_per_epoch(n):
    order = samples_at(7, np.arange(3 * n), n).reshape(3, n)
    assert order.dtype == np.int64
    assert (np.sort(order, axis=1) == np.arange(n)).all()


def test_places_are_independent_of_what_is_asked_with_them():
    whole = samples_at(7, np.arange(250), 100)
    assert [samples_at(7, np.array([place]), 100)[0] for place in range(250)] == whole.tolist()
    shuffled = np.random.default_rng(0).permutation(250)
    assert (samples_at(7, shuffled, 100) == whole[shuffled]).all()


def test_seek_far_into_a_large_set():
    n = 1_689_000_000
    far = 10**6 * 2048 + np.arange(2048)
    samples = samples_at(0, far, n)
    assert len(set(samples.tolist())) == 2048
    assert samples.min() >= 0
    assert samples.max() < n
    assert abs(samples.mean() / n - 0.5) < 0.03  # 4.7 standard deviations


def test_epochs_and_seeds_differ():
    first, second = samples_at(0, np.arange(2000), 1000).reshape(2, 1000)
    other = samples_at(1, np.arange(1000), 1000)
    # Two independent permutations agree in one place on average.
    assert (first == second).sum() < 8
    assert (first == other).sum() < 8
    assert (first == np.arange(1000)).sum() < 8


def chi_square(counts: list[int]) -> float:
    """Deviation from equal counts in standard deviations of the chi-square statistic."""
    expected = sum(counts) / len(counts)
    freedom = len(counts) - 1
    return (sum((count - expected) ** 2 / expected for count in counts) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_small_set_are_equally_likely(n):
    epochs = 480
    orders = Counter(map(tuple, samples_at(1, np.arange(epochs * n), n).reshape(epochs, n).tolist()))
    assert chi_square([orders[order] for order in itertools.permutations(range(n))]) < 4


def test_neighbours_are_unrelated():
    n = 100_000
    order = samples_at(3, np.arange(n), n)
    steps = np.bincount((np.diff(order) % n) * 100 // n, minlength=100)
    assert chi_square(steps.tolist()) < 4
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.015


# The defects of the reference's samplers (method 2.5), each as what must hold instead.


def test_a_resumed_run_goes_on_in_the_same_shuffle():
    """The reference starts another shuffle at a resume: some images come twice in an epoch, others not at all."""
    whole = samples_at(0, np.arange(300), 100)
    before, after = samples_at(0, np.arange(130), 100), samples_at(0, np.arange(130, 300), 100)
    assert np.concatenate([before, after]).tolist() == whole.tolist()


@pytest.mark.parametrize("advance", [900, 1000, 1500, 2000])
@pytest.mark.parametrize("ranks", [1, 4])
def test_seeking_beyond_an_epoch_lands_where_walking_does(advance, ranks):
    """The reference's sharded sampler is right only while it advances by less than the size of the data."""
    n, step = 1000, 20
    walked = samples_at(0, np.arange(3 * n), n)
    for rank in range(ranks):
        slots = np.arange(step // ranks) + rank * (step // ranks)
        sought = samples_at(0, advance + slots, n)
        assert sought.tolist() == walked[advance + slots].tolist()


def test_every_rank_meets_every_sample():
    """The reference's sharded sampler gives each rank one fixed part of the data for ever."""
    n, ranks, batch = 64, 4, 16
    seen = [set(), set(), set(), set()]
    for step in range(30 * n // batch):
        for rank in range(ranks):
            seen[rank] |= set(samples_at(0, step * batch + rank * 4 + np.arange(4), n).tolist())
    assert all(len(part) == n for part in seen)


@pytest.mark.parametrize("n", [10**4, 10**6, 1_689_000_000])
def test_a_batch_costs_the_same_for_any_number_of_samples_and_ranks(monkeypatch, n):
    """The reference shuffles the whole set in Python on every rank. Here: hashed values are counted, not time."""
    hashed = []
    mix = order._mix
    monkeypatch.setattr(order, "_mix", lambda values: hashed.append(values.size) or mix(values))
    places = 10**9 + np.arange(256)
    samples_at(0, places, n)
    assert sum(hashed) <= order.ROUNDS * 256 * 8  # cycle walking: fewer than 4 tries of each on average, 8 as a bound
    assert sum(hashed) >= order.ROUNDS * 256
