"""One training step, as in the paper: targets, outputs, losses, backward, clip, step, EMA.

B images, L local crops of an image, N patches of a global crop, M masked patches, K prototypes, D width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .build import Learner
from .config import LossConfig
from .data.batch import Batch
from .ema import update_ema
from .loss.dino import dino_loss
from .loss.ibot import ibot_loss, mask_weights
from .loss.koleo import koleo_loss
from .loss.sinkhorn import sinkhorn_knopp
from .optim import clip_gradients, set_schedule
from .schedules import StepValues
from .state import TrainState


@dataclass(frozen=True)
class Targets:
    """What the teacher says, as probabilities over prototypes."""

    cls: Tensor  # [2, B, K]
    patches: Tensor  # [M, K], of the patches that the student is asked for
    features: Tensor  # [2 * B, D] class tokens, for monitoring


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, unweighted, and their weighted sum."""

    total: Tensor
    dino: Tensor
    ibot: Tensor
    koleo: Tensor

    def terms(self) -> dict[str, Tensor]:
        return {"loss": self.total, "dino": self.dino, "ibot": self.ibot, "koleo": self.koleo}


class NonFiniteLoss(RuntimeError):
    """A loss is inf or NaN; the optimizer has not moved."""


@torch.no_grad()
def teacher_targets(
    teacher: Learner, global_crops: Tensor, asked: Tensor, *, temperature: float, group: dist.ProcessGroup | None
) -> Targets:
    """Sinkhorn-Knopp targets of the teacher on whole global crops [2 B, 3, G, G] (DINOv2 sec. 4).

    `asked` bool [2 B, N] marks the patches whose targets are needed.
    """
    (features,) = teacher.backbone([global_crops])
    cls = sinkhorn_knopp(teacher.dino_head(features.cls), temperature=temperature, group=group)
    patches = sinkhorn_knopp(teacher.ibot_head(features.patches[asked]), temperature=temperature, group=group)
    return Targets(cls.unflatten(0, (2, -1)), patches, features.cls)


def student_losses(
    student: Learner,
    batch: Batch,
    targets: Targets,
    *,
    asked: Tensor,
    mask: bool,
    weights: LossConfig,
    group: dist.ProcessGroup | None,
) -> Losses:
    """DINO + iBOT + KoLeo of the student on all crops in one packed pass.

    With `mask` the asked patches are hidden from the student (pretraining); without it the student sees everything
    (distillation, DINOv2 sec. 5).
    """
    crops, masks = [batch.global_crops], [asked if mask else None]
    if len(batch.local_crops):
        crops.append(batch.local_crops)
        masks.append(None)
    features = student.backbone(crops, masks)
    cls = torch.cat([each.cls for each in features])  # [(2 + L) * B, D]
    logits = student.dino_head(cls).unflatten(0, (-1, targets.cls.shape[1]))  # [2 + L, B, K]
    dino = dino_loss(logits[:2], logits[2:], targets.cls)
    patch_logits = student.ibot_head(features[0].patches[asked])
    ibot = ibot_loss(patch_logits, targets.patches, mask_weights(asked), num_crops=len(asked))
    first, second = features[0].cls.chunk(2)
    koleo = koleo_loss(first, group=group) + koleo_loss(second, group=group)
    return Losses(weights.dino * dino + weights.ibot * ibot + weights.koleo * koleo, dino, ibot, koleo)


def train_step(
    state: TrainState,
    teacher: Learner,
    batch: Batch,
    values: StepValues,
    *,
    weights: LossConfig,
    clip: float,
    precision: torch.dtype,
    group: dist.ProcessGroup | None,
    all_patches: bool = False,
    measure: bool = True,
) -> dict[str, Tensor]:
    """Move student and EMA by one step; returns what was measured on the way.

    `teacher` is `state.ema` in pretraining and a frozen model in distillation, where `all_patches` asks for every
    patch of the global crops and hides none. `measure` adds the signs of `health`. Raises NonFiniteLoss before the
    optimizer moves.
    """
    asked = torch.ones_like(batch.masks) if all_patches else batch.masks
    with torch.autocast(batch.global_crops.device.type, precision, enabled=precision != torch.float32):
        targets = teacher_targets(teacher, batch.global_crops, asked, temperature=values.temperature, group=group)
        losses = student_losses(
            state.student, batch, targets, asked=asked, mask=not all_patches, weights=weights, group=group
        )
    check_finite(losses, group)
    losses.total.backward()
    norms = clip_gradients(state.student, clip)
    set_schedule(state.optimizer, values)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state.ema, state.student, values.momentum)
    state.step += 1
    measured = {name: term.detach() for name, term in losses.terms().items()}
    return {**measured, **norms, **health(targets)} if measure else measured


def check_finite(losses: Losses, group: dist.ProcessGroup | None) -> None:
    """Raise NonFiniteLoss on every process when a term is inf or NaN on any of them."""
    terms = torch.stack([term.detach().float() for term in losses.terms().values()])
    if group is not None:
        dist.all_reduce(terms, group=group)
    if not terms.isfinite().all():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(losses.terms(), terms.tolist(), strict=True))
        raise NonFiniteLoss(shown)


@torch.no_grad()
def health(targets: Targets) -> dict[str, Tensor]:
    """Signs of collapse, from what the step computed anyway.

    `teacher_entropy` of one target (0: one-hot), `mean_entropy` of the mean target (log K: all prototypes used), and
    `rank`, the effective rank of the teacher's class tokens: exp of the entropy of the normalised singular values
    (RankMe, Garrido et al. 2023, eq. 1).
    """
    probabilities = targets.cls.flatten(0, 1)
    singular = torch.linalg.svdvals(targets.features.float())
    return {
        "teacher_entropy": torch.special.entr(probabilities).sum(-1).mean(),
        "mean_entropy": torch.special.entr(probabilities.mean(0)).sum(),
        "rank": torch.special.entr(singular / singular.sum()).sum().exp(),
    }
