import numpy as np
import pytest

from curation.groups import components, leaders
from curation.survivors import forest_weights, survivor_curves, survivors


def random_edges(seed: int, *, nodes: int = 80, edges: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Distinct edges and float32 weights, some equal, some 0, some negative."""
    generator = np.random.default_rng(seed)
    pairs = np.unique(np.sort(generator.integers(0, nodes, (edges, 2)), axis=1), axis=0)
    pairs = generator.permutation(pairs[pairs[:, 0] != pairs[:, 1]])
    weights = generator.uniform(-0.5, 1, len(pairs)).round(2).astype(np.float32)
    weights[:3] = 0
    return pairs, weights


@pytest.mark.parametrize("seed", range(10))
def test_the_curve_is_the_number_of_components_at_every_threshold(seed):
    edges, weights = random_edges(seed)
    curve = survivors(80, edges, weights)
    thresholds = np.concatenate([weights, np.nextafter(weights, np.float32(2)), [-1, 0, 1.5]]).astype(np.float32)
    slow = [len(np.unique(components(80, edges[weights >= t]))) for t in thresholds]
    assert curve.at(thresholds).tolist() == slow


def test_steps_are_where_the_number_changes():
    curve = survivors(4, np.array([[0, 1], [1, 2], [0, 2]]), np.array([0.9, 0.5, 0.7], dtype=np.float32))
    thresholds, left = curve.steps()
    assert thresholds.tolist() == pytest.approx([0.7, 0.9])
    assert left.tolist() == [2, 3]


def test_no_edges_leave_everything():
    edges, weights = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32)
    assert len(forest_weights(5, edges, weights)) == 0
    assert survivors(5, edges, weights).at(np.array([0.5])).tolist() == [5]


def test_curves_on_two_axes():
    edges, cosine = random_edges(1)
    score = np.abs(cosine)
    score[::3] = np.nan  # not compared
    rank = np.random.default_rng(0).permutation(80)
    lowest = {"cosine": 0.295, "score": 0.0}
    table, compact = survivor_curves(rank, edges, {"cosine": cosine, "score": score}, lowest)
    for axis, weights in (("cosine", cosine), ("score", score)):
        for threshold, left in compact[axis]["components"]:
            passes = weights >= threshold
            assert left == len(np.unique(components(80, edges[passes])))
        for threshold, left in compact[axis]["leader"]:
            passes = weights >= threshold
            of = leaders(rank, edges[passes], weights[passes])
            assert left == (of == np.arange(80)).sum()
            assert left >= dict(map(tuple, compact[axis]["components"]))[threshold]
    assert [point[0] for point in compact["cosine"]["components"]] == [round(0.3 + i / 100, 2) for i in range(71)]
    assert table.column_names == ["axis", "groups", "threshold", "survivors"]
    assert set(table["axis"].to_pylist()) == {"cosine", "score"}
    assert min(table.filter(table["axis"].to_numpy() == "cosine")["threshold"].to_pylist()) >= np.float32(0.3)
