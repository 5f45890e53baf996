import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from curation.planner import JoinPlan, plan_join

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


def plan(num: int, device: torch.device = CPU, **changes) -> JoinPlan:
    settings = {"device": device, "memory_budget": 16 * GB, "seconds_budget": 1800} | changes
    return plan_join(num, 384, **settings)


@pytest.mark.parametrize(
    ("num", "device", "method"),
    [
        (0, CPU, "exact"),
        (10, CPU, "exact"),
        (100_000, CPU, "exact"),
        (3_000_000, CPU, "ivf"),
        (100_000_000, CPU, "ivf_pq"),
        (3_000_000, CUDA, "exact"),
        (100_000_000, CUDA, "ivf_pq"),
    ],
)
def test_the_method_follows_from_size_and_device(num, device, method):
    found = plan(num, device)
    assert found.method == method
    assert found.reasons[-1].startswith(method)
    assert (found.num_cells > 0) == (method in ("ivf", "ivf_pq"))


def test_the_budgets_decide():
    assert plan(100_000, seconds_budget=1).method == "ivf"
    assert plan(100_000, seconds_budget=1, memory_budget=GB // 20).method == "ivf_pq"
    assert plan(100_000_000, CUDA, memory_budget=1000 * GB).method == "ivf"


def test_more_pairs_than_a_graph_of_neighbours_has():
    assert plan(100_000, edges=1e9, most_edges=6.4e6).method == "knn"
    assert plan(10_000_000, edges=1e12, most_edges=6.4e8).method == "ivf_pq"
    assert plan(100_000, edges=1e6, most_edges=6.4e6).method == "exact"


@pytest.mark.parametrize("asked", ["exact", "knn", "ivf", "ivf_pq"])
def test_the_user_overrules(asked):
    found = plan(50_000, asked=asked)
    assert found.method == asked
    assert "dedup.join" in found.reasons[-1]


def test_cells_are_no_more_than_memory_trains():
    assert plan(10**9, CUDA, asked="ivf_pq").num_cells > plan(10**9, CUDA, asked="ivf_pq", memory_budget=GB).num_cells
    assert plan(10**9, CUDA, asked="ivf_pq", memory_budget=0).num_cells == 1


@pytest.mark.parametrize("num", [1, 39, 1000, 10**6, 10**9])
@pytest.mark.parametrize("asked", ["ivf", "ivf_pq"])
def test_cells_can_be_trained(num, asked):
    found = plan(num, asked=asked)
    assert 1 <= found.num_cells <= max(1, num // 40)
    assert 1 <= found.num_probes <= found.num_cells


def test_cells_grow_with_the_root_of_the_size():
    sizes = [plan(num, CUDA, asked="ivf").num_cells for num in (10**6, 10**7, 10**8)]
    assert all(2 <= after / before <= 8 for before, after in pairwise(sizes))


def test_a_plan_survives_json():
    found = plan(2_000_000)
    read = json.loads(json.dumps(asdict(found)))
    assert JoinPlan(**read | {"reasons": tuple(read["reasons"])}) == found
    assert plan(2_000_000) == found
