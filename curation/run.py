"""Curation from top to bottom: raw images in, shards and the story of every image out.

    items -> decode -> exact -> embed -> index -> join -> verify -> dedup -> guard -> retrieve -> shards

Every stage reads the folders of stages before it and writes its own; finished stages and finished parts of a stage are
not done again. The stages in PARALLEL consist of units that processes can share out between them. DINOv2 sec. 3 and
appendix A, with the choices of `CurateConfig`.
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

from .config import CurateConfig, in_order
from .decoding import decode_stage
from .dedup import dedup_stage, surviving
from .embed import Embedded, embed_stage, identities
from .exact import exact_stage, remaining
from .guard import guard_stage
from .inputs import checked_items
from .items import items_stage
from .manifest import FATES, write_manifest, write_summary
from .propose import index_stage, join_stage
from .retrieve import retrieve_stage, selects
from .rows import Rows, read_rows
from .scoring import verify_stage
from .shards import claim_shards, write_shards
from .stage import WHOLE, Share, Stage

STAGES = ("items", "decode", "exact", "embed", "index", "join", "verify", "dedup", "guard", "retrieve", "shards")
PARALLEL = ("decode", "embed", "join", "verify", "shards")  # their units can be shared out


def curate(
    config: CurateConfig,
    *,
    stages: Sequence[str] | None = None,
    share: Share = WHOLE,
    stop: StopRequest | None = None,
) -> Path:
    """Run the stages that are not finished, or of those only `stages`; returns the output folder.

    With a share of one of the PARALLEL stages, only its units are done and the stage is left unfinished: a run without
    share does what is missing and concludes it. When all stages are finished, `manifest.parquet` and `summary.json`
    are written. Raises UserError (input, sources that changed, disk space) and Stopped.
    """
    wanted = STAGES if stages is None else tuple(stages)
    for name in wanted:
        if name not in STAGES:
            raise UserError(f"--stages: no stage {name!r}; the stages are {', '.join(STAGES)}")
    if not share.whole and (len(wanted) != 1 or wanted[0] not in PARALLEL):
        raise UserError(
            f"--share: goes with one stage of --stages {', '.join(PARALLEL)}; found --stages {','.join(wanted)}"
        )
    run = _Run(config, share, stop)
    if (run.out / "config.yaml").is_file():
        claim_output(run.out, run.config)
    for name in STAGES:
        if name in wanted:
            run.do(name)
    if share.whole:
        run.open_next(wanted)
        if STAGES[-1] in wanted:
            run.conclude()
    return Path(config.out)


def unfinished(config: CurateConfig) -> tuple[str, ...]:
    """The stages that `curate` would still do, in their order; the last one where only the manifest is missing.

    Raises UserError when the output folder belongs to another config.
    """
    run = _Run(config, WHOLE, None)
    if (run.out / "config.yaml").is_file():
        claim_output(run.out, run.config)
    needed = [name for name in STAGES if name not in run.skipped()]
    for position, name in enumerate(needed):
        if (name == "embed" and not run.embedders_exist()) or not run.stage(name).done:
            return tuple(needed[position:])
    return () if (run.out / "summary.json").is_file() else (STAGES[-1],)


def write_raw_shards(config: CurateConfig, folder: Path) -> Path:
    """The decodable pool without exact duplicates as shards in `folder`: what a bootstrap embedder is trained on.

    Needs stage `exact`. Does nothing when they are there already.
    """
    run = _Run(config, WHOLE, None)
    run.require("exact")
    rows = run.rows()
    write_shards(config, rows, remaining(rows, run.stage("exact")), folder, share=WHOLE, stop=None)
    return folder


class _Run:
    """One run's folder: which stages are finished, and how each is done."""

    def __init__(self, config: CurateConfig, share: Share, stop: StopRequest | None):
        self.config, self.share, self.stop = in_order(config), share, stop
        self.out = Path(config.out)
        self.worked = False  # whether this process finished a stage
        self._rows: Rows | None = None

    def skipped(self) -> dict[str, str]:
        """Stages that this config has no work for, and why."""
        found = {}
        if not self.config.dedup.verify:
            found["verify"] = "dedup.verify is off: the cosine decides"
        if not self.config.guard.paths:
            found["guard"] = "guard.paths is empty: nothing is held against evaluation sets"
        if not selects(self.config):
            found["retrieve"] = "seeds.paths is empty: every image that is left is kept"
        return found

    def stage(self, name: str) -> Stage:
        """A stage by name; its key covers all settings and stages that decide its content."""
        settings = to_dict(self.config)
        dedup, guard = settings["dedup"], settings["guard"]
        searching = {key: dedup[key] for key in dedup if key not in ("groups", "verify_threshold", "sure_cosine")}
        passing = {"seeds": settings["retrieval"]["keep_seeds"]}
        own: dict[str, Any] = {
            "items": {key: settings[key] for key in ("source", "seeds")} | {"guard": guard["paths"]},
            "decode": settings["decode"],
            "exact": {key: dedup[key] for key in ("phash_distance", "verify", "verify_threshold")},
            "embed": settings["embed"],
            "index": searching | {"seed": settings["seed"], "guard": [guard["threshold"], guard["k"]]} | passing,
            "join": {},
            "verify": {},
            "dedup": {key: dedup[key] for key in ("groups", "verify_threshold", "sure_cosine")},
            "guard": guard,
            "retrieve": settings["retrieval"] | {"seed": settings["seed"]},
            "shards": settings["shards"] | {"seed": settings["seed"]},
        }[name]
        if name == "embed":
            own = own | {"weights": identities(self.config)}
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

    def open_next(self, wanted: Sequence[str]) -> None:
        """Open the parallel stage that follows, so that shares of it can start side by side."""
        left = [name for name in STAGES if name not in wanted and name not in self.skipped()]
        following = [name for name in left if STAGES.index(name) > STAGES.index(wanted[-1])]
        if not following or following[0] not in PARALLEL:
            return
        if following[0] == "embed" and not self.embedders_exist():
            return  # a bootstrap embedder is trained first
        stage = self.stage(following[0])
        if not stage.done:
            stage.open()
            if following[0] == "shards":
                claim_shards(self.config, self.rows(), self._selected(), self.out / "shards")

    def embedders_exist(self) -> bool:
        try:
            identities(self.config)
        except UserError:
            return False
        return True

    def rows(self) -> Rows:
        if self._rows is None:
            self._rows = read_rows(self.stage("items"), self.stage("decode"))
        return self._rows

    def _work(self) -> dict[str, Callable[[Stage], None]]:
        config, share, stop, stage = self.config, self.share, self.stop, self.stage
        return {
            "items": self._items,
            "decode": lambda own: decode_stage(config, stage("items"), own, stop, share),
            "exact": lambda own: exact_stage(config, self.rows(), stage("decode"), own, stop),
            "embed": lambda own: embed_stage(config, self.rows(), self._to_embed(), own, stop, share),
            "index": lambda own: index_stage(config, self.rows(), stage("embed"), self._without_copies(), own),
            "join": lambda own: join_stage(
                config,
                self.rows(),
                stage("embed"),
                stage("index"),
                self._without_copies(),
                own,
                stop,
                share,
            ),
            "verify": lambda own: verify_stage(config, self.rows(), stage("decode"), stage("join"), own, stop, share),
            "dedup": lambda own: dedup_stage(config, self.rows(), stage("exact"), self._proposed(), own),
            "guard": lambda own: guard_stage(
                config, self.rows(), stage("exact"), stage("dedup"), self._proposed(), own
            ),
            "retrieve": lambda own: retrieve_stage(
                config, self.rows(), Embedded.open(stage("embed"), "retrieval"), self._survivors(), self._leaks(), own
            ),
            "shards": self._shards,
        }

    def _items(self, own: Stage) -> None:
        table, problems = checked_items(self.config)  # first: what is wrong leaves no folder behind
        claim_output(self.out, self.config)
        own.open()
        items_stage(self.config, own, table, problems)

    def _shards(self, own: Stage) -> None:
        own.open(self.share)
        chosen, folder = self._selected(), self.out / "shards"
        names = write_shards(self.config, self.rows(), chosen, folder, share=self.share, stop=self.stop)
        if not self.share.whole:
            return
        write_table(own.file("assignment.parquet"), pa.table({"row": chosen, "shard": [names[int(r)] for r in chosen]}))
        own.finish(images=len(chosen), shards=len(set(names.values())))

    def _without_copies(self) -> np.ndarray:
        """Pool rows left after the exact stage; sorted int64."""
        return remaining(self.rows(), self.stage("exact"))

    def _to_embed(self) -> np.ndarray:
        rows = self.rows()
        return np.sort(np.concatenate([self._without_copies(), rows.of("seed"), rows.of("guard")]))

    def _proposed(self) -> Stage:
        """The stage with the candidate pairs, compared by pixels or not."""
        return self.stage("join" if "verify" in self.skipped() else "verify")

    def _survivors(self) -> np.ndarray:
        """Pool rows that are neither duplicates nor leaks; sorted int64."""
        return np.setdiff1d(surviving(self._without_copies(), self.stage("dedup")), self._leaks())

    def _leaks(self) -> np.ndarray:
        """Rows of any role that an evaluation set forbids; int64."""
        if "guard" in self.skipped():
            return np.empty(0, dtype=np.int64)
        return self.stage("guard").table("leaks.parquet")["row"].to_numpy()

    def _selected(self) -> np.ndarray:
        """Rows that go into the shards; int64."""
        if "retrieve" in self.skipped():
            return self._survivors()
        return self.stage("retrieve").table("selection.parquet")["row"].to_numpy()

    def conclude(self) -> None:
        """Write the manifest and the summary, unless they are of these very stages."""
        if not self.worked and (self.out / "summary.json").is_file():
            say(f"curate: finished already, see {self.out / 'summary.json'}")
            return
        for leftover in [*self.out.glob(".*.tmp"), *(self.out / "shards").glob(".*.tmp")]:  # of a killed run
            leftover.unlink()
        stages = {name: self.stage(name) for name in STAGES if name not in self.skipped()}
        assignment = stages["shards"].table("assignment.parquet").to_pydict()
        shard_of = dict(zip(assignment["row"], assignment["shard"], strict=True))
        manifest = write_manifest(self.config, self.rows(), stages, Embedded.open(stages["embed"], "copy"), shard_of)
        write_summary(self.config, stages, self.skipped(), manifest)
        fates = manifest["fate"].to_pylist()
        counts = ", ".join(f"{fates.count(fate)} {fate.replace('_', ' ')}" for fate in FATES if fate in fates)
        say(f"curate: {len(fates)} images: {counts}")
