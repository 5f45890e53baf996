"""How many images survive at any threshold, from one run: no threshold needs the groups to be made again.

Near-duplicates at threshold t are joined by edges of weight >= t. Of a maximum spanning forest the edges of weight >= t
span the same components (Gower and Ross 1969, "Minimum spanning trees and single linkage cluster analysis"), so the
images left are all of them less the forest's edges that strong.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array
from scipy.sparse.csgraph import minimum_spanning_tree

from .groups import leaders

STEP, LEADER_STEP = 0.01, 0.05  # between thresholds of the compact curves


def forest_weights(num_nodes: int, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of the edges of a maximum spanning forest, strongest first; as `weights`, at most N - 1 of them.

    edges: int [E, 2], no pair twice. weights: float [E].
    """
    if not len(edges):
        return weights[:0]
    # Costs are places among the distinct weights, from 1: exact, and never 0, which a sparse matrix would not hold.
    values, place = np.unique(weights, return_inverse=True)
    cost = (len(values) - place).astype(np.float64)
    graph = csr_array((cost, (edges[:, 0], edges[:, 1])), shape=(num_nodes, num_nodes))
    forest = minimum_spanning_tree(graph, overwrite=True)
    return values[len(values) - np.sort(forest.data).astype(np.int64)]


@dataclass(frozen=True)
class Survivors:
    """Images left of N when images joined by an edge of weight >= threshold become one."""

    num_nodes: int
    joins: np.ndarray  # float [J], descending: the weights at which two groups become one

    def at(self, thresholds: np.ndarray) -> np.ndarray:
        """Images left at each threshold; int64, same shape."""
        return self.num_nodes - np.searchsorted(-self.joins, -np.asarray(thresholds, self.joins.dtype), side="right")

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Each weight at which the number changes, ascending, and the images left at that threshold."""
        thresholds = np.unique(self.joins)
        return thresholds, self.at(thresholds)


def survivors(num_nodes: int, edges: np.ndarray, weights: np.ndarray) -> Survivors:
    """The whole curve of connected components. edges: int [E, 2], no pair twice; weights: float [E]."""
    return Survivors(num_nodes, forest_weights(num_nodes, edges, weights))


def leader_curve(rank: np.ndarray, edges: np.ndarray, weights: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Images that leader mode leaves at each threshold; int64. One pass each: its choices are not nested."""
    left = []
    for threshold in thresholds.astype(weights.dtype):
        passes = weights >= threshold
        of = leaders(rank, edges[passes], weights[passes])
        left.append(int((of == np.arange(len(of))).sum()))
    return np.array(left, dtype=np.int64)


def survivor_curves(
    rank: np.ndarray, edges: np.ndarray, axes: dict[str, np.ndarray], lowest: dict[str, float]
) -> tuple[pa.Table, dict[str, dict[str, list[list[float]]]]]:
    """Every step of the curves as a table, and a compact version: axis -> groups -> [[threshold, survivors], ...].

    axes: name of a measure of the edges (cosine, score) -> weights, float [E]; NaN where it was not taken. lowest: the
    threshold below which candidates were not looked for, where the curve ends. The table has columns axis, groups,
    threshold, survivors; between two steps the upper one holds.
    """
    tables, compact = [], {}
    for axis, weights in axes.items():
        known = weights >= lowest[axis]  # false for NaN
        curve = survivors(len(rank), edges[known], weights[known])
        many, few = _thresholds(lowest[axis], STEP), _thresholds(lowest[axis], LEADER_STEP)
        led = leader_curve(rank, edges[known], weights[known], few)
        tables += [_table(axis, "components", *curve.steps()), _table(axis, "leader", few, led)]
        compact[axis] = {"components": _points(many, curve.at(many)), "leader": _points(few, led)}
    return pa.concat_tables(tables), compact


def _thresholds(lowest: float, step: float) -> np.ndarray:
    """Multiples of `step` from the first at or above `lowest` to 1; float64."""
    first, last = round(np.ceil(lowest / step - 1e-6)), round(1 / step)
    return np.arange(first, last + 1) / last


def _table(axis: str, groups: str, thresholds: np.ndarray, left: np.ndarray) -> pa.Table:
    names = {"axis": pa.repeat(axis, len(left)), "groups": pa.repeat(groups, len(left))}
    return pa.table({**names, "threshold": thresholds.astype(np.float32), "survivors": left})


def _points(thresholds: np.ndarray, left: np.ndarray) -> list[list[float]]:
    return [[round(float(t), 4), int(n)] for t, n in zip(thresholds, left, strict=True)]
