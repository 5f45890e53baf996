"""The state of a training run, as one value.

K prototypes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from .build import Learner


@dataclass
class TrainState:
    """What a run carries from step to step; order of data, crops and masks follow from `step` and the seed."""

    step: int  # optimizer steps done
    student: Learner
    ema: Learner
    optimizer: torch.optim.Optimizer
    centers: dict[str, Tensor] = field(default_factory=dict)  # float32 [K] of `cls` and `patches`; for centred targets
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))  # for float16

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer by parameter name, sharded where the modules are; any number of processes loads it."""
        student, optimizer = get_state_dict(self.student, self.optimizer)
        state = {"student": student, "optimizer": optimizer, "ema": get_model_state_dict(self.ema)}
        if self.centers:
            state["centers"] = self.centers
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.student, self.optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"]
        )
        set_model_state_dict(self.ema, state["ema"], options=StateDictOptions(strict=True))
        self.centers = state.get("centers", {})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
