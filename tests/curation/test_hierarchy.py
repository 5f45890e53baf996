"""Quotas against an exhaustive search, trees that hold every image, and a long tail that comes out even."""

import itertools

import numpy as np
import pytest

from curation.hierarchy import Hierarchy, balanced_sample, hierarchical_kmeans, levels_for, water_fill


def slow_quota(sizes: list[int], target: int) -> list[int]:
    """The largest common cap whose sum does not exceed the target, found by counting up."""
    cap = 0
    while sum(min(cap + 1, size) for size in sizes) <= target and cap < max(sizes):
        cap += 1
    return [min(cap, size) for size in sizes]


def long_tail(dim: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(unit vectors, concept): 2000 images of one concept, then 300, 100 and 20 concepts of 20."""
    sizes = [2000, 300, 100] + [20] * 20
    rng = np.random.default_rng(seed)
    concept = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.normal(size=(len(sizes), dim))[concept] * 3 + rng.normal(size=(len(concept), dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), concept


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [3, 0, 7, 2], [10, 1, 4, 4, 9], [2, 2, 2, 100]])
def test_quotas_are_the_water_filling_ones_for_every_target(sizes):
    for target in range(sum(sizes) + 3):
        quota = water_fill(np.array(sizes), target, np.arange(len(sizes)))
        assert quota.sum() == min(target, sum(sizes))
        slow = np.array(slow_quota(sizes, target))
        assert ((quota - slow >= 0) & (quota - slow <= 1) & (quota <= sizes)).all()


def test_what_equal_shares_leave_goes_to_the_first_by_priority():
    assert water_fill(np.array([9, 9, 1, 9]), 12, np.array([0.3, 0.1, 0.0, 0.2])).tolist() == [3, 4, 1, 4]
    assert water_fill(np.array([9, 9, 9]), 1, np.array([2, 0, 1])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("images", "levels"),
    [(10, (1,)), (3000, (46, 4)), (20_000, (312, 31)), (1_000_000, (15625, 1562, 156, 15)), (10**10, None)],
)
def test_levels_for_a_pool(images, levels):
    found = levels_for(images)
    assert levels is None or found == levels
    assert len(found) <= 5
    assert all(a > b for a, b in itertools.pairwise(found))


def test_every_image_is_in_one_cluster_of_every_level():
    values, _ = long_tail()
    tree = hierarchical_kmeans(values, (60, 12, 3), iterations=10, resampling=2, seed=0)
    assert [len(parent) for parent in tree.parents[1:]] == [tree.parents[0].max() + 1, tree.parents[1].max() + 1]
    for level in (1, 2, 3):
        sizes = tree.sizes(level)
        assert sizes.sum() == len(values)
        assert sizes.min() > 0
    np.testing.assert_array_equal(tree.members(2), tree.parents[1][tree.parents[0]])
    assert -1 <= tree.cosine.min() <= tree.cosine.max() <= 1


def test_shares_follow_the_tree_by_hand():
    # Top clusters 0 and 1; 0 holds the leaves 0 (6 images) and 1 (2), 1 holds the leaf 2 (3 images).
    leaves = np.repeat([0, 1, 2], [6, 2, 3])
    tree = Hierarchy((leaves, np.array([0, 0, 1])), np.linspace(0, 1, 11, dtype=np.float32))
    chosen = balanced_sample(tree, 8, leaf="closest", seed=0)
    # 5 and 3 at the top; then 3 and 2 below cluster 0; the nearest of leaf 0 are its last.
    assert chosen.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert np.bincount(leaves[balanced_sample(tree, 8, leaf="random", seed=0)]).tolist() == [3, 2, 3]


def test_the_head_of_a_long_tail_shrinks_and_the_tail_stays():
    """More than flat k-means manages, and more with resampling than without; means over 4 seeds."""
    values, concept = long_tail()
    before = np.bincount(concept) / len(concept)
    head: dict[str, float] = {}
    shares: list[np.ndarray] = []
    for name, levels, resampling in (("flat", (200,), 0), ("plain", (400, 100, 24), 0), ("full", (400, 100, 24), 10)):
        shares = []
        for seed in range(4):
            tree = hierarchical_kmeans(values, levels, iterations=20, resampling=resampling, seed=seed)
            chosen = balanced_sample(tree, 500, leaf="random", seed=seed)
            assert len(np.unique(chosen)) == 500
            shares.append(np.bincount(concept[chosen], minlength=len(before)) / 500)
        head[name] = float(np.mean(shares, axis=0)[0])
    # `shares` are now those of the full method: no concept of the tail is lost, and the tail has gained.
    assert (np.min(shares, axis=0)[3:] > 0).all()
    assert np.mean(shares, axis=0)[3:].sum() > 1.5 * before[3:].sum()
    assert before[0] > 0.7
    assert head["full"] < before[0] / 1.8
    assert head["full"] < head["plain"] < head["flat"]


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    values, _ = long_tail()
    drawn = []
    for seed in (0, 0, 1):
        tree = hierarchical_kmeans(values, (40, 6), iterations=5, resampling=2, seed=seed)
        drawn.append(balanced_sample(tree, 300, leaf="random", seed=seed).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_more_clusters_than_points_become_as_many_as_there_are():
    values = long_tail()[0][::400]
    tree = hierarchical_kmeans(values, (50, 20, 2), iterations=5, resampling=3, seed=0)
    assert tree.sizes(1).sum() == len(values)
    assert balanced_sample(tree, len(values), leaf="closest", seed=0).tolist() == list(range(len(values)))
