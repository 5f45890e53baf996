"""Pairs to groups, and the image that stays for each group.

Two readings of the same edges. Connected components (DINOv2 A.3) keep one image per component, though a chain of
near-duplicates may join two images that have nothing in common. In leader mode every removed image has an edge to an
image that is kept. Nodes are 0..N-1, edges int [E, 2] in any order and direction; none may occur twice.
"""

from dataclasses import dataclass

import numpy as np

SLOW_ROUND = 0.9  # share of open edges left by a round, above which the rest is decided one node at a time


def components(num_nodes: int, edges: np.ndarray) -> np.ndarray:
    """The smallest node of each node's connected component; int64 [N].

    Vectorised union-find: every edge hooks the larger root under the smaller, then paths are halved until all nodes
    point at their root; a few rounds suffice. Faster than SciPy's search through the graph (benchmarks/results/
    components.json), and it needs no copy of the edges as a sparse matrix.
    """
    dtype = np.int32 if num_nodes < 2**31 else np.int64  # half the memory is half the time
    root = np.arange(num_nodes, dtype=dtype)
    a, b = (column.astype(dtype) for column in _columns(edges))
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(halved := root[root], root):
            root = halved
        a, b = root[a], root[b]
        differ = a != b
        a, b = a[differ], b[differ]
    return root.astype(np.int64)


def precedence(area: np.ndarray, num_bytes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The rank of each of N images when one of several stays, 0 the best; int64 [N], a permutation.

    The larger area (pixels) goes first, then the more bytes per pixel (less compressed), then the smaller content id,
    then the smaller row: nothing that depends on the order of the input.
    """
    order = np.lexsort((np.arange(len(ids)), ids, -(num_bytes / np.maximum(area, 1)), -area))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def representatives(labels: np.ndarray, area: np.ndarray, num_bytes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each node the node that stays for its group, the first by `precedence`; int64 [N].

    labels: int [N], equal in a group.
    """
    order = np.lexsort((precedence(area, num_bytes, ids), labels))
    first = np.ones(len(order), dtype=bool)
    first[1:] = labels[order][1:] != labels[order][:-1]
    best = np.empty(len(labels), dtype=np.int64)
    best[order] = order[first][np.cumsum(first) - 1]
    return best


def leaders(rank: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """For each node the node that is kept for it, itself where it is kept; int64 [N].

    Nodes are visited from the best rank on; one is kept unless it has an edge to a node that was kept before. So every
    removed node has an edge to a kept one, no two kept nodes have an edge, and of the kept neighbours of a removed node
    the one with the strongest edge stands for it, of equals the one of better rank.

    rank: int [N], a permutation, 0 the best. edges: int [E, 2]. weights: float [E], higher is stronger.
    """
    by_rank = np.argsort(rank)
    ends = np.sort(rank[edges.reshape(-1, 2)], axis=1)  # in ranks, the better first
    kept = _greedy(len(rank), ends)
    to_kept = kept[ends]
    supported = to_kept.any(axis=1) & (ends[:, 0] != ends[:, 1])  # never both: kept nodes have no edge
    better_kept = to_kept[supported, 0]
    low, high = ends[supported].T
    removed, keeper = np.where(better_kept, high, low), np.where(better_kept, low, high)
    order = np.lexsort((keeper, -weights[supported]))[::-1]  # the strongest last: of several assignments it stands
    of = np.arange(len(rank))
    of[removed[order]] = keeper[order]
    return by_rank[of[rank]]


def _greedy(num_nodes: int, ends: np.ndarray) -> np.ndarray:
    """Which nodes greedy selection in the order 0, 1, ... keeps; bool [N]. ends: int [E, 2], smaller node first.

    In rounds: a node before all its undecided neighbours is kept, its neighbours are removed. This decides as the
    sequential greedy does (Blelloch, Fineman and Shun 2012, "Greedy sequential maximal independent set and matching are
    parallel on average", sec. 3), in few rounds where the order is not made to defeat it, as along one sorted chain.
    """
    removed = np.zeros(num_nodes, dtype=bool)
    low, high = np.ascontiguousarray(ends[ends[:, 0] != ends[:, 1]].T)
    while len(low):
        blocked = np.zeros(num_nodes, dtype=bool)
        blocked[high] = True
        removed[high[~blocked[low]]] = True
        left = ~(removed[low] | removed[high])
        slow = left.mean() > SLOW_ROUND
        low, high = low[left], high[left]
        if slow:
            _greedy_one_by_one(removed, low, high)
            break
    return ~removed


def _greedy_one_by_one(removed: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """The same decision edge by edge, in the order of the smaller end, written into `removed` (bool [N])."""
    order = np.argsort(low)
    gone = set()
    for a, b in zip(low[order].tolist(), high[order].tolist(), strict=True):
        if a not in gone:
            gone.add(b)
    removed[list(gone)] = True


@dataclass(frozen=True, eq=False)
class Support:
    """Which of N nodes were removed, and for which of those no edge speaks."""

    removed: np.ndarray  # bool [N]
    own: np.ndarray  # bool [N]: removed, without an edge to the node that is kept for it
    any: np.ndarray  # bool [N]: removed, without an edge to any kept node

    def report(self) -> dict[str, float]:
        """Counts, and the first as a share of what was removed."""
        removed, own, none = (int(flags.sum()) for flags in (self.removed, self.own, self.any))
        share = round(own / removed, 6) if removed else 0.0
        return {"removed": removed, "unsupported": own, "share": share, "without_edge_to_any_kept": none}


def unsupported(of: np.ndarray, edges: np.ndarray) -> Support:
    """The removals that the edges (int [E, 2]) do not support. of: int [N], the node kept for each node."""
    kept = of == np.arange(len(of))
    own, none = ~kept, ~kept
    for a, b in (_columns(edges), _columns(edges)[::-1]):
        own[a[of[a] == b]] = False
        none[a[kept[b]]] = False
    return Support(~kept, own, none)


def _columns(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of edges (int [E, 2]); int [E] each."""
    a, b = edges.reshape(-1, 2).T
    return a, b
