"""Every pair of unit vectors with cosine >= t, exactly: blocked bfloat16 products, and what passes is looked at again.

The products are a filter: at t minus a margin that no rounding can exceed (`margin`), so none is lost. What passes is
computed again from the stored vectors with sums in float64 and rounded to float32; that value decides and is reported,
so that CPU and GPU, bfloat16 and float32 filters, and any blocking give the same pairs. Of a self-join only the upper
triangle is computed. No matrix of all products exists: memory is two blocks, one tile of products, and the pairs.

N, M vectors of width D, E pairs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .unit_vectors import UnitVectors, as_vectors

HALF, BFLOAT = 2.0**-11, 2.0**-8  # relative error of rounding to float16, to bfloat16
PAD = 256  # rows of a block come in multiples of this: oneDNN prepares, and keeps, a kernel for every shape
RECHECK = 256  # pairs whose cosines are computed at a time on CPU: their vectors stay in cache


@dataclass(frozen=True)
class Blocks:
    """Vectors loaded at a time on either side of the join, and rows of the left block multiplied at a time."""

    left: int
    right: int
    tile: int

    @property
    def products(self) -> int:
        """Most bytes of products that exist at a time."""
        return 4 * self.tile * self.right


CPU_BLOCKS = Blocks(left=8192, right=4096, tile=1024)  # a tile of products stays in the last-level cache
CUDA_BLOCKS = Blocks(left=65536, right=32768, tile=8192)  # 0.5 GB of products, 0.6 GB of vectors at D = 1024


@dataclass(frozen=True)
class Pairs:
    """Pairs of indices and their cosines."""

    index: np.ndarray  # int64 [E, 2]
    cosine: np.ndarray  # float32 [E]

    def __len__(self) -> int:
        return len(self.index)

    def sorted(self) -> "Pairs":
        order = np.lexsort(self.index.T[::-1])
        return Pairs(self.index[order], self.cosine[order])

    def distinct(self) -> "Pairs":
        """Every pair once, sorted. Indices are below 2^31."""
        _, first = np.unique(self.index[:, 0] << 32 | self.index[:, 1], return_index=True)
        return Pairs(self.index[first], self.cosine[first])

    @staticmethod
    def joined(found: "list[Pairs]") -> "Pairs":
        """Several results one after the other."""
        return Pairs(
            np.concatenate([np.empty((0, 2), np.int64), *(pairs.index for pairs in found)]),
            np.concatenate([np.empty(0, np.float32), *(pairs.cosine for pairs in found)]),
        )


def blocks_for(device: torch.device) -> Blocks:
    return CUDA_BLOCKS if device.type == "cuda" else CPU_BLOCKS


def margin(dim: int) -> float:
    """How far the filter's product of two vectors of width `dim` may lie below their cosine c <= 1, at most.

    x, y: the stored vectors, rounded from unit length to float16, so |x|, |y| = 1 +- e with e = 2^-11 (and
    sqrt(D) 2^-25 for numbers below float16's normal range). Rounding both to bfloat16 (u = 2^-8 per number) moves
    their product by at most (2u + u^2) sum |x_i y_i| <= (2u + u^2) |x| |y| by Cauchy-Schwarz. A float32 sum of D terms
    in any order, even truncated as tensor cores do, loses at most D 2^-23 sum |x_i y_i|, and rounding the sum to
    bfloat16 loses u times it. Float32 filters err less. About 0.013 for D = 384.
    """
    length = HALF + dim**0.5 * 2.0**-25
    products = (2 * BFLOAT + BFLOAT**2 + dim * 2.0**-23 * (1 + BFLOAT) ** 2) * (1 + length) ** 2
    return 2 * length + products * (1 + BFLOAT) + BFLOAT * (1 + length) ** 2


@cache
def filter_dtype(device: torch.device) -> torch.dtype:
    """The faster of bfloat16 and float32 for products here: not every CPU multiplies bfloat16 in hardware.

    Decides how fast a join is, not what it finds.
    """
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(256, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        _products(left, right)  # the first call prepares the kernel
        start = time.perf_counter()
        for _ in range(3):
            _products(left, right)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


@dataclass(frozen=True)
class Block:
    """Vectors on the device of a join."""

    exact: Tensor  # float32 [n, D], the stored values
    rough: Tensor  # bfloat16 or float32 [n rounded up to a multiple of PAD, D]; the rows from n on are zero

    @staticmethod
    def load(vectors: UnitVectors, index: slice | np.ndarray, device: torch.device) -> "Block":
        exact = torch.from_numpy(vectors.stored(index)).to(device).float()
        rough = exact.new_zeros((-(-len(exact) // PAD) * PAD, exact.shape[1]), dtype=filter_dtype(device))
        rough[: len(exact)] = exact
        return Block(exact, rough)


def pairs_of_blocks(
    left: Block,
    right: Block,
    *,
    threshold: float,
    tile: int,
    above: int | None = None,
    wanted: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Index in left, index in right, cosine of every pair of vectors with cosine >= threshold; [E] each.

    above: only pairs with i + above < j (the upper triangle of a self-join whose blocks start `above` apart).
    wanted: (indices in left, indices in right) -> which of these pairs are wanted; the others are not looked at again.
    """
    found = [torch.empty((0, 2), dtype=torch.int64, device=left.exact.device)]
    for start in range(0, len(left.rough), tile):
        skip = 0 if above is None else max(0, start + above + 1) // PAD * PAD  # columns all below the diagonal
        if skip >= len(right.rough):
            break
        near = _passing(left.rough[start : start + tile], right.rough[skip:], threshold - margin(left.exact.shape[1]))
        near += torch.tensor([start, skip], device=near.device)
        here = (near[:, 0] < len(left.exact)) & (near[:, 1] < len(right.exact))
        if above is not None:
            here &= near[:, 0] + above < near[:, 1]
        near = near[here]
        if wanted is not None:
            near = near[torch.from_numpy(wanted(*near.cpu().numpy().T)).to(near.device)]
        found.append(near)
    i, j = torch.cat(found).T
    cosine = _cosines(left.exact, right.exact, i, j)
    close = cosine >= torch.tensor(threshold, dtype=torch.float32)
    return i[close], j[close], cosine[close]


def count_pairs(queries: UnitVectors, base: UnitVectors, *, threshold: float, device: torch.device) -> int:
    """About how many (query, base) pairs have cosine >= threshold: what passes the filter there. Keeps no pair."""
    blocks, total = blocks_for(device), 0
    for _, left in _blocks(queries, 0, len(queries), blocks.left, device):
        for _, right in _blocks(base, 0, len(base), blocks.right, device):
            for rows in left.rough[: len(left.exact)].split(blocks.tile):
                product, cut = _comparable(_products(rows, right.rough[: len(right.exact)]), threshold)
                total += int((product >= cut).sum())
    return total


def threshold_pairs(
    queries: np.ndarray | UnitVectors,
    base: np.ndarray | UnitVectors | None = None,
    *,
    threshold: float,
    device: torch.device | str = "cpu",
    rows: tuple[int, int] | None = None,
    blocks: Blocks | None = None,
) -> Pairs:
    """Every (query, base) pair with cosine >= threshold; without base, every pair a < b of the queries. Sorted.

    queries, base: unit vectors [N, D] and [M, D], float16 or float32. rows: only pairs whose query is in this range
    (a work unit; see `even_ranges`). Memory: `Blocks` and the pairs.
    """
    device = torch.device(device)
    blocks = blocks or blocks_for(device)
    queries = as_vectors(queries)
    others = queries if base is None else as_vectors(base)
    begin, end = rows or (0, len(queries))
    found = []
    for row, left in _blocks(queries, begin, end, blocks.left, device):
        for column, right in _blocks(others, row if base is None else 0, len(others), blocks.right, device):
            above = row - column if base is None else None
            i, j, cosine = pairs_of_blocks(left, right, threshold=threshold, tile=blocks.tile, above=above)
            if len(i):
                index = torch.stack([i + row, j + column], dim=1)
                found.append(Pairs(index.cpu().numpy(), cosine.cpu().numpy()))
    return Pairs.joined(found).sorted()


def exact_cosines(vectors: UnitVectors, others: UnitVectors, pairs: np.ndarray) -> np.ndarray:
    """Cosines of pairs (int64 [E, 2]) as every join reports them; float32 [E]."""
    result = np.empty(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), 8192):
        a, b = pairs[start : start + 8192].T
        left, right = (torch.from_numpy(side.stored(index)).float() for side, index in ((vectors, a), (others, b)))
        same = torch.arange(len(a))
        result[start : start + 8192] = _cosines(left, right, same, same).numpy()
    return result


def triangle_costs(num: int, step: int) -> np.ndarray:
    """Products in each run of `step` rows of a self-join of `num` vectors; int64 [ceil(num / step)]."""
    starts = np.arange(0, num, step)
    return np.minimum(step, num - starts) * (num - starts)


def even_ranges(costs: np.ndarray, num: int) -> list[tuple[int, int]]:
    """At most `num` consecutive ranges [start, stop) over items of given costs, of about equal cost; none is empty."""
    total = np.cumsum(costs, dtype=np.float64)
    if not len(total):
        return []
    ends = np.searchsorted(total, total[-1] * np.arange(1, num + 1) / num, side="left") + 1
    ends[-1] = len(total)
    ends = np.unique(np.minimum(ends, len(total)))
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _blocks(vectors: UnitVectors, begin: int, end: int, step: int, device: torch.device) -> Iterator[tuple[int, Block]]:
    for start in range(begin, end, step):
        yield start, Block.load(vectors, slice(start, min(start + step, end)), device)


def _products(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type != "cuda":
        return left @ right.T
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # partial sums in bfloat16 would break the margin
    try:
        return left @ right.T
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _comparable(product: Tensor, cut: float) -> tuple[Tensor, float]:
    """Products and a cut in a type that compares fast.

    The bits of positive floats are ordered as integers, and negative floats are negative integers; PyTorch compares
    and reduces int16 some ten times faster than bfloat16 on CPU. Dropping the bits of the cut rounds it down.
    """
    if cut <= 0:
        return product.float(), cut
    bits = int(np.float32(cut).view(np.int32))
    if product.dtype == torch.bfloat16:
        return product.view(torch.int16), bits >> 16
    return product.view(torch.int32), bits - 1  # the cut itself may have been rounded up to float32


def _passing(left: Tensor, right: Tensor, cut: float) -> Tensor:
    """Indices of products >= cut; int64 [P, 2]. Most rows have none, which their maximum shows at little cost."""
    product, cut = _comparable(_products(left, right), cut)
    hit = (product.amax(1) >= cut).nonzero()[:, 0]
    near = (product[hit] >= cut).nonzero()
    return torch.stack([hit[near[:, 0]], near[:, 1]], dim=1)


def _cosines(left: Tensor, right: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Cosines of left[i] and right[j] with sums in float64; float32 [E], at most 1."""
    result = torch.empty(len(i), dtype=torch.float32, device=left.device)
    step = RECHECK if left.device.type == "cpu" else 1 << 18
    for start in range(0, len(i), step):
        a, b = left[i[start : start + step]].double(), right[j[start : start + step]].double()
        lengths = ((a * a).sum(1) * (b * b).sum(1)).sqrt()
        result[start : start + step] = ((a * b).sum(1) / lengths).clamp(-1, 1)
    return result
