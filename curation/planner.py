"""How to search near-duplicate pairs: exactly, within cells, or through compressed codes. From size, device and budget.

Costs are counted in products of two numbers and divided by stated rates, not by timings: the same config makes the same
plan on every machine of a kind, in a resumed run and in each share of a stage. `benchmarks/bench_join_ivf.py` measures
what the rates are on the machine at hand.

N vectors of width D, C cells, P cells visited by each vector (probes).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from runtime.files import human_bytes

from .cells import ITERATIONS, TRAINING_POINTS
from .threshold import blocks_for

Method = Literal["exact", "knn", "ivf", "ivf_pq"]
EXPECTED_PROBES = 8  # with vectors; the index stage then takes as few as give RECALL on its sample
MOST_PROBES = 32  # and with codes, where probes cost little beside looking at the candidates again
RECALL = 0.998  # of sampled pairs above the threshold that must meet in a cell
IMBALANCE = 2.0  # how much more a cell join costs than with cells of one size: long-tailed cells are visited more
UNIT_SECONDS = 5  # of a work unit, about
MOST_UNITS = 4096


@dataclass(frozen=True)
class Rates:
    """What a kind of device does in a second."""

    filter: float  # products of two numbers in the blocked filter, comparison included
    float32: float  # products of two numbers in FAISS
    load: float  # numbers read from mapped parts and converted
    codes: float  # compressed codes compared, candidates scored again included


CPU_RATES = Rates(filter=1.5e11, float32=4e10, load=2e9, codes=2.5e7)  # one core with bfloat16 instructions
CUDA_RATES = Rates(filter=5e13, float32=5e12, load=2e9, codes=2.5e7)  # a data-centre GPU, with a host that feeds it


@dataclass(frozen=True)
class JoinPlan:
    """How a join is done, what it is expected to take, and why."""

    method: Method
    num_cells: int  # 0 without cells
    num_probes: int  # expected; 0 without cells
    memory_bytes: int  # at a time, beside the interpreter; mapped vectors count where they are read at random
    seconds: float  # of one core or one GPU
    block: int  # rows that work units are made of (cells of k-means in the method "ivf")
    num_units: int
    reasons: tuple[str, ...]


def plan_join(
    num_vectors: int,
    dim: int,
    *,
    device: torch.device,
    memory_budget: int,
    seconds_budget: float,
    asked: Literal["auto", "exact", "knn", "ivf", "ivf_pq"] = "auto",
    edges: float = 0.0,
    most_edges: float = float("inf"),
) -> JoinPlan:
    """The plan of a self-join. Exact unless it takes more than the budget; in cells unless memory is short, else codes.

    memory_budget: bytes; seconds_budget: of one core (cpu) or one GPU. edges: pairs expected above the threshold; with
    more than most_edges a k-NN graph takes the place of all pairs. asked: a method that overrules the choice.
    """
    rates = CUDA_RATES if device.type == "cuda" else CPU_RATES
    costs = {
        method: _cost(method, num_vectors, dim, device, rates, memory_budget)
        for method in ("exact", "knn", "ivf", "ivf_pq")
    }
    reasons = [f"{num_vectors} vectors of width {dim} on {device.type}, about {edges:.2g} pairs above the threshold"]
    reasons += [f"{method}: {_duration(c.seconds)}, {human_bytes(c.memory)}" for method, c in costs.items()]
    if asked != "auto":
        method: Method = asked
        reasons.append(f"dedup.join asks for {asked}")
    elif edges > most_edges:
        method = "knn" if costs["knn"].seconds <= seconds_budget else "ivf_pq"
        reasons.append(f"{method}: more pairs than the {most_edges:.2g} of a k-NN graph, so nearest neighbours only")
    elif costs["exact"].seconds <= seconds_budget:
        method = "exact"
        reasons.append(f"exact: within {_duration(seconds_budget)} (dedup.join_seconds)")
    elif costs["ivf"].memory <= memory_budget:
        method = "ivf"
        reasons.append(
            f"ivf: exact takes more than {_duration(seconds_budget)} (dedup.join_seconds), the vectors fit into "
            f"{human_bytes(memory_budget)} (dedup.join_memory)"
        )
    else:
        method = "ivf_pq"
        reasons.append(f"ivf_pq: the vectors do not fit into {human_bytes(memory_budget)} (dedup.join_memory)")
    cost = costs[method]
    return JoinPlan(
        method=method,
        num_cells=cost.num_cells,
        num_probes=min(MOST_PROBES if method == "ivf_pq" else EXPECTED_PROBES, cost.num_cells),
        memory_bytes=cost.memory,
        seconds=round(cost.seconds, 1),
        block=1 if method == "ivf" else blocks_for(device).left,
        num_units=max(1, min(MOST_UNITS, round(cost.seconds / UNIT_SECONDS))),
        reasons=tuple(reasons),
    )


@dataclass(frozen=True)
class _Cost:
    seconds: float
    memory: int
    num_cells: int = 0


def _cost(method: Method, num: int, dim: int, device: torch.device, rates: Rates, memory_budget: int) -> _Cost:
    blocks = blocks_for(device)
    block_bytes = 6 * dim * (blocks.left + blocks.right) + blocks.products  # float32 and bfloat16; one tile of products
    if method == "exact":
        products, loads = num**2 / 2 * dim, num**2 / 2 * dim / blocks.left
        return _Cost(products / rates.filter + loads / rates.load, block_bytes)
    if method == "knn":
        return _Cost(num**2 * dim / rates.float32, block_bytes)
    probes = EXPECTED_PROBES
    trainable = min(num // TRAINING_POINTS, memory_budget // (16 * TRAINING_POINTS * dim))  # in half of the memory
    choices = [2**power for power in range(max(1, trainable.bit_length()))]
    if method == "ivf":

        def seconds(cells: int) -> float:
            training = ITERATIONS * TRAINING_POINTS * cells**2 * dim / rates.float32
            assigning = 2 * num * cells * dim / rates.filter  # as much again to find the largest
            joining = num * min(probes, cells) * IMBALANCE * num / cells * dim / rates.filter
            return training + assigning + joining + num * (probes + 1) * dim / rates.load

        cells = min(choices, key=seconds)
        tables = num * (4 * MOST_PROBES + 12 * probes)  # visits, and the sorting of them
        return _Cost(seconds(cells), 2 * dim * num + tables + block_bytes + 8 * TRAINING_POINTS * cells * dim, cells)

    def code_seconds(cells: int) -> float:
        training = ITERATIONS * TRAINING_POINTS * cells**2 * dim / rates.float32
        assigning = 2 * num * cells * dim / rates.float32  # to be added, and to be searched
        return training + assigning + num * min(MOST_PROBES, cells) * IMBALANCE * num / cells / rates.codes

    cells = min(choices, key=code_seconds)
    codes = num * (dim // 8 + 16)
    return _Cost(code_seconds(cells), codes + 8 * TRAINING_POINTS * cells * dim + block_bytes, cells)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
