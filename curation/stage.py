"""A stage of curation is a folder: parts that appear whole, and `done.json` when all are there.

A stage is known by the hash of everything it reads (its settings and the stage before it). Parts of another hash are
stale and removed; parts of this hash are finished work that a later run skips.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import UserError
from runtime.files import read_json, write_json

FORMAT = 2  # of the stage folders; a change makes every finished stage stale
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Share:
    """The part of a stage's units that one process does; by default all of them."""

    index: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        """Whether this process also concludes the stage."""
        return self.count == 1

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        """This process's units: every count-th."""
        return list(units[self.index :: self.count])


WHOLE = Share()


def parse_share(text: str) -> Share:
    """Share "3/16" is the fourth of sixteen. Raises UserError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--share: found {text!r}; expected I/N with 0 <= I < N, for example 0/4 and 3/4")
    return Share(int(index), int(count))


class Stage:
    """`<out>/stages/<name>/` with `stage.json` (its inputs), parts, and `done.json` (its counts)."""

    def __init__(self, out: Path, name: str, inputs: dict[str, Any]):
        self.name, self.inputs = name, inputs
        self.folder = out / "stages" / name
        text = json.dumps([FORMAT, name, inputs], sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.started = time.monotonic()

    @property
    def done(self) -> bool:
        marker = self.folder / "done.json"
        return marker.is_file() and read_json(marker)["key"] == self.key

    @property
    def opened(self) -> bool:
        """Whether the folder is claimed for these inputs."""
        claim = self.folder / "stage.json"
        return claim.is_file() and read_json(claim)["key"] == self.key

    def open(self, share: Share = WHOLE) -> None:
        """Make the folder ours: empty unless it holds parts of the same inputs.

        A share joins a folder that the job before it has opened: it removes nothing, for others are at work there.
        Raises UserError when there is no such folder.
        """
        self.started = time.monotonic()
        if not share.whole:
            if not self.opened:
                raise UserError(
                    f"--share: stage {self.name} is not open in {self.folder.parent.parent} for this config\n"
                    f"  first finish the stage before it without --share"
                )
            return
        claim = self.folder / "stage.json"
        if not self.opened:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(claim, {"key": self.key, "inputs": self.inputs})
        for leftover in self.folder.glob(".*.tmp"):  # of a killed run
            leftover.unlink()

    def finish(self, **counts: Any) -> None:
        seconds = round(time.monotonic() - self.started, 3)  # of the run that finished it
        write_json(self.folder / "done.json", {"key": self.key, "seconds": seconds, "counts": counts})

    def report(self) -> dict[str, Any]:
        """`done.json`: key, seconds, counts."""
        return read_json(self.folder / "done.json")

    def part(self, index: int, suffix: str = "parquet") -> Path:
        return self.folder / f"part-{index:05d}.{suffix}"

    def file(self, name: str) -> Path:
        return self.folder / name

    def table(self, name: str | None = None) -> pa.Table:
        """One file of the stage, or all its parquet parts in order."""
        if name is not None:
            return pq.read_table(self.folder / name)
        parts = sorted(self.folder.glob("part-*.parquet"))
        return pa.concat_tables([pq.read_table(part) for part in parts])
