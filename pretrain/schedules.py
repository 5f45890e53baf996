"""Schedules as pure functions of the step: nothing to save, nothing to resume (DINOv2 app. B).

`step` counts from 0; `steps` is the length of the run.
"""

import math
from dataclasses import dataclass

from .config import OptimConfig, TeacherConfig, TrainConfig


def cosine(start: float, end: float, *, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at the last step along half a cosine."""
    progress = min(step / max(steps - 1, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(start: float, end: float, *, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps`, then constant."""
    return start + (end - start) * min(step / steps, 1.0) if steps > 0 else end


def scaled_lr(optim: OptimConfig, batch_size: int) -> float:
    """Peak rate for a global batch: lr * sqrt(batch_size / reference_batch)."""
    return optim.lr * math.sqrt(batch_size / optim.reference_batch)


@dataclass(frozen=True)
class StepValues:
    """Everything that is scheduled, at one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the EMA
    temperature: float  # of the teacher
    last_layer_lr: float


def at_step(step: int, optim: OptimConfig, teacher: TeacherConfig, train: TrainConfig) -> StepValues:
    """The values of all schedules at `step`."""
    steps, peak = train.steps, scaled_lr(optim, train.batch_size)
    warmup = int(optim.warmup * steps)
    if step < warmup:
        lr = linear(0.0, peak, step=step + 1, steps=warmup)
    else:
        lr = cosine(peak, optim.min_lr, step=step - warmup, steps=steps - warmup)
    return StepValues(
        lr=lr,
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, step=step, steps=steps),
        momentum=cosine(teacher.momentum, 1.0, step=step, steps=steps),
        temperature=linear(
            teacher.warmup_temperature, teacher.temperature, step=step, steps=int(teacher.warmup * steps)
        ),
        last_layer_lr=0.0 if step < optim.freeze_last_layer * steps else lr,
    )
