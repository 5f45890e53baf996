"""Kinds of FAISS index: which one for how many vectors, what is inside one, and how two are merged."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss

from runtime.errors import UserError

KINDS = ("flat", "ivf", "ivfpq", "rabitq", "hnsw")
MANY_CELLS = 16384  # from here on the nearest cells are found by a graph, not by comparing with all


def preset(kind: str, num: int, dim: int, *, on_disk: bool = False) -> str:
    """The factory string of a kind for `num` vectors of width `dim`. Raises UserError.

    Cells: 4 sqrt(N), with 64 vectors each at least. Compressed kinds keep half-precision vectors to compare their
    candidates with; on disk they do not, since those would stay in memory.
    """
    if kind not in KINDS:
        raise UserError(f"--kind: no kind {kind!r}; the kinds are {', '.join(KINDS)}")
    if kind in ("flat", "rabitq", "hnsw") and on_disk:
        raise UserError(f"--on-disk: kind {kind} lies in memory; ivf and ivfpq can lie on disk")
    nlist = max(1, min(round(4 * math.sqrt(num)), num // 64))
    cells = f"IVF{nlist}" + ("_HNSW32" if nlist >= MANY_CELLS else "")
    return {
        "flat": "Flat",
        "ivf": f"{cells},{'SQfp16' if on_disk else 'Flat'}",
        "ivfpq": f"{cells},PQ{_divisor(dim, dim // 8)}x8"
        if on_disk
        else f"{cells},PQ{_divisor(dim, dim // 4)}x4fs,Refine(SQfp16)",
        "rabitq": f"{cells},RaBitQfs,Refine(SQfp16)",
        "hnsw": "HNSW32",
    }[kind]


def core_of(index: Any) -> Any:
    """The index inside its wrappers (transform, refinement, ids)."""
    index = faiss.downcast_index(index)
    for wrapper, inside in (
        (faiss.IndexPreTransform, "index"),
        (faiss.IndexRefine, "base_index"),
        (faiss.IndexIDMap, "index"),
    ):
        if isinstance(index, wrapper):
            return core_of(getattr(index, inside))
    return index


def type_name(index: Any) -> str:
    outer, core = type(faiss.downcast_index(index)).__name__, type(core_of(index)).__name__
    return core if outer == core else f"{outer} of {core}"


def merge(index: Any, other: Any, what: str) -> None:
    """Move the vectors of another index of the same training behind those of `index`. Raises UserError."""
    if isinstance(index, faiss.IndexRefine):
        for name in ("base_index", "refine_index"):
            merge(faiss.downcast_index(getattr(index, name)), faiss.downcast_index(getattr(other, name)), what)
        index.ntotal = index.base_index.ntotal
        return
    try:
        index.merge_from(other, index.ntotal if isinstance(core_of(index), faiss.IndexIVF) else 0)
    except RuntimeError as error:
        raise UserError(
            f"{what}: FAISS does not merge {type_name(index)}; build one of all vectors ({reason(error)})"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing is printed: FAISS writes of lists on disk to the stdout that holds our results."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def reason(error: RuntimeError) -> str:
    """What FAISS says, without where in its sources."""
    return str(error).strip().splitlines()[-1].split("' failed: ")[-1][:160]


def _divisor(number: int, largest: int) -> int:
    """The largest divisor of `number` that is at most `largest`, and at least 1."""
    return next((d for d in range(largest, 0, -1) if number % d == 0), 1)
