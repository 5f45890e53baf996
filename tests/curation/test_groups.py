import numpy as np
import pytest

from curation.groups import components, leaders, precedence, representatives, unsupported


def slow_components(num_nodes: int, edges: np.ndarray) -> list[int]:
    """Spread the smallest label along edges until nothing changes."""
    labels = list(range(num_nodes))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(labels[a], labels[b])
            if labels[a] != low or labels[b] != low:
                labels[a] = labels[b] = low
                changed = True
    return labels


@pytest.mark.parametrize("seed", range(20))
def test_components_equal_the_slow_oracle(seed):
    generator = np.random.default_rng(seed)
    num_nodes = int(generator.integers(1, 60))
    edges = generator.integers(0, num_nodes, (int(generator.integers(0, 80)), 2))
    assert components(num_nodes, edges).tolist() == slow_components(num_nodes, edges)


def test_a_chain_in_any_order_is_one_component():
    edges = np.random.default_rng(0).permutation(np.stack([np.arange(9999), np.arange(1, 10000)], axis=1))
    assert not components(10000, edges).any()


def test_no_edges_leave_every_node_alone():
    assert components(3, np.empty((0, 2), dtype=np.int64)).tolist() == [0, 1, 2]


def test_the_larger_then_the_less_compressed_then_the_smaller_id_stays():
    labels = np.array([0, 0, 2, 2, 4, 4, 6])
    area = np.array([10, 20, 10, 10, 10, 10, 0])
    num_bytes = np.array([9, 1, 5, 9, 5, 5, 7])
    ids = np.array(["a", "b", "c", "d", "f", "e", ""])
    assert representatives(labels, area, num_bytes, ids).tolist() == [1, 1, 3, 3, 5, 5, 6]


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_does_not_depend_on_the_order(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, 60)
    area, num_bytes = generator.integers(1, 4, 60), generator.integers(1, 4, 60)
    ids = np.array([f"{value:02d}" for value in generator.permutation(60)])
    expected = dict(zip(ids, ids[representatives(labels, area, num_bytes, ids)], strict=True))
    order = generator.permutation(60)
    best = representatives(labels[order], area[order], num_bytes[order], ids[order])
    assert dict(zip(ids[order], ids[order][best], strict=True)) == expected


def random_graph(seed: int, *, nodes: int = 60, edges: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ranking, distinct edges in random directions, and weights of which many are equal."""
    generator = np.random.default_rng(seed)
    pairs = np.unique(np.sort(generator.integers(0, nodes, (edges, 2)), axis=1), axis=0)
    pairs = generator.permuted(generator.permutation(pairs[pairs[:, 0] != pairs[:, 1]]), axis=1)
    return generator.permutation(nodes), pairs, generator.integers(0, 4, len(pairs)) / 4


def slow_leaders(rank: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> list[int]:
    """One node after the other, by rank; then the strongest kept neighbour of each that was removed."""
    weight_of = {}
    for (a, b), weight in zip(edges.tolist(), weights.tolist(), strict=True):
        weight_of[a, b] = weight_of[b, a] = weight
    kept = set()
    for node in np.argsort(rank).tolist():
        if not any((node, other) in weight_of for other in kept):
            kept.add(node)
    of = []
    for node in range(len(rank)):
        near = [other for other in kept if (node, other) in weight_of]
        of.append(node if node in kept else min(near, key=lambda other: (-weight_of[node, other], rank[other])))
    return of


@pytest.mark.parametrize("seed", range(30))
def test_leaders_equal_the_sequential_greedy(seed):
    rank, edges, weights = random_graph(seed, edges=20 + 10 * seed)
    assert leaders(rank, edges, weights).tolist() == slow_leaders(rank, edges, weights)


@pytest.mark.parametrize("order", [1, -1])
def test_leaders_of_a_long_sorted_chain(order):
    """Rounds would settle two nodes each; the rest is decided node by node."""
    num_nodes = 100_001
    edges = np.stack([np.arange(num_nodes - 1), np.arange(1, num_nodes)], axis=1)
    rank = np.arange(num_nodes)[::order].copy()
    of = leaders(rank, edges, np.ones(len(edges)))
    assert np.array_equal(np.flatnonzero(of == np.arange(num_nodes)), np.arange(0, num_nodes, 2))
    assert not unsupported(of, edges).any.any()


def test_leaders_do_not_depend_on_the_order_of_edges():
    rank, edges, weights = random_graph(5, nodes=400, edges=900)
    order = np.random.default_rng(1).permutation(len(edges))
    assert np.array_equal(leaders(rank, edges, weights), leaders(rank, edges[order, ::-1], weights[order]))


def test_leaders_without_edges():
    assert leaders(np.array([1, 0]), np.empty((0, 2), dtype=np.int64), np.empty(0)).tolist() == [0, 1]


def test_a_chain_is_unsupported_in_components_and_never_with_leaders():
    edges = np.stack([np.arange(9), np.arange(1, 10)], axis=1)
    found = unsupported(components(10, edges), edges).report()
    assert found == {"removed": 9, "unsupported": 8, "share": 0.888889, "without_edge_to_any_kept": 8}  # node 1 has one
    found = unsupported(leaders(np.arange(10), edges, np.ones(9)), edges).report()
    assert found == {"removed": 5, "unsupported": 0, "share": 0.0, "without_edge_to_any_kept": 0}


def test_support_by_another_kept_image_is_told_apart():
    found = unsupported(np.array([0, 1, 1]), np.array([[2, 0]]))
    assert found.own.tolist() == [False, False, True]
    assert not found.any.any()


@pytest.mark.parametrize("seed", range(5))
def test_leader_mode_never_removes_without_support(seed):
    rank, edges, weights = random_graph(seed, nodes=500, edges=1500)
    found = unsupported(leaders(rank, edges, weights), edges).report()
    assert found["removed"] > 0
    assert found["unsupported"] == 0


def test_precedence_names_the_same_image_as_the_representative():
    area, num_bytes = np.array([10, 20, 20, 20]), np.array([9, 4, 9, 9])
    ids = np.array(["a", "b", "d", "c"])
    assert precedence(area, num_bytes, ids).tolist() == [3, 2, 1, 0]
    assert representatives(np.zeros(4), area, num_bytes, ids).tolist() == [3, 3, 3, 3]
