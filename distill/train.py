"""Distillation (DINOv2 sec. 5): the loop of pretraining with a larger frozen teacher.

No masking, no stochastic depth, the patch loss on every patch of the global crops; the student's EMA is what is
exported.
"""

from collections.abc import Sequence
from pathlib import Path

from pretrain.config import HeadsConfig, ModelConfig, PretrainConfig
from pretrain.data.config import MaskConfig
from pretrain.export import load_teacher
from pretrain.train import Hook, train
from runtime.config import build, claim_output
from runtime.errors import UserError
from runtime.progress import say
from runtime.signals import StopRequest

from .config import DistillConfig, StudentConfig


def distill(config: DistillConfig, *, hooks: Sequence[Hook] = (), stop: StopRequest | None = None) -> dict[str, Path]:
    """Train every student, or go on where `config.out` stands; returns the export folder of each by name.

    Raises UserError for a teacher without heads or students without distinct names.
    """
    names = [student.name for student in config.students]
    if not names or len(set(names)) < len(names) or not all(names):
        raise UserError(
            f"students: found {names or 'none'}; expected at least one, each with a name of its own, for example\n"
            f"  students='[{{name: small, arch: vit_tiny}}]'"
        )
    if not config.teacher:
        raise UserError("teacher: missing; give the folder of a teacher export, for example runs/pretrain/exports/...")
    teacher, card = load_teacher(config.teacher)
    claim_output(Path(config.out), config)
    exports = {}
    for student in config.students:
        say(f"student {student.name} ({student.arch}) from {config.teacher}")
        exports[student.name] = train(student_run(config, student, card), teacher=teacher, hooks=hooks, stop=stop)
    return exports


def student_run(config: DistillConfig, student: StudentConfig, card: dict) -> PretrainConfig:
    """The training run of one student. Its architecture is its own; the teacher gives patch size and prototypes."""
    return PretrainConfig(
        out=str(Path(config.out) / student.name),
        seed=config.seed,
        device=config.device,
        workers=config.workers,
        data=config.data,
        model=ModelConfig(
            arch=student.arch,
            patch_size=card["model"]["patch_size"],
            num_registers=card["model"]["num_registers"],
            position=student.position,
            init=student.init,
            layerscale=student.layerscale,
        ),
        crops=config.crops,
        mask=MaskConfig(probability=0.0),
        heads=build(HeadsConfig, card["heads"]),
        loss=config.loss,
        teacher=config.sharpening,
        optim=config.optim,
        train=config.train,
        checkpoint=config.checkpoint,
    )
