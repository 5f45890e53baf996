import numpy as np
import pytest
import torch

from curation.hashes import hamming
from curation.join import hash_pairs, knn_pairs, pair_recall, self_pairs, wilson_interval


def unit_vectors(num: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def as_set(pairs: np.ndarray) -> set[tuple[int, int]]:
    return set(map(tuple, pairs.tolist()))


def test_neighbours_equal_brute_force():
    queries, base = unit_vectors(30, 8), unit_vectors(50, 8, seed=1)
    similarity = queries @ base.T
    expected = {(q, int(b)) for q in range(30) for b in np.argsort(-similarity[q])[:5] if similarity[q, b] >= 0.4}
    assert as_set(knn_pairs(queries, base, k=5, threshold=0.4)) == expected


def test_blocks_of_neighbours_are_merged(monkeypatch):
    queries, base = unit_vectors(30, 8), unit_vectors(50, 8, seed=1)
    expected = knn_pairs(queries, base, k=5, threshold=-1)
    monkeypatch.setattr("curation.join.QUERIES", 7)
    monkeypatch.setattr("curation.join.BASE", 3)
    np.testing.assert_array_equal(knn_pairs(queries, base, k=5, threshold=-1), expected)
    units = [knn_pairs(queries, base, k=5, threshold=-1, rows=rows) for rows in ((0, 9), (9, 30))]
    np.testing.assert_array_equal(np.concatenate(units), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_neighbours_on_a_gpu():
    queries, base = unit_vectors(300, 64), unit_vectors(5000, 64, seed=1)
    found = as_set(knn_pairs(queries, base, k=16, threshold=0.2, device="cuda"))
    assert len(found ^ as_set(knn_pairs(queries, base, k=16, threshold=0.2))) <= 4


def test_more_neighbours_than_images_are_all_images():
    vectors = unit_vectors(2, 8)
    assert as_set(self_pairs(knn_pairs(vectors, vectors, k=64, threshold=-1))) == {(0, 1)}


@pytest.mark.parametrize("distance", [0, 3, 10])
def test_hash_pairs_connect_what_brute_force_connects(distance):
    generator = np.random.default_rng(0)
    start = generator.integers(0, 2**63, 40, dtype=np.uint64)
    flips = np.uint64(1) << generator.integers(0, 64, (40, 4), dtype=np.uint64)
    hashes = np.concatenate([start, start ^ flips[:, 0], start ^ np.bitwise_or.reduce(flips, axis=1), start[:5]])
    both = np.stack([hashes, generator.permutation(hashes)], axis=1)
    found = as_set(hash_pairs(both, both, distance=distance))
    for q, pair in enumerate(both):
        for side in (0, 1):
            near = np.flatnonzero(hamming(np.repeat(pair[side], len(hashes)), hashes) <= distance)
            firsts = {int(np.flatnonzero(hashes == hashes[b])[0]) for b in near}  # of equal hashes the first stands in
            assert {(q, b) for b in firsts} <= found
    for q, b in found:
        assert hamming(both[q], np.repeat(hashes[b], 2)).min() <= distance


def test_a_thousand_equal_hashes_give_a_thousand_pairs():
    hashes = np.full((1000, 2), 7, dtype=np.uint64)
    assert as_set(self_pairs(hash_pairs(hashes, hashes, distance=4))) == {(0, i) for i in range(1, 1000)}


def test_self_pairs_are_ordered_distinct_and_not_loops():
    assert self_pairs(np.array([[2, 1], [1, 2], [3, 3], [0, 3]])).tolist() == [[0, 3], [1, 2]]


def test_recall_counts_what_the_graph_lost():
    vectors = unit_vectors(60, 3)
    everything = self_pairs(np.argwhere(vectors @ vectors.T >= 0.8))
    assert pair_recall(vectors, everything, np.arange(60), threshold=0.8) == (len(everything), len(everything))
    assert pair_recall(vectors, everything[1:], np.arange(60), threshold=0.8) == (len(everything) - 1, len(everything))
    at_ten = {tuple(p) for p in everything.tolist() if 10 in p}
    assert pair_recall(vectors, everything, np.array([10]), threshold=0.8) == (len(at_ten), len(at_ten))


def test_interval_of_a_share():
    low, high = wilson_interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(1000, 1000)[0] > 0.99
