"""How long do groups of 10 million images and 10 million edges take, in both modes, and the survivor curve?

A random graph: groups with a long tail (sizes 1 + Zipf, at most 100,000), each image of a group joined to random
mates, edges sorted as the pipeline writes them. Connected components by `curation.groups` (union-find in NumPy) beside
`scipy.sparse.csgraph.connected_components`; then leader mode and the survivor curve of the maximum spanning forest.

    python benchmarks/bench_components.py [--nodes 10000000] [--edges 10000000] [--repeats 5]

Writes benchmarks/results/components.json.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from curation.groups import components, leaders, unsupported
from curation.survivors import survivors
from runtime.environment import describe
from runtime.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000_000)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    edges = graph(args.nodes, args.edges)
    weights = np.random.default_rng(1).uniform(0.6, 1, len(edges)).astype(np.float32)
    rank = np.random.default_rng(2).permutation(args.nodes)
    seconds = interleaved(
        {
            "components": lambda: components(args.nodes, edges),
            "components_scipy": lambda: components_scipy(args.nodes, edges),
            "leaders": lambda: leaders(rank, edges, weights),
        },
        args.repeats,
    )
    seconds |= interleaved({"survivor_curve": lambda: survivors(args.nodes, edges, weights).steps()}, 1)
    label, of = components(args.nodes, edges), leaders(rank, edges, weights)
    assert np.array_equal(label, components_scipy(args.nodes, edges))
    sizes = np.bincount(label)
    result = {
        "question": "seconds for the groups of ten million edges",
        "date": time.strftime("%Y-%m-%d"),
        "nodes": args.nodes,
        "edges": len(edges),
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        "seconds": seconds,
        "peak_gb_with_the_making_of_the_graph": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "unsupported": {
            "components": unsupported(label, edges).report(),
            "leader": unsupported(of, edges).report(),
        },
        "load_average_before": load,
        "environment": describe(),
    }
    write_json(Path(__file__).parent / "results" / "components.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


def graph(num_nodes: int, num_edges: int) -> np.ndarray:
    """Distinct edges within groups of 60 % of the nodes, smaller node first, sorted; int64 [num_edges, 2]."""
    generator = np.random.default_rng(0)
    sizes = 1 + np.minimum(generator.zipf(2.2, num_nodes // 4), 100_000)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), 0.6 * num_nodes)]
    member = generator.permutation(num_nodes)[: sizes.sum()]
    start, size = (np.repeat(values, sizes) for values in (np.cumsum(sizes) - sizes, sizes))
    codes = np.empty(0, dtype=np.int64)
    while len(codes) < num_edges:  # an image may draw itself, or a mate that it has
        a = generator.integers(0, len(member), num_edges)
        b = start[a] + (generator.random(num_edges) * size[a]).astype(np.int64)
        low, high = np.sort(np.stack([member[a], member[b]]), axis=0)
        codes = np.unique(np.concatenate([codes, (low * num_nodes + high)[low != high]]))
    codes = np.sort(generator.choice(codes, num_edges, replace=False))
    return np.stack([codes // num_nodes, codes % num_nodes], axis=1)


def components_scipy(num_nodes: int, edges: np.ndarray) -> np.ndarray:
    """The smallest node of each component, by SciPy's search through the graph."""
    links = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(num_nodes, num_nodes))
    count, label = connected_components(links, directed=False)
    smallest = np.empty(count, dtype=np.int64)
    smallest[label[::-1]] = np.arange(num_nodes - 1, -1, -1)  # of equal labels the last assignment stands
    return smallest[label]


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and spread of wall seconds, and the median of processor seconds, the calls taking turns."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    core: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            core[name].append(time.process_time() - used)
    return {
        name: {
            "median": round(statistics.median(wall[name]), 2),
            "least": round(min(wall[name]), 2),
            "most": round(max(wall[name]), 2),
            "core_median": round(statistics.median(core[name]), 2),
        }
        for name in calls
    }


if __name__ == "__main__":
    main()
