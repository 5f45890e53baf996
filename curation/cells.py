"""The threshold join within cells of k-means (IVF): each vector is compared with the members of its nearest cells.

List-major: cell by cell, its members against all vectors that visit it, by the blocked products of the exact join. What
is found is therefore exactly what the exact join finds, less the pairs that never meet. A pair has two chances to meet:
a visits b's cell, or b visits a's. Single-cell searches (SemDeDup) lose the pairs that a border parts.

N vectors of width D, C cells, P cells visited by each vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runtime.files import write_array
from runtime.seeding import generator

from .clusters import kmeans
from .threshold import Block, Pairs, blocks_for, pairs_of_blocks
from .unit_vectors import UnitVectors

TRAINING_POINTS = 40  # vectors per cell that k-means is trained on
ITERATIONS = 8  # of k-means; cells need not be the best, only even enough


@dataclass(frozen=True, eq=False)
class Cells:
    """Which vectors visit which cells; a vector's nearest cell is where it is a member."""

    visits: np.ndarray  # int32 [N, P], cells of each vector, nearest first
    visitors: (
        np.ndarray
    )  # int32 [N P], vectors by the cell they visit; those that are nearest to it, its members, first
    bounds: np.ndarray  # int64 [C + 1], where each cell's visitors start

    @staticmethod
    def of(visits: np.ndarray, num_cells: int) -> "Cells":
        bounds = np.concatenate([[0], np.cumsum(np.bincount(visits.reshape(-1), minlength=num_cells))])
        visitors = np.empty(visits.size, dtype=np.int32)
        free = bounds[:-1].copy()  # the next place of each cell
        for column in visits.T:  # not all at once: their order as int64 would take as much memory as the vectors
            order = np.argsort(column, kind="stable")
            counts = np.bincount(column, minlength=num_cells)
            rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            visitors[free[column[order]] + rank] = order
            free += counts
        return Cells(visits, visitors, bounds)

    def costs(self) -> np.ndarray:
        """Products to compute in each cell, members times visitors; int64 [C]."""
        return np.bincount(self.visits[:, 0], minlength=len(self.bounds) - 1) * np.diff(self.bounds)

    def write(self, folder: Path) -> None:
        for name in ("visits", "visitors", "bounds"):
            write_array(folder / f"{name}.npy", getattr(self, name))

    @staticmethod
    def read(folder: Path) -> "Cells":
        return Cells(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("visits", "visitors", "bounds")))


def train_cells(vectors: UnitVectors, num_cells: int, *, seed: int) -> np.ndarray:
    """Centroids of spherical k-means on a sample of the vectors; float32 [C, D]. Cost: 640 D C^2 operations."""
    points = min(len(vectors), TRAINING_POINTS * num_cells)
    chosen = np.sort(generator(seed, "cell training points").choice(len(vectors), points, replace=False))
    return kmeans(vectors.take(chosen), num_cells, iterations=ITERATIONS, seed=seed, purpose="cells")


def visit_cells(vectors: UnitVectors, centroids: np.ndarray, num_probes: int, *, device: torch.device) -> np.ndarray:
    """The nearest cells of each vector, nearest first, to the filter's precision; int32 [N, P]."""
    blocks = blocks_for(device)
    cells = Block.load(UnitVectors((centroids,)), slice(None), device).rough[: len(centroids)]
    result = np.empty((len(vectors), num_probes), dtype=np.int32)
    for start in range(0, len(vectors), blocks.tile):
        block = Block.load(vectors, slice(start, start + blocks.tile), device)
        nearest = (block.rough @ cells.T).topk(num_probes).indices[: len(block.exact)]
        result[start : start + blocks.tile] = nearest.int().cpu().numpy()
    return result


def probes_for(visits: np.ndarray, pairs: np.ndarray, *, recall: float) -> tuple[int, float]:
    """The fewest probes that let this share of some true pairs meet, and the share that meets then.

    visits: int32 [N, P] for the most probes allowed, which is the answer where none suffices. pairs: int64 [E, 2],
    all pairs of a sample, by exact search.
    """
    if not len(pairs):
        return 1, 1.0
    a, b = pairs.T
    ranks = []
    for one, other in ((a, b), (b, a)):
        there = visits[one] == visits[other, :1]
        ranks.append(np.where(there.any(1), there.argmax(1), visits.shape[1]))
    meet = np.bincount(np.minimum(*ranks), minlength=visits.shape[1] + 1).cumsum()[:-1] / len(pairs)
    enough = np.flatnonzero(meet >= recall)
    probes = int(enough[0]) + 1 if len(enough) else visits.shape[1]
    return probes, float(meet[probes - 1])


def cell_pairs(
    vectors: UnitVectors,
    cells: Cells,
    *,
    threshold: float,
    device: torch.device,
    which: tuple[int, int] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Pairs:
    """Pairs a < b with cosine >= threshold that meet in the cells of a range (a work unit; all by default). Sorted.

    Over all ranges every pair comes once: of two cells where it meets, the lower one reports it. `check` is called
    before each cell and may raise.
    """
    found = []
    for cell in range(*(which or (0, len(cells.bounds) - 1))):
        check()
        visitors = np.asarray(cells.visitors[cells.bounds[cell] : cells.bounds[cell + 1]])
        members = visitors[cells.visits[visitors, 0] == cell]
        if len(members):
            found.append(_pairs_in_cell(vectors, members, visitors, cells.visits, threshold, device))
    return Pairs.joined(found).sorted()


def _pairs_in_cell(
    vectors: UnitVectors,
    members: np.ndarray,
    visitors: np.ndarray,
    visits: np.ndarray,
    threshold: float,
    device: torch.device,
) -> Pairs:
    """The pairs of members and visitors of one cell that this cell reports, smaller index first."""
    blocks = blocks_for(device)
    found = []
    for column in range(0, len(visitors), blocks.right):
        theirs = visitors[column : column + blocks.right]
        right = Block.load(vectors, theirs, device)
        for row in range(0, len(members), blocks.left):
            ours = members[row : row + blocks.left]
            left = Block.load(vectors, ours, device)

            def wanted(
                i: np.ndarray, j: np.ndarray, ours: np.ndarray = ours, theirs: np.ndarray = theirs
            ) -> np.ndarray:
                return _reported_here(ours[i], theirs[j], visits)

            i, j, cosine = pairs_of_blocks(left, right, threshold=threshold, tile=blocks.tile, wanted=wanted)
            index = np.stack([ours[i.cpu().numpy()], theirs[j.cpu().numpy()]], axis=1).astype(np.int64)
            found.append(Pairs(np.sort(index, axis=1), cosine.cpu().numpy()))
    return Pairs.joined(found)


def _reported_here(member: np.ndarray, visitor: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Which pairs of a cell's member and visitor (vectors, int [E] each) this cell reports; bool [E].

    Two members come in both orders. Others meet in the visitor's cell too if the member visits it.
    """
    cell, home = visits[member, 0], visits[visitor, 0]
    elsewhere = (home < cell) & (visits[member] == home[:, None]).any(1)
    return np.where(home == cell, member < visitor, ~elsewhere)
