"""Curation from top to bottom: raw images in, shards and the story of every image out.

    items -> decode -> exact -> embed -> dedup -> guard -> retrieve -> shards

Every stage reads the folders of stages before it and writes its own; finished stages and finished parts of a stage are
not done again. DINOv2 sec. 3 and appendix A, with the choices of `CurateConfig`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from runtime.config import claim_output, to_dict
from runtime.errors import UserError
from runtime.files import write_table
from runtime.progress import say
from runtime.signals import StopRequest

from .backbone import model_identity
from .config import CurateConfig, in_order
from .decoding import decode_stage
from .dedup import dedup_stage, surviving
from .embed import embed_stage, read_vectors
from .exact import exact_stage, remaining
from .guard import guard_stage
from .items import items_stage, list_items
from .manifest import FATES, write_manifest, write_summary
from .retrieve import retrieve_stage
from .rows import Rows, read_rows
from .shards import write_shards
from .stage import Stage

STAGES = ("items", "decode", "exact", "embed", "dedup", "guard", "retrieve", "shards")


def curate(config: CurateConfig, *, stages: Sequence[str] | None = None, stop: StopRequest | None = None) -> Path:
    """Run the stages that are not finished, or of those only `stages`; returns the output folder.

    When all stages are finished, `manifest.parquet` and `summary.json` are written. Raises UserError (input, sources
    that changed, disk space) and Stopped.
    """
    wanted = STAGES if stages is None else tuple(stages)
    for name in wanted:
        if name not in STAGES:
            raise UserError(f"--stages: no stage {name!r}; the stages are {', '.join(STAGES)}")
    run = _Run(config, stop)
    if (run.out / "config.yaml").is_file():
        claim_output(run.out, run.config)
    for name in STAGES:
        if name in wanted:
            run.do(name)
    if STAGES[-1] in wanted:
        run.conclude()
    return Path(config.out)


def write_raw_shards(config: CurateConfig, folder: Path) -> Path:
    """The decodable pool without exact duplicates as shards in `folder`: what a bootstrap embedder is trained on.

    Needs stage `exact`. Does nothing when they are there already.
    """
    run = _Run(config, None)
    run.require("exact")
    rows = run.rows()
    write_shards(config, rows, remaining(rows, run.stage("exact")), folder, stop=None)
    return folder


class _Run:
    """One run's folder: which stages are finished, and how each is done."""

    def __init__(self, config: CurateConfig, stop: StopRequest | None):
        self.config, self.stop = in_order(config), stop
        self.out = Path(config.out)
        self.worked = False  # whether this process finished a stage
        self._rows: Rows | None = None

    def skipped(self) -> dict[str, str]:
        """Stages that this config has no work for, and why."""
        found = {}
        if not self.config.guard.paths:
            found["guard"] = "guard.paths is empty: nothing is held against evaluation sets"
        if not self.config.seeds.paths:
            found["retrieve"] = "seeds.paths is empty: every image that is left is kept"
        return found

    def stage(self, name: str) -> Stage:
        """A stage by name; its key covers all settings and stages that decide its content."""
        settings = to_dict(self.config)
        dedup = settings["dedup"]
        own: dict[str, Any] = {
            "items": {key: settings[key] for key in ("source", "seeds")} | {"guard": settings["guard"]["paths"]},
            "decode": settings["decode"],
            "exact": {key: dedup[key] for key in ("phash_distance", "verify", "verify_threshold")},
            "embed": settings["embed"],
            "dedup": dedup | {"seed": settings["seed"]},
            "guard": settings["guard"],
            "retrieve": settings["retrieval"],
            "shards": settings["shards"] | {"seed": settings["seed"]},
        }[name]
        if name == "embed":
            own = own | {"weights": model_identity(self.config.embed, self.out)}
        position = STAGES.index(name)
        before = {"before": self.stage(STAGES[position - 1]).key} if position else {}
        if name == "decode":
            before["listing"] = self.stage("items").report()["counts"]
        return Stage(self.out, name, own | before)

    def require(self, name: str) -> Stage:
        """A finished stage. Raises UserError when it is not finished."""
        for earlier in STAGES[: STAGES.index(name) + 1]:
            if earlier not in self.skipped() and not self.stage(earlier).done:
                raise UserError(f"--stages: stage {earlier} is not finished in {self.out}; run it first")
        return self.stage(name)

    def do(self, name: str) -> None:
        """Do a stage unless it is finished or has nothing to do."""
        if name in self.skipped():
            if self.worked:
                say(f"{name}: skipped, {self.skipped()[name]}")
            return
        if name != "items":
            self.require(STAGES[STAGES.index(name) - 1])
        stage = self.stage(name)
        if not stage.done:
            self._work()[name](stage)
            self.worked = True

    def rows(self) -> Rows:
        if self._rows is None:
            self._rows = read_rows(self.stage("items"), self.stage("decode"))
        return self._rows

    def _work(self) -> dict[str, Callable[[Stage], None]]:
        config, stop, stage = self.config, self.stop, self.stage
        return {
            "items": self._items,
            "decode": lambda own: decode_stage(config, stage("items"), own, stop),
            "exact": lambda own: exact_stage(config, self.rows(), stage("decode"), own, stop),
            "embed": lambda own: embed_stage(config, self.rows(), self._to_embed(), own, stop),
            "dedup": lambda own: dedup_stage(
                config, self.rows(), read_vectors(stage("embed")), stage("decode"), stage("exact"), own, stop
            ),
            "guard": lambda own: guard_stage(
                config, self.rows(), read_vectors(stage("embed")), stage("decode"), stage("dedup"), own, stop
            ),
            "retrieve": lambda own: retrieve_stage(
                config, self.rows(), read_vectors(stage("embed")), self._survivors(), own
            ),
            "shards": self._shards,
        }

    def _items(self, own: Stage) -> None:
        table, problems = list_items(self.config)  # first: a path that is wrong leaves no folder behind
        claim_output(self.out, self.config)
        own.open()
        items_stage(self.config, own, table, problems)

    def _shards(self, own: Stage) -> None:
        own.open()
        chosen = self._survivors()
        if "retrieve" not in self.skipped():
            chosen = self.stage("retrieve").table("selection.parquet")["row"].to_numpy()
        names = write_shards(self.config, self.rows(), chosen, self.out / "shards", stop=self.stop)
        write_table(own.file("assignment.parquet"), pa.table({"row": chosen, "shard": [names[int(r)] for r in chosen]}))
        own.finish(images=len(chosen), shards=len(set(names.values())))

    def _to_embed(self) -> np.ndarray:
        rows = self.rows()
        return np.sort(np.concatenate([remaining(rows, self.stage("exact")), rows.of("seed"), rows.of("guard")]))

    def _survivors(self) -> np.ndarray:
        """Pool rows that are neither duplicates nor leaks; sorted int64."""
        left = surviving(remaining(self.rows(), self.stage("exact")), self.stage("dedup"))
        if "guard" in self.skipped():
            return left
        return np.setdiff1d(left, self.stage("guard").table("leaks.parquet")["row"].to_numpy())

    def conclude(self) -> None:
        """Write the manifest and the summary, unless they are of these very stages."""
        if not self.worked and (self.out / "summary.json").is_file():
            say(f"curate: finished already, see {self.out / 'summary.json'}")
            return
        stages = {name: self.stage(name) for name in STAGES if name not in self.skipped()}
        assignment = stages["shards"].table("assignment.parquet").to_pydict()
        shard_of = dict(zip(assignment["row"], assignment["shard"], strict=True))
        manifest = write_manifest(self.config, self.rows(), stages, read_vectors(stages["embed"]), shard_of)
        write_summary(self.config, stages, self.skipped(), manifest)
        fates = manifest["fate"].to_pylist()
        counts = ", ".join(f"{fates.count(fate)} {fate.replace('_', ' ')}" for fate in FATES if fate in fates)
        say(f"curate: {len(fates)} images: {counts}")
