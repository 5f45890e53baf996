"""Pixel verification of many pairs: units of pairs in threads, or on the GPU where there is one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from runtime.files import write_table
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.world import choose_device

from .config import CurateConfig
from .previous import previous_scores
from .rows import Rows, read_thumbs, thumb_files
from .stage import WHOLE, Share, Stage
from .threads import torch_threads
from .verify import verify_pairs

UNIT = 4096  # pairs
PROPOSED = ("pool", "guard")  # tables of the join: pairs of pool images, and (evaluation image, pool image)


@dataclass(frozen=True, eq=False)
class ScoreUnit:
    """Pairs to verify, to become one part of a stage."""

    table: Path
    thumbs: tuple[Path, ...]
    rows: np.ndarray  # int64 [N]: the rows that occur in the pairs, sorted
    aspect: np.ndarray  # float32 [N]
    pairs: np.ndarray  # int64 [E, 2], into `rows`
    device: str

    def __repr__(self) -> str:
        return f"verification {self.table.stem}"


def judge_pairs(
    config: CurateConfig,
    rows: Rows,
    decode: Stage,
    pairs: np.ndarray,
    stage: Stage,
    stop: StopRequest | None,
    *,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (float32 [E]) of pairs of rows, and which pass; with dedup.verify off all pass, unscored (NaN)."""
    if not config.dedup.verify:
        return np.full(len(pairs), np.nan, dtype=np.float32), np.ones(len(pairs), dtype=bool)
    score = score_pairs(config, rows, decode, pairs, stage, stop)
    return score, score >= threshold


def verify_stage(
    config: CurateConfig, rows: Rows, decode: Stage, join: Stage, stage: Stage, stop: StopRequest | None, share: Share
) -> None:
    """Score every pair that the join proposed: `pool.parquet` and `guard.parquet` with a column `score`."""
    stage.open(share)
    tables = {name: join.table(f"{name}.parquet") for name in PROPOSED}
    pairs = np.concatenate([as_pairs(table) for table in tables.values()])
    score = previous_scores(config, rows.ids, pairs)
    new = np.isnan(score)
    files = _score_parts(config, rows, decode, pairs[new], stage, stop, share)
    if not share.whole:
        return
    score[new], start = _read_scores(files), 0
    for name, table in tables.items():
        scored = table.append_column("score", pa.array(score[start : start + len(table)]))
        write_table(stage.file(f"{name}.parquet"), scored)
        start += len(table)
    stage.finish(pairs=len(pairs), compared=int(new.sum()))


def as_pairs(table: pa.Table) -> np.ndarray:
    """The pairs of rows in a table; int64 [E, 2]."""
    return np.stack([table["row_a"].to_numpy(), table["row_b"].to_numpy()], axis=1)


def score_pairs(
    config: CurateConfig, rows: Rows, decode: Stage, pairs: np.ndarray, stage: Stage, stop: StopRequest | None
) -> np.ndarray:
    """Agreement of each pair of rows (int64 [E, 2], sorted), 0 to 1; float32 [E]. Finished parts are read back."""
    score = previous_scores(config, rows.ids, pairs)
    new = np.isnan(score)
    score[new] = _read_scores(_score_parts(config, rows, decode, pairs[new], stage, stop, WHOLE))
    return score


def _read_scores(files: Sequence[Path]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.float32), *(pq.read_table(file)["score"].to_numpy() for file in files)])


def _score_parts(
    config: CurateConfig,
    rows: Rows,
    decode: Stage,
    pairs: np.ndarray,
    stage: Stage,
    stop: StopRequest | None,
    share: Share,
) -> list[Path]:
    """Write the scores of a share's parts that are not there yet; the files of all parts."""
    device = choose_device(config.device)
    files, aspect = tuple(thumb_files(decode)), rows.aspect
    units = []
    for index, start in enumerate(range(0, len(pairs), UNIT)):
        used, local = np.unique(pairs[start : start + UNIT], return_inverse=True)
        units.append(ScoreUnit(stage.part(index), files, used, aspect[used], local.reshape(-1, 2), str(device)))
    own = share.of(units)
    waiting = [unit for unit in own if not _is_done(unit)]
    total = sum(len(unit.pairs) for unit in own)
    done = total - sum(len(unit.pairs) for unit in waiting)
    if waiting:
        with Progress(f"{stage.name}: compare", total=total, unit="pairs", done=done) as progress:
            _score_units(waiting, 1 if device.type == "cuda" else max(1, config.workers), progress, stop)
    return [unit.table for unit in units]


def score_unit(unit: ScoreUnit) -> int:
    """Write the scores of one unit; the number of its pairs."""
    thumbs = read_thumbs(unit.thumbs, unit.rows)
    scores = verify_pairs(thumbs, unit.aspect, unit.pairs, torch.device(unit.device))
    row_a, row_b = unit.rows[unit.pairs].T
    write_table(unit.table, pa.table({"row_a": row_a, "row_b": row_b, "score": scores}))
    return len(scores)


def _is_done(unit: ScoreUnit) -> bool:
    """Whether the part is there and of these pairs: on another machine, proposals may be rounded otherwise."""
    if not unit.table.is_file():
        return False
    table = pq.read_table(unit.table, columns=["row_a", "row_b"])
    found = np.stack([table[name].to_numpy() for name in ("row_a", "row_b")], axis=1)
    return np.array_equal(found, unit.rows[unit.pairs])


def _score_units(units: list[ScoreUnit], workers: int, progress: Progress, stop: StopRequest | None) -> None:
    """Units in threads: torch lets go of the interpreter, and starting a process that imports it takes seconds."""
    # One thread for each unit's many small operations; and the same sums whatever the number of workers.
    with torch_threads(1):
        pool = ThreadPoolExecutor(workers)
        try:
            for count in pool.map(score_unit, units):
                progress.advance(count)
                if stop is not None:
                    stop.check()
        finally:
            pool.shutdown(cancel_futures=True)
