import numpy as np
import pytest

from curation.groups import components, representatives


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
