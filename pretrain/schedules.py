"""Schedules as pure functions of the step: nothing to save, nothing to resume (DINOv2 app. B; DINOv3 app. C).

`step` counts from 0; `steps` is the length of the run, or of its stage. The config's defaults are DINOv2's (cosine).
DINOv3's are constant after their warm-up: `optim.schedule=constant`, and ends equal to starts.
"""

import math
from dataclasses import dataclass

from runtime.errors import UserError

from .config import OptimConfig, TeacherConfig, TrainConfig


def cosine(start: float, end: float, *, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at the last step along half a cosine."""
    progress = min(step / max(steps - 1, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(start: float, end: float, *, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps`, then constant."""
    return start + (end - start) * min(step / steps, 1.0) if steps > 0 else end


def scaled_lr(optim: OptimConfig, batch_size: int) -> float:
    """Peak rate for a global batch of `batch_size`, from the rate stated for a global batch of `reference_batch`.

    DINOv2's `sqrt_wrt_1024` is sqrt with 1024; DINOv3's factor 4 sqrt(batch / 1024) is sqrt with 64.
    """
    ratio = batch_size / optim.reference_batch
    return optim.lr * {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[optim.lr_rule]


@dataclass(frozen=True)
class StepValues:
    """Everything that is scheduled, at one step."""

    lr: float  # of the heads, and of the backbone and prototypes while they are not frozen
    weight_decay: float
    momentum: float  # of the EMA
    temperature: float  # of the teacher
    last_layer_lr: float  # of the prototypes; 0 while they are frozen
    backbone_lr: float  # 0 while the backbone is frozen


def at_step(step: int, optim: OptimConfig, teacher: TeacherConfig, train: TrainConfig) -> StepValues:
    """The values of all schedules at `step`. The rate is not 0 at step 0 and reaches its peak at the warm-up's last."""
    steps, peak = train.steps, scaled_lr(optim, train.batch_size)
    warmup = int(optim.warmup * steps)
    if step < warmup:
        lr = linear(0.0, peak, step=step + 1, steps=warmup)
    elif optim.schedule == "constant":
        lr = peak
    else:
        lr = cosine(peak, optim.min_lr, step=step - warmup, steps=steps - warmup)
    return StepValues(
        lr=lr,
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, step=step, steps=steps),
        momentum=cosine(teacher.momentum, teacher.momentum_end, step=step, steps=steps),
        temperature=linear(
            teacher.warmup_temperature, teacher.temperature, step=step, steps=int(teacher.warmup * steps)
        ),
        last_layer_lr=0.0 if step < optim.freeze_last_layer * steps else lr,
        backbone_lr=0.0 if step < optim.freeze_backbone * steps else lr,
    )


def check(optim: OptimConfig, teacher: TeacherConfig) -> None:
    """Raise UserError for values outside their range."""
    for group, config, names in (
        ("optim", optim, ("warmup", "freeze_last_layer", "freeze_backbone")),
        ("teacher", teacher, ("momentum", "momentum_end", "warmup")),
    ):
        for name in names:
            value = getattr(config, name)
            if not 0 <= value <= 1:
                raise UserError(f"{group}.{name}: found {value}; expected 0 to 1")
    for name, value in (("temperature", teacher.temperature), ("warmup_temperature", teacher.warmup_temperature)):
        if value <= 0:
            raise UserError(f"teacher.{name}: found {value}; expected more than 0")
    if optim.reference_batch < 1:
        raise UserError(f"optim.reference_batch: found {optim.reference_batch}; expected at least 1 (images)")
