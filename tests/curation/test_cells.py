import numpy as np
import pytest
import torch

from curation.cells import Cells, cell_pairs, probes_for, train_cells, visit_cells
from curation.threshold import even_ranges, threshold_pairs
from curation.unit_vectors import UnitVectors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vectors() -> UnitVectors:
    """900 float16 vectors around 30 centres in 3 parts."""
    draw = np.random.default_rng(0)
    values = draw.standard_normal((30, 24))[draw.integers(30, size=900)] + 0.6 * draw.standard_normal((900, 24))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return UnitVectors(tuple(np.split(values.astype(np.float16), [100, 500])))


@pytest.fixture(scope="module")
def visits(vectors) -> np.ndarray:
    return visit_cells(vectors, train_cells(vectors, 20, seed=0), 20, device=CPU)


def as_set(index: np.ndarray) -> set[tuple[int, int]]:
    assert len(np.unique(index, axis=0)) == len(index)
    return set(map(tuple, index.tolist()))


def test_vectors_visit_their_nearest_cells(vectors, visits):
    centroids = train_cells(vectors, 20, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    similarity = vectors.take(slice(None)) @ centroids.T
    ranked = np.take_along_axis(similarity, visits.astype(np.int64), axis=1)
    assert (np.diff(ranked, axis=1) < 0.02).all()  # sorted but for what bfloat16 rounds away
    assert (np.sort(visits, axis=1) == np.arange(20)).all()


def test_visitors_are_listed_by_cell_members_first(visits):
    cells = Cells.of(visits[:, :3], 20)
    for cell in range(20):
        visitors = cells.visitors[cells.bounds[cell] : cells.bounds[cell + 1]]
        members = np.flatnonzero(visits[:, 0] == cell)
        assert visitors[: len(members)].tolist() == members.tolist()
        assert sorted(visitors.tolist()) == np.flatnonzero((visits[:, :3] == cell).any(1)).tolist()


@pytest.mark.parametrize("num_probes", [1, 3])
def test_pairs_are_those_of_the_exact_join_that_meet(vectors, visits, num_probes):
    cells = Cells.of(visits[:, :num_probes], 20)
    exact = threshold_pairs(vectors, threshold=0.6)
    a, b = exact.index.T
    meet = (cells.visits[a] == cells.visits[b, :1]).any(1) | (cells.visits[b] == cells.visits[a, :1]).any(1)
    assert 0 < meet.sum() < len(meet)
    pairs = cell_pairs(vectors, cells, threshold=0.6, device=CPU)
    np.testing.assert_array_equal(pairs.index, exact.index[meet])
    np.testing.assert_array_equal(pairs.cosine, exact.cosine[meet])


def test_all_cells_visited_is_the_exact_join(vectors, visits):
    pairs = cell_pairs(vectors, Cells.of(visits, 20), threshold=0.6, device=CPU)
    np.testing.assert_array_equal(pairs.index, threshold_pairs(vectors, threshold=0.6).index)


def test_units_together_give_every_pair_once(vectors, visits, tmp_path):
    Cells.of(visits[:, :4], 20).write(tmp_path)
    cells = Cells.read(tmp_path)
    ranges = even_ranges(cells.costs(), 6)
    assert len(ranges) > 3
    parts = [cell_pairs(vectors, cells, threshold=0.6, device=CPU, which=which).index for which in ranges]
    whole = cell_pairs(vectors, cells, threshold=0.6, device=CPU)
    assert as_set(np.concatenate(parts)) == as_set(whole.index)


def test_probes_are_chosen_by_the_pairs_that_meet(vectors, visits):
    exact = threshold_pairs(vectors, threshold=0.6).index
    probes, met = probes_for(visits, exact, recall=0.99)
    assert 1 < probes < 20
    for count, enough in ((probes - 1, False), (probes, True)):
        pairs = cell_pairs(vectors, Cells.of(visits[:, :count], 20), threshold=0.6, device=CPU)
        assert (len(pairs) >= 0.99 * len(exact)) == enough
    assert met == len(pairs) / len(exact)
    assert probes_for(visits, exact[:0], recall=0.99) == (1, 1.0)
    assert probes_for(visits[:, :1], exact, recall=0.9999)[0] == 1
