"""k-means cells against a slow search, and DINOv2's rule for retrieving whole cells."""

import faiss
import numpy as np
import pytest

from curation.clusters import assign, kmeans, most_cells, ranks, retrieve_cells


def blobs(*sizes: int, dim: int = 16, spread: float = 0.2, seed: int = 0) -> np.ndarray:
    """Unit vectors around one random direction for each size, one direction after the other."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    values = np.repeat(centres, sizes, axis=0) + rng.normal(size=(sum(sizes), dim)) * spread / np.sqrt(dim)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_cells_are_the_closest_centroids_and_separate_what_lies_apart():
    values = blobs(200, 100, 50, 150)
    centroids = kmeans(values, 8, iterations=20, seed=0, purpose="test")
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    cell, cosine = assign(values, centroids)
    cosines = values @ centroids.T
    np.testing.assert_array_equal(cell, cosines.argmax(axis=1))
    np.testing.assert_allclose(cosine, cosines.max(axis=1), atol=1e-6)
    truth = np.repeat(np.arange(4), (200, 100, 50, 150))
    assert all(len(np.unique(truth[cell == k])) == 1 for k in np.unique(cell))


def test_float16_vectors_are_brought_back_to_unit_length():
    values = blobs(300)
    halves = values.astype(np.float16)
    centroids = kmeans(halves, 4, iterations=5, seed=0, purpose="test")
    _, cosine = assign(halves, centroids)
    assert cosine.max() <= 1
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    values = blobs(*[40] * 30, dim=64)
    before = faiss.omp_get_max_threads()
    try:
        results = []
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            centroids = kmeans(values, 20, iterations=10, seed=3, purpose="test")
            results.append((centroids.tobytes(), *(array.tobytes() for array in assign(values, centroids))))
    finally:
        faiss.omp_set_num_threads(before)
    assert results[0] == results[1]
    assert kmeans(values, 20, iterations=10, seed=4, purpose="test").tobytes() != results[0][0]


def test_more_than_256_images_for_a_cell_are_sampled():
    values = blobs(1000, 1000, dim=8)
    once, again = (kmeans(values, 2, iterations=10, seed=0, purpose="test") for _ in range(2))
    np.testing.assert_array_equal(once, again)
    cell, _ = assign(values, once)
    assert len(np.unique(cell[:1000])) == len(np.unique(cell[1000:])) == 1


@pytest.mark.parametrize(("images", "cells"), [(0, 1), (38, 1), (78, 2), (744_000_000, 19_076_923)])
def test_a_small_pool_has_few_cells(images, cells):
    assert most_cells(images) == cells


def test_ranks_within_cells():
    cell = np.array([1, 0, 1, 1, 0])
    assert ranks(cell, np.array([0.5, 0.2, 0.1, 0.5, 0.1])).tolist() == [1, 1, 0, 2, 0]
    assert ranks(np.empty(0, dtype=int), np.empty(0)).tolist() == []


def test_only_cells_with_more_than_the_least_seeds_are_retrieved_by_hand():
    cell = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    rank = ranks(cell, np.array([3, 1, 2, 0, 1, 4, 3, 2, 1]))
    seed_cell = np.array([0, 0, 0, 0, 2, 2, 2, 2, 2, 1, 1, 1])  # 4 seeds in cell 0, 5 in cell 2, 3 in cell 1
    found = retrieve_cells(cell, rank, seed_cell, min_seeds=3, per_cell=2, per_set=100)
    assert found.images.tolist() == [1, 2, 7, 8]
    assert (found.cells, found.found) == (2, 4)
    everything = retrieve_cells(cell, rank, seed_cell, min_seeds=2, per_cell=100, per_set=100)
    assert everything.images.tolist() == list(range(9))
    assert retrieve_cells(cell, rank, seed_cell, min_seeds=5, per_cell=2, per_set=9).images.tolist() == []
    assert retrieve_cells(cell, rank, np.empty(0, dtype=int), min_seeds=0, per_cell=2, per_set=9).cells == 0


def test_the_cap_per_set_takes_from_the_cells_in_turn():
    cell = np.repeat([0, 1, 2], [10, 2, 5])
    rank = ranks(cell, np.arange(len(cell)))
    found = retrieve_cells(cell, rank, np.array([0, 1, 2]), min_seeds=0, per_cell=10, per_set=8)
    assert found.found == 17
    assert np.bincount(cell[found.images]).tolist() == [3, 2, 3]
    assert found.images.tolist() == [0, 1, 2, 10, 11, 12, 13, 14]


def test_a_seed_in_a_cell_beyond_those_of_the_pool_retrieves_nothing():
    found = retrieve_cells(np.array([0, 0]), np.array([0, 1]), np.array([5, 5]), min_seeds=1, per_cell=9, per_set=9)
    assert found.images.tolist() == []
