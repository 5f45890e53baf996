import numpy as np
import pytest
import torch

from curation.threshold import (
    Blocks,
    count_pairs,
    even_ranges,
    exact_cosines,
    filter_dtype,
    margin,
    threshold_pairs,
    triangle_costs,
)
from curation.unit_vectors import UnitVectors, as_vectors, map_parts

SMALL = Blocks(left=70, right=50, tile=16)


def unit_vectors(num: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def near_threshold(threshold: float, dim: int, num: int, seed: int = 0) -> np.ndarray:
    """2 num float16 vectors: pairs 2i, 2i + 1 whose cosines lie within 0.002 of the threshold."""
    generator = np.random.default_rng(seed)
    a = unit_vectors(num, dim, seed)
    other = unit_vectors(num, dim, seed + 1)
    other -= (other * a).sum(1, keepdims=True) * a
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = threshold + generator.uniform(-0.002, 0.002, (num, 1))
    b = cosine * a + np.sqrt(1 - cosine**2) * other
    return np.stack([a, b], axis=1).reshape(2 * num, dim).astype(np.float16)


def brute_force(left: np.ndarray, right: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    left, right = (side.astype(np.float64) for side in (left, right))
    left, right = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right))
    cosine = (left @ right.T).astype(np.float32)
    return {(int(i), int(j)): float(cosine[i, j]) for i, j in np.argwhere(cosine >= np.float32(threshold))}


def as_dict(pairs) -> dict[tuple[int, int], float]:
    assert pairs.index.dtype == np.int64
    assert len(np.unique(pairs.index, axis=0)) == len(pairs)
    return dict(zip(map(tuple, pairs.index.tolist()), pairs.cosine.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", [0.45, 0.7, 0.95])
@pytest.mark.parametrize("dim", [8, 64, 384])
def test_self_join_equals_brute_force_with_pairs_planted_at_the_threshold(monkeypatch, dtype, threshold, dim):
    monkeypatch.setattr("curation.threshold.filter_dtype", lambda device: dtype)
    vectors = near_threshold(threshold, dim, 150)
    expected = {pair: c for pair, c in brute_force(vectors, vectors, threshold).items() if pair[0] < pair[1]}
    assert 20 < sum(b == a + 1 and a % 2 == 0 for a, b in expected) < 130  # planted on both sides of the threshold
    pairs = threshold_pairs(vectors, threshold=threshold, blocks=SMALL)
    assert as_dict(pairs) == pytest.approx(expected, abs=2e-7)
    assert pairs.index.tolist() == sorted(pairs.index.tolist())


def test_queries_against_a_base():
    queries, base = near_threshold(0.6, 32, 60), near_threshold(0.6, 32, 80)
    pairs = threshold_pairs(queries, base, threshold=0.6, blocks=SMALL)
    assert as_dict(pairs) == pytest.approx(brute_force(queries, base, 0.6), abs=2e-7)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.01])
def test_low_thresholds_too(threshold):
    vectors = unit_vectors(60, 16)
    expected = {pair: c for pair, c in brute_force(vectors, vectors, threshold).items() if pair[0] < pair[1]}
    assert as_dict(threshold_pairs(vectors, threshold=threshold, blocks=SMALL)) == pytest.approx(expected, abs=2e-7)


def test_the_margin_holds_for_rounding_at_its_worst():
    """Numbers just below the middle between two bfloat16 values lose nearly all that rounding can take."""
    value = 1 + 2.0**-8 - 2.0**-12
    vector = np.full((1, 256), value / 16)
    assert abs(np.linalg.norm(vector) - 1) < 0.005
    rough = torch.from_numpy(vector).to(torch.bfloat16)
    lost = float((vector**2).sum() - (rough @ rough.T).double())
    assert 0.5 * margin(256) < lost < margin(256)


def test_units_give_what_the_whole_join_gives():
    vectors = near_threshold(0.7, 24, 120)
    whole = threshold_pairs(vectors, threshold=0.7, blocks=SMALL)
    ranges = even_ranges(triangle_costs(240, 10), 5)
    parts = [threshold_pairs(vectors, threshold=0.7, rows=(10 * a, min(240, 10 * b)), blocks=SMALL) for a, b in ranges]
    np.testing.assert_array_equal(np.concatenate([part.index for part in parts]), whole.index)
    np.testing.assert_array_equal(np.concatenate([part.cosine for part in parts]), whole.cosine)


def test_units_of_a_triangle_are_even():
    costs = triangle_costs(1_000_000, 1000)
    ranges = even_ranges(costs, 64)
    assert (ranges[0][0], ranges[-1][1]) == (0, 1000)
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    work = np.array([costs[start:stop].sum() for start, stop in ranges])
    assert len(ranges) == 64
    assert work[:-1].max() < 1.2 * work.mean()
    assert even_ranges(np.array([], dtype=np.int64), 4) == []
    assert even_ranges(np.array([5, 0, 0]), 8) == [(0, 1), (1, 3)]
    assert even_ranges(np.array([1, 1]), 8) == [(0, 1), (1, 2)]


def test_the_count_is_about_right():
    vectors = as_vectors(unit_vectors(300, 8).astype(np.float16))
    exact = len(brute_force(vectors.parts[0], vectors.parts[0], 0.5))
    assert count_pairs(vectors, vectors, threshold=0.5, device=torch.device("cpu")) == pytest.approx(exact, rel=0.05)


def test_nothing_gives_no_pairs():
    vectors = unit_vectors(4, 8)
    assert threshold_pairs(vectors[:0], threshold=0.5).index.shape == (0, 2)
    assert threshold_pairs(vectors, vectors[:0], threshold=0.5).index.shape == (0, 2)
    assert threshold_pairs(vectors[:1], threshold=0.5).index.shape == (0, 2)


def test_mapped_parts_read_like_one_array(tmp_path):
    values = unit_vectors(50, 8).astype(np.float16)
    files = [tmp_path / f"part-{i}.npy" for i in range(3)]
    for file, part in zip(files, (values[:20], values[20:21], values[21:]), strict=True):
        np.save(file, part)
    whole = map_parts(files)
    index = np.array([49, 0, 20, 19, 21, 0])
    assert (len(whole), whole.dim) == (50, 8)
    np.testing.assert_array_equal(whole.stored(index), values[index])
    for cut in (slice(0, 50), slice(19, 22), slice(30, 40), slice(5, 5)):
        np.testing.assert_array_equal(whole.stored(cut), values[cut])
    chosen = np.array([3, 19, 20, 48])
    some = map_parts(files, chosen)
    np.testing.assert_array_equal(some.stored(slice(1, 4)), values[chosen[1:4]])
    np.testing.assert_array_equal(some.stored(np.array([2, 2])), values[chosen[[2, 2]]])
    np.testing.assert_allclose(np.linalg.norm(whole.take(slice(None)), axis=1), 1, atol=1e-6)
    assert as_dict(threshold_pairs(whole, threshold=0.3)) == as_dict(threshold_pairs(values, threshold=0.3))


def test_cosines_of_pairs_are_those_that_a_join_reports():
    vectors = UnitVectors((near_threshold(0.7, 48, 50),))
    pairs = threshold_pairs(vectors, threshold=0.3)
    np.testing.assert_array_equal(exact_cosines(vectors, vectors, pairs.index), pairs.cosine)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds():
    vectors = near_threshold(0.7, 384, 5000)
    expected = threshold_pairs(vectors, threshold=0.7)
    found = threshold_pairs(vectors, threshold=0.7, device="cuda")
    assert filter_dtype(torch.device("cuda")) == torch.bfloat16
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_allclose(found.cosine, expected.cosine, atol=1e-7)
