"""Exact and perceptual duplicates, before any model looks: the same bytes, the same pixels, the same look.

They go first so that placeholders and re-uploads cannot fill the neighbour lists of the near-duplicate join.
"""

import numpy as np
import pyarrow as pa

from runtime.files import write_table
from runtime.progress import say
from runtime.signals import StopRequest

from .config import CurateConfig
from .groups import leaders, precedence, representatives
from .join import hash_pairs, self_pairs
from .rows import Rows
from .scoring import judge_pairs
from .stage import Stage

REASONS = ("same bytes", "same pixels", "same look")

SCHEMA = pa.schema([("row", pa.int64()), ("of", pa.int64()), ("reason", pa.string())])


def exact_stage(config: CurateConfig, rows: Rows, decode: Stage, stage: Stage, stop: StopRequest | None) -> None:
    """Write `duplicates.parquet`: every pool row that is a copy, the row that stays for it, and why."""
    stage.open()
    pool = rows.of("pool")
    staying = pool
    removed = []
    for reason in REASONS:
        if reason == "same look":
            # In order of rank: of many pictures with one hash, the one that would stay is paired with the others.
            rank = precedence(rows.area[staying], rows.num_bytes[staying], rows.ids[staying])
            order = np.argsort(rank)
            hashes = rows.phash[staying[order]]
            pairs = self_pairs(order[hash_pairs(hashes, hashes, distance=config.dedup.phash_distance)])
            score, accepted = judge_pairs(
                config, rows, decode, staying[pairs], stage, stop, threshold=config.dedup.verify_threshold
            )
            if config.dedup.verify:
                columns = dict(zip(("row_a", "row_b"), staying[pairs].T, strict=True))
                write_table(stage.file("compared.parquet"), pa.table(columns | {"score": score}))
            # Not components: a chain of such pictures may begin and end with different ones.
            of = leaders(rank, pairs[accepted], np.nan_to_num(score[accepted]))
        else:
            column = "item_id" if reason == "same bytes" else "pixel_hash"
            values = np.array(rows.table[column].to_pylist(), dtype=object)[staying].astype(str)
            labels = np.unique(values, return_inverse=True)[1]
            of = representatives(labels, rows.area[staying], rows.num_bytes[staying], rows.ids[staying])
        copies = of != np.arange(len(of))
        removed.append((staying[copies], staying[of[copies]], reason))
        staying = staying[~copies]
    table = pa.concat_tables(
        pa.table({"row": row, "of": of, "reason": [reason] * len(row)}, schema=SCHEMA) for row, of, reason in removed
    )
    write_table(stage.file("duplicates.parquet"), table)
    counts = {reason: len(row) for row, _, reason in removed}
    say(f"exact: {len(pool)} images, {', '.join(f'{count} {reason}' for reason, count in counts.items())}")
    stage.finish(**{"in": len(pool), "out": len(staying), **counts})


def remaining(rows: Rows, exact: Stage) -> np.ndarray:
    """Pool rows left after the exact stage; sorted int64."""
    gone = exact.table("duplicates.parquet")["row"].to_numpy()
    return np.setdiff1d(rows.of("pool"), gone)
