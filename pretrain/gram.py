"""Gram teachers: which one a step anchors to, and the snapshots that a run keeps for it (DINOv3 sec. 4.2).

A pure function of the step and of files that the run leaves in `<out>/gram/`: there is nothing to save or to resume.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import UserError

from .checkpoint import step_name
from .config import PretrainConfig
from .stages import Stage

PREVIOUS = "previous"  # as `gram.teacher`: the EMA at the end of the stage before


def weight(step: int, config: PretrainConfig) -> float:
    """Weight of the Gram loss at `step` of a stage: from 0 to `loss.gram` along half a cosine, then constant."""
    warmup = round(config.loss.gram_warmup * config.train.steps)
    if step >= warmup:
        return config.loss.gram
    return config.loss.gram * (1 - math.cos(math.pi * step / warmup)) / 2


def teacher_folder(step: int, stage: Stage, first: Stage, out: Path) -> Path | None:
    """The export that anchors `step` (of the whole run); None where the stage has no Gram loss."""
    if not stage.config.loss.gram:
        return None
    gram = stage.config.gram
    updates = min((step - stage.start) // gram.update_every, gram.max_updates) if gram.update_every else 0
    if updates:
        return snapshot_folder(stage.start + updates * gram.update_every, out)
    if gram.teacher == PREVIOUS:
        return out / "exports" / step_name(stage.start)
    return Path(gram.teacher) if gram.teacher else snapshot_folder(_kept_at(first.config), out)


def is_snapshot(step: int, stage: Stage) -> bool:
    """Whether the EMA after `step` (of the whole run) is kept: as the early teacher, or to update a Gram stage's."""
    gram, into = stage.config.gram, step - stage.start
    if stage.index == 0 and gram.keep_at and into == _kept_at(stage.config):
        return True
    every = gram.update_every if stage.config.loss.gram else 0
    return bool(every) and into % every == 0 and 0 < into // every <= gram.max_updates and step < stage.end


def snapshot_folder(step: int, out: Path) -> Path:
    return out / "gram" / step_name(step)


def check(stages: Sequence[Stage]) -> None:
    """Raise UserError for a stage that is to be anchored and has nothing to be anchored to."""
    first = stages[0]
    keep_at = first.config.gram.keep_at
    if not 0 <= keep_at <= 1:
        raise UserError(f"gram.keep_at: found {keep_at}; expected a share of train.steps, 0 to 1")
    for stage in stages:
        config = stage.config
        named = config.gram.teacher not in ("", PREVIOUS)
        earlier = stage.index > 0 and (config.gram.teacher == PREVIOUS or keep_at)
        if config.loss.gram and not (named or earlier):
            raise UserError(
                f"loss.gram: stage {stage.name} has no Gram teacher\n"
                f"  give gram.teacher=EXPORT, or gram.keep_at=0.15 and the Gram loss in a later stage (stages)"
            )


def _kept_at(config: PretrainConfig) -> int:
    return max(1, round(config.gram.keep_at * config.train.steps))
