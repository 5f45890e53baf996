"""Configuration of a distillation run: one frozen teacher, one or several students.

Defaults follow DINOv2 table 16/17 for distilled models (app. B): rate 1e-3, batch 2048, no drop path.
"""

from dataclasses import dataclass, field
from typing import Literal

from pretrain.config import (
    Arch,
    CheckpointConfig,
    DataConfig,
    Device,
    LossConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
)
from pretrain.data.config import CropsConfig
from pretrain.model.init import Init


@dataclass(frozen=True)
class StudentConfig:
    name: str  # folder of this student below `out`
    arch: Arch  # as `model.arch` in pretraining; patch size and registers are the teacher's
    position: Literal["learned", "rope"] = "learned"  # as `model.position` in pretraining
    init: Init = "reference"  # start values of linear layers
    layerscale: float = 1e-5  # start value of LayerScale


@dataclass(frozen=True)
class DistillConfig:
    out: str = "runs/distill"  # folder of the run
    seed: int = 0  # of weights, order and crops
    device: Device = "auto"
    workers: int = 4  # loader processes of each training process
    teacher: str = ""  # export folder of kind teacher (with heads)
    students: tuple[StudentConfig, ...] = ()  # trained one after the other
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sharpening: TeacherConfig = field(default_factory=TeacherConfig)  # temperatures of the targets, EMA of the student
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
