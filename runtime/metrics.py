"""Metrics of a run: one JSON object per line, `step` in every row, mirrored to TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_text


class MetricsWriter:
    """Appends to `metrics.jsonl`. A run that goes on after `start_step` first drops the rows of later steps."""

    def __init__(self, out: Path, *, start_step: int, tensorboard: bool = True):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(out) if row["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a")
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`; a line cut off by a kill is left out."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line can be cut: the writer flushes row by row
    return rows


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a log file."""
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
