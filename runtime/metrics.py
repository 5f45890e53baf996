"""Metrics of a run: one JSON object per line, `step` in every row, mirrored to TensorBoard and, where asked, W&B."""

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json, write_json, write_text

# Columns that tell the time and the machine. Everything else in a row is the same bit for bit in every run of the same
# config and data on one kind of CPU, also in one that was killed on the way.
CLOCK = frozenset({"images_per_second", "tokens_per_second", "mfu", "wait", "memory_gb"})


class MetricsWriter:
    """Appends to `metrics.jsonl`. A run that goes on after `start_step` first drops the rows of later steps.

    The same numbers go to TensorBoard and, with a project's name in `wandb`, to Weights & Biases. Raises UserError
    when that is asked for and not installed.
    """

    def __init__(
        self,
        out: Path,
        *,
        start_step: int,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """`config` is shown by Weights & Biases beside the curves."""
        require_wandb(wandb)
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(out) if row["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a")
        self.board: Any = None
        self.wandb_run = open_wandb(out, wandb, config) if wandb else None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log({"train_step": step, **row})

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def require_wandb(project: str) -> None:
    """Raise UserError when a project is named and Weights & Biases is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"monitor.wandb: found {project!r}, but the package wandb is not installed\n"
            f"  pip install wandb, or leave monitor.wandb out"
        )


def open_wandb(out: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    """A run of Weights & Biases that a restart goes on with; WANDB_MODE=offline keeps it on this disk."""
    import wandb  # pyright: ignore[reportMissingImports]

    name = out / "wandb.json"
    if not name.is_file():
        write_json(name, {"id": uuid.uuid4().hex})
    run = wandb.init(
        project=project,
        name=out.name,
        id=read_json(name)["id"],
        resume="allow",
        dir=str(out),
        config=dict(config or {}),
    )
    # Not W&B's own step, which refuses to go back: after a kill the steps since the last checkpoint are made again.
    run.define_metric("*", step_metric="train_step")
    return run


def read_metrics(out: Path, *, clock: bool = True) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`; a line cut off by a kill is left out, and without `clock` the columns of `CLOCK`."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line can be cut: the writer flushes row by row
    return rows if clock else [{name: x for name, x in row.items() if name not in CLOCK} for row in rows]


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a log file."""
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
