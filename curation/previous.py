"""What an earlier run already knows (`previous`): rows of decoding, vectors, pairs and scores, by content id.

Everything taken over is a function of the bytes of one or two images and of settings that are compared first, so a run
with `previous` gives what a run without it gives, in less time (docs/incremental.md). What cannot be taken over,
because a setting differs, is computed anew and said.

N rows of this run, E pairs of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.config import differences, to_dict
from runtime.errors import UserError
from runtime.files import read_json, write_array
from runtime.progress import say

from .config import CurateConfig
from .stage import Stage
from .unit_vectors import map_parts

KnownVectors = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]
KNOWN = "known.npy"  # in the decode stage: content ids of the previous run, for its workers to map


class Previous:
    """A finished curation."""

    def __init__(self, out: Path):
        self.out = out

    @staticmethod
    def of(config: CurateConfig) -> "Previous | None":
        """The run that `previous` names, or None. Raises UserError when it is not a finished one."""
        if not config.previous:
            return None
        out = Path(config.previous).expanduser()
        folder = next((f for f in (out, out / "curate") if (f / "summary.json").is_file()), None)
        if folder is None:
            found = "a folder without summary.json" if out.is_dir() else "no folder"
            raise UserError(
                f"previous: {config.previous} is not a finished curation ({found})\n"
                f"  finish that run first, or leave previous away"
            )
        if folder.resolve() == Path(config.out).resolve():
            raise UserError("previous: that is this run's own folder; give another out=...")
        return _opened(str(folder.resolve()))

    def stage(self, name: str) -> Stage:
        return Stage(self.out, name, {})

    def inputs(self, name: str) -> dict[str, Any]:
        """The settings under which a stage was done; empty where it did not run."""
        claim = self.stage(name).file("stage.json")
        return read_json(claim)["inputs"] if claim.is_file() else {}

    def column(self, stage: str, name: str) -> list[Any]:
        """One column of all parts of a stage."""
        parts = sorted(self.stage(stage).folder.glob("part-*.parquet"))
        return [value for part in parts for value in pq.read_table(part, columns=[name])[name].to_pylist()]

    @cached_property
    def ids(self) -> "Ids":
        """Content ids of its decoded rows."""
        return Ids.of(self.column("decode", "item_id"))

    def same(self, stage: str, wanted: dict[str, Any], what: str) -> bool:
        """Whether a stage ran with these settings; says what differs where it did not."""
        inputs = self.inputs(stage)
        old = {name: value for name, value in inputs.items() if name in wanted}
        changed = differences(old, wanted, f"{stage}.")
        if changed:
            _say_once(f"previous: {what} are not taken over: {changed[0]}")
        return not changed


@dataclass(frozen=True, eq=False)
class Ids:
    """Content ids of K rows, sorted; of equal ones the first row counts."""

    keys: np.ndarray  # uint64 [K, 3]: both halves of the id, and the row; sorted. May be a memory map

    @staticmethod
    def of(ids: list[str | None]) -> "Ids":
        rows = np.array([row for row, item in enumerate(ids) if item], dtype=np.uint64)
        halves = _halves([item for item in ids if item])
        order = np.lexsort((rows, halves[:, 1], halves[:, 0]))
        return Ids(np.column_stack([halves, rows])[order])

    def find(self, ids: list[str]) -> np.ndarray:
        """The row of each content id ("" or unknown: -1); int64 [len(ids)]."""
        result = np.full(len(ids), -1, dtype=np.int64)
        asked = np.array([place for place, item in enumerate(ids) if item], dtype=np.int64)
        if not len(asked) or not len(self.keys):
            return result
        halves = _halves([ids[place] for place in asked])
        # Two ids with one first half are as good as never met; such an id is then computed anew.
        at = np.minimum(np.searchsorted(self.keys[:, 0], halves[:, 0]), len(self.keys) - 1)
        found = (self.keys[at, :2] == halves).all(axis=1)
        result[asked[found]] = self.keys[at[found], 2].astype(np.int64)
        return result


@dataclass(frozen=True)
class Decoded:
    """Decoded rows and thumbnails of the previous run, as a worker of this run reads them."""

    known: Path  # `Ids` as an array
    folder: Path  # of the previous run's stage decode

    def count(self, ids: list[str | None]) -> int:
        """How many of these content ids are known."""
        return int((_mapped(self.known).find([item or "" for item in ids]) >= 0).sum())

    def look_up(self, item_id: str) -> tuple[dict[str, Any], np.ndarray] | None:
        """The row and the thumbnail of equal bytes; None where there are none."""
        row = int(_mapped(self.known).find([item_id])[0])
        if row < 0:
            return None
        starts, parts = _parts(self.folder)
        part = int(np.searchsorted(starts, row, side="right")) - 1
        table, thumbs = _part(parts[part])
        return table.slice(row - int(starts[part]), 1).to_pylist()[0], thumbs[row - int(starts[part])]


def previous_decoded(config: CurateConfig, decode: Stage) -> Decoded | None:
    """What workers of stage decode may take over; None where there is nothing."""
    previous = Previous.of(config)
    if previous is None or not previous.same("decode", to_dict(config)["decode"], "decoded images and scores of pairs"):
        return None
    known = decode.file(KNOWN)
    if not known.is_file():
        write_array(known, previous.ids.keys)
    return Decoded(known, previous.stage("decode").folder)


def previous_vectors(config: CurateConfig, ids: list[str], purpose: str, weights: str) -> KnownVectors:
    """Which images have a vector of the same model already (bool [N]), and a function that reads some of those.

    It takes indices (int64 [n]) and gives float16 [n, D]. ids: content ids. weights: the model's identity.
    """
    previous = Previous.of(config)
    of = _same_model(previous, config, purpose, weights) if previous is not None else None
    if previous is None or of is None:
        return np.zeros(len(ids), dtype=bool), lambda index: np.empty((len(index), 0), np.float16)
    vectors = map_parts(sorted(previous.stage("embed").folder.glob(f"part-*-{of}.npy")))
    embedded, all_ids = previous.column("embed", "row"), previous.column("decode", "item_id")
    at = Ids.of([all_ids[row] for row in embedded]).find(ids)
    return at >= 0, lambda index: vectors.stored(at[index])


def previous_pairs(config: CurateConfig, ids: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of N images were joined before (bool [N]), their pairs above the threshold (int64 [E, 2]) and the cosines.

    ids: content ids of the pool without exact copies, N distinct ones. weights: identity of the copy model. Pairs are
    indices a < b, sorted. None are known unless the previous run found every pair of them: by the exact join, from the
    same vectors, at no higher threshold.
    """
    nothing = np.zeros(len(ids), dtype=bool), np.empty((0, 2), np.int64), np.empty(0, np.float32)
    previous = Previous.of(config)
    if previous is None or _same_model(previous, config, "copy", weights) != "copy":
        return nothing
    threshold, plan = config.dedup.threshold, read_json(previous.stage("index").file("plan.json"))
    if plan["pool"]["method"] != "exact" or previous.inputs("index")["threshold"] > threshold:
        _say_once("previous: pairs are searched anew: its join was not exact, or its dedup.threshold was higher")
        return nothing
    roles, all_ids = previous.column("items", "role"), previous.column("decode", "item_id")
    reasons = previous.column("decode", "reason")
    copies = set(previous.stage("exact").table("duplicates.parquet")["row"].to_pylist())
    joined = [row for row, role in enumerate(roles) if role == "pool" and reasons[row] is None and row not in copies]
    at = Ids.of([all_ids[row] for row in joined]).find(ids.tolist())
    position = np.full(len(all_ids), -1, dtype=np.int64)  # in `ids`, of rows of the previous run
    position[np.array(joined, dtype=np.int64)[at[at >= 0]]] = np.flatnonzero(at >= 0)
    table = previous.stage("join").table("pool.parquet")
    pairs = np.sort(np.stack([position[table[name].to_numpy()] for name in ("row_a", "row_b")], axis=1), axis=1)
    cosine = table["cosine"].to_numpy()
    here = (pairs[:, 0] >= 0) & (cosine >= np.float32(threshold))
    return at >= 0, pairs[here], cosine[here]


def _same_model(previous: Previous, config: CurateConfig, purpose: str, weights: str) -> str | None:
    """The purpose for which the previous run used this model at this size; None where it did not."""
    inputs, size = previous.inputs("embed"), to_dict(config)["embed"][purpose]["size"]
    used: dict[str, str] = inputs["weights"]
    for other in (purpose, *used):
        if used.get(other) == weights and inputs[other]["size"] == size:
            return other
    _say_once(f"previous: {purpose} vectors are not taken over: embed.{purpose} is another model or another size")
    return None


def previous_scores(config: CurateConfig, ids: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Scores of pixel verification that are known; float32 [E], NaN where they are not.

    ids: content ids of all rows of this run. pairs: int64 [E, 2], rows.
    """
    scores = np.full(len(pairs), np.nan, dtype=np.float32)
    previous = Previous.of(config)
    if previous is None or not len(pairs):
        return scores
    if not previous.same("decode", to_dict(config)["decode"], "decoded images and scores of pairs"):
        return scores
    known, values = _known_scores(previous)
    rows, index = np.unique(pairs, return_inverse=True)
    asked = previous.ids.find(ids[rows].tolist())[index.reshape(-1, 2)]
    codes = asked[:, 0] << 32 | asked[:, 1]
    at = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    if len(known):
        found = np.logical_and(asked.min(axis=1) >= 0, known[at] == codes)
        scores[found] = values[at[found]]
    return scores


@lru_cache(maxsize=1)
def _opened(folder: str) -> Previous:
    return Previous(Path(folder))


@lru_cache(maxsize=1)
def _known_scores(previous: Previous) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows of the previous run, each row named by the first of its bytes, as sorted numbers; their scores."""
    first = previous.ids.find([item or "" for item in previous.column("decode", "item_id")])
    found = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for part in _score_files(previous):
        table = pq.read_table(part)
        found[0].append(np.stack([first[table[name].to_numpy()] for name in ("row_a", "row_b")], axis=1))
        found[1].append(table["score"].to_numpy())
    pairs, scores = np.concatenate(found[0]), np.concatenate(found[1])
    codes, one = np.unique(pairs[:, 0] << 32 | pairs[:, 1], return_index=True)
    return codes, scores[one]


def _score_files(previous: Previous) -> list[Path]:
    """Tables with pairs and scores: of the copies that look alike, of the pool, of the evaluation sets."""
    files = [previous.stage("exact").file("compared.parquet")]
    files += [previous.stage("verify").file(f"{name}.parquet") for name in ("pool", "guard")]
    return [file for file in files if file.is_file()]


@lru_cache(maxsize=1)
def _mapped(known: Path) -> Ids:
    return Ids(np.load(known, mmap_mode="r"))


@lru_cache(maxsize=1)
def _parts(folder: Path) -> tuple[np.ndarray, list[Path]]:
    """The first row of each part of a decode stage, and the parts."""
    parts = sorted(folder.glob("part-*.parquet"))
    counts = [pq.read_metadata(part).num_rows for part in parts]
    return np.cumsum([0, *counts])[:-1], parts


@lru_cache(maxsize=4)
def _part(table: Path) -> tuple[pa.Table, np.ndarray]:
    return pq.read_table(table), np.load(table.with_suffix(".npy"), mmap_mode="r")


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    say(text)


def _halves(ids: list[str]) -> np.ndarray:
    """32 hex digits each as two numbers; uint64 [len(ids), 2]."""
    return np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
