"""One training step, as in the paper: targets, outputs, losses, backward, clip, step, EMA.

A process computes its images in one or several parts (gradient accumulation); Sinkhorn, centres and KoLeo see all.

b images of a part, B images of this process, L local crops of an image, N patches of a global crop, M asked patches of
a part, K prototypes, d bottleneck, D width.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.seeding import key

from .alarm import check_finite
from .build import Learner
from .config import LossConfig
from .data.batch import Batch
from .ema import update_ema
from .health import cls_patch_cosine, ema_distance, rankme, target_health
from .loss.dino import crop_pairs
from .loss.gram import gram_loss, resample_tokens
from .loss.ibot import mask_weights
from .loss.koleo import koleo_loss
from .loss.prototypes import PrototypeLoss, prototype_loss
from .loss.targets import Targets, center_shift, sinkhorn_shift, update_center
from .model.noise import Noise
from .model.vit import Features, VisionTransformer
from .optim import clip_gradients, set_schedule
from .parallel.shard import sync_gradients
from .schedules import StepValues
from .state import TrainState


@dataclass(frozen=True)
class Recipe:
    """What stays the same over the steps of a stage."""

    loss: LossConfig
    clip: float
    precision: torch.dtype = torch.float32
    accumulate: int = 1  # parts
    all_patches: bool = False  # distillation: ask for every patch of the global crops, hide none
    seed: int = 0
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Teachers:
    """Who is followed: the EMA of the student in pretraining, a frozen model in distillation; and the Gram teacher."""

    learner: Learner
    gram: VisionTransformer | None = None
    gram_weight: float = 0.0


@dataclass(frozen=True)
class Part:
    """Some of a process's images, and what the teachers say of them."""

    batch: Batch
    asked: Tensor  # bool [2 b, N], the patches that the student is asked for
    noise: Noise
    cls: Targets  # [2, b, d]
    patches: Targets  # [1, M, d]
    gram: Tensor | None  # [2 b, N, D], patches of the Gram teacher
    spread: Tensor | None  # [2, b, D], gradient of KoLeo over all parts at the class tokens


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, unweighted, and their weighted sum; sums over the parts of a batch."""

    loss: Tensor
    dino: Tensor
    ibot: Tensor
    koleo: Tensor
    gram: Tensor

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def detach(self) -> "Losses":
        return Losses(*(getattr(self, each.name).detach().float() for each in fields(self)))


def train_step(
    state: TrainState, teachers: Teachers, batch: Batch, values: StepValues, recipe: Recipe, *, measure: bool = True
) -> dict[str, Tensor]:
    """Move student and EMA by one step; returns what was measured on the way.

    `measure` adds the signs of `health`. Raises NonFiniteLoss, on every process, before the optimizer moves.
    """
    with torch.autocast(batch.global_crops.device.type, recipe.precision, enabled=recipe.precision != torch.float32):
        parts, seen, koleo = look(state, teachers, batch, values, recipe)
        made, stats = [], []
        for i, part in enumerate(parts):
            sync_gradients(state.student, i == len(parts) - 1)
            terms, stat = student_losses(
                state.student, part, recipe, batch=batch, gram_weight=teachers.gram_weight, measure=measure
            )
            made.append(terms.detach())
            stats.append(stat)
            with torch.autocast(batch.global_crops.device.type, enabled=False):
                state.scaler.scale(terms.loss).backward()
    losses = functools.reduce(Losses.__add__, made)
    if koleo is not None:
        losses = replace(losses, koleo=koleo, loss=losses.loss + recipe.loss.koleo * koleo)
    measured = {each.name: getattr(losses, each.name) for each in fields(Losses)}
    state.scaler.unscale_(state.optimizer)
    norms = clip_gradients(state.student, recipe.clip)
    # A finite loss can have gradients that are not; with float16 the scaler expects that and leaves the step out.
    check_finite(measured if state.scaler.is_enabled() else measured | norms, group=recipe.group)
    set_schedule(state.optimizer, values)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state.ema, state.student, values.momentum)
    state.step += 1
    return {**measured, **norms, **health(state, losses, stats, parts, seen, recipe)} if measure else measured


def look(
    state: TrainState, teachers: Teachers, batch: Batch, values: StepValues, recipe: Recipe
) -> tuple[list[Part], list[Features], Tensor | None]:
    """What has to be known of the whole batch before the student learns from a part of it.

    The parts with their targets, the teacher's features of each, and KoLeo over all of them where there are several.
    """
    batches = batch.split(recipe.accumulate)
    asked = [torch.ones_like(each.masks) if recipe.all_patches else each.masks for each in batches]
    noises = [
        Noise(
            rope=key(recipe.seed, "rope", state.step) % 2**63,
            drop=key(recipe.seed, "drop path", state.step, recipe.rank, i) % 2**63,
        )
        for i in range(len(batches))
    ]
    cls, patches, seen = teacher_targets(state, teachers.learner, batches, asked, values, recipe)
    patch_size = state.student.backbone.shape.patch_size
    parts = [
        Part(*each, gram=gram_tokens(teachers, each[0], patch_size=patch_size), spread=None)
        for each in zip(batches, asked, noises, cls, patches, strict=True)
    ]
    if len(parts) == 1 or not recipe.loss.koleo:
        return parts, seen, None
    koleo, spreads = whole_batch_koleo(state.student, parts, recipe)
    return [replace(part, spread=spread) for part, spread in zip(parts, spreads, strict=True)], seen, koleo


@torch.no_grad()
def teacher_targets(
    state: TrainState,
    teacher: Learner,
    batches: Sequence[Batch],
    asked: Sequence[Tensor],
    values: StepValues,
    recipe: Recipe,
) -> tuple[list[Targets], list[Targets], list[Features]]:
    """Targets of the class tokens and of the asked patches for each part, balanced over the whole batch.

    The teacher sees the whole global crops (DINOv2 sec. 4); of its answers only the bottleneck features are kept.
    """
    seen, rows = [], {"cls": [], "patches": []}
    prototypes: dict[str, Tensor] = {}
    for batch, wanted in zip(batches, asked, strict=True):
        (features,) = teacher.backbone([batch.global_crops], wanted=[wanted])
        for name, head, tokens in (
            ("cls", teacher.dino_head, features.cls),
            ("patches", teacher.patch_head, features.patches),
        ):
            z, prototypes[name] = head(tokens, read=lambda z, w: (z, w))
            rows[name].append(z.unflatten(0, (2, -1)) if name == "cls" else z[None])
        seen.append(features)
    targets = []
    for name, parts in rows.items():
        every = torch.cat([z.flatten(0, 1) for z in parts])
        shift = column_shift(state, name, every, prototypes[name], values.temperature, recipe)
        targets.append([Targets(z, prototypes[name], shift, values.temperature) for z in parts])
    return targets[0], targets[1], seen


def column_shift(
    state: TrainState, name: str, z: Tensor, prototypes: Tensor, temperature: float, recipe: Recipe
) -> Tensor:
    """Shift [K] by Sinkhorn-Knopp over all rows, or by the moving centre, which then moves (DINO sec. 3.1)."""
    if recipe.loss.targets == "sinkhorn":
        return sinkhorn_shift(z, prototypes, temperature=temperature, group=recipe.group)
    center = state.centers[name]
    state.centers[name] = update_center(center, z, prototypes, group=recipe.group)
    return center_shift(center, temperature=temperature)


@torch.no_grad()
def gram_tokens(teachers: Teachers, batch: Batch, *, patch_size: int) -> Tensor | None:
    """Patches [2 b, N, D] of the Gram teacher on the student's grid, from larger crops where the batch has them."""
    if teachers.gram is None or not teachers.gram_weight:
        return None
    crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
    tokens = teachers.gram.forward_features(crops).patches
    grid, to = (
        (images.shape[-2] // size, images.shape[-1] // size)
        for images, size in ((crops, teachers.gram.shape.patch_size), (batch.global_crops, patch_size))
    )
    return tokens if grid == to else resample_tokens(tokens, grid=grid, to=to)


def whole_batch_koleo(student: Learner, parts: Sequence[Part], recipe: Recipe) -> tuple[Tensor, list[Tensor]]:
    """KoLeo over all parts, and its gradient [2, b, D] at each part's class tokens.

    One more pass over the global crops, without a graph (Gao et al. 2021, "Scaling deep contrastive learning batch
    size", sec. 3.2): the nearest row of an image may lie in another part.
    """
    cls = []
    for part in parts:
        with torch.no_grad():
            crops, masks = [part.batch.global_crops], [hidden(part, recipe)]
            (features,) = student.backbone(crops, masks, wanted=[None], noise=part.noise)
        cls.append(features.cls.unflatten(0, (2, -1)))
    rows = torch.cat(cls, dim=1).float().requires_grad_()
    value = koleo(rows[0], recipe) + koleo(rows[1], recipe)
    (gradient,) = torch.autograd.grad(value, rows)
    return value.detach(), list(gradient.split([each.shape[1] for each in cls], dim=1))


def koleo(rows: Tensor, recipe: Recipe) -> Tensor:
    over = recipe.group if recipe.loss.koleo_over == "all" else None
    return koleo_loss(rows, group=over, rows=recipe.loss.koleo_group)


def hidden(part: Part, recipe: Recipe) -> Tensor | None:
    return None if recipe.all_patches else part.asked


def student_losses(
    student: Learner, part: Part, recipe: Recipe, *, batch: Batch, gram_weight: float, measure: bool
) -> tuple[Losses, tuple[PrototypeLoss, PrototypeLoss]]:
    """DINO + iBOT + KoLeo (+ Gram) of the student on the crops of a part in one packed pass, weighted for the sum.

    `batch` is the whole that the part belongs to: every mean is over its images.
    """
    crops, masks = [part.batch.global_crops], [hidden(part, recipe)]
    wanted: list[Tensor | None] = [part.asked if part.gram is None else torch.ones_like(part.asked)]
    if num_local := len(part.batch.local_crops) // len(part.batch.samples):
        crops.append(part.batch.local_crops)
        masks.append(None)
        wanted.append(None)
    features = student.backbone(crops, masks, wanted=wanted, noise=part.noise)
    num_images, patches = len(batch.samples), features[0].patches
    weights = recipe.loss

    def image_level(z: Tensor, prototypes: Tensor) -> PrototypeLoss:
        each = torch.full(part.cls.features.shape[1:2], 1 / num_images, device=z.device)
        pairs = crop_pairs(num_local, local_weight=weights.dino_local).to(z.device)
        rows = z.unflatten(0, (2 + num_local, -1))
        return prototype_loss(rows, prototypes, part.cls, pairs=pairs, weights=each, measure=measure)

    def patch_level(z: Tensor, prototypes: Tensor) -> PrototypeLoss:
        each = mask_weights(part.asked) / (2 * num_images)
        pairs = z.new_ones(1, 1)
        return prototype_loss(z[None], prototypes, part.patches, pairs=pairs, weights=each, measure=measure)

    dino = student.dino_head(torch.cat([each.cls for each in features]), read=image_level)
    ibot = student.patch_head(patches if part.gram is None else patches[part.asked.flatten()], read=patch_level)
    cls = features[0].cls.unflatten(0, (2, -1))
    if part.spread is None:
        spread = koleo(cls[0], recipe) + koleo(cls[1], recipe) if weights.koleo else dino.loss.new_zeros(())
    else:  # a stand-in with KoLeo's gradient; its value is added once, for all parts
        spread = (part.spread * cls).sum()
        spread = spread - spread.detach()
    gram = dino.loss.new_zeros(())
    if part.gram is not None:
        share = len(part.batch.samples) / num_images
        gram = share * gram_loss(patches.unflatten(0, (len(part.asked), -1)), part.gram)
    total = weights.dino * dino.loss + weights.ibot * ibot.loss + weights.koleo * spread + gram_weight * gram
    return Losses(total, dino.loss, ibot.loss, spread, gram), (dino, ibot)


def health(
    state: TrainState,
    losses: Losses,
    stats: Sequence[tuple[PrototypeLoss, PrototypeLoss]],
    parts: Sequence[Part],
    seen: Sequence[Features],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Signs of how the run fares, from what the step computed anyway (health.py)."""
    images, batch = sum(len(part.batch.samples) for part in parts), parts[0].batch
    pairs = crop_pairs(len(batch.local_crops) // len(batch.samples), local_weight=recipe.loss.dino_local)
    shares = {  # sum of the weights of each part in a loss
        "cls": torch.tensor([len(p.batch.samples) / images for p in parts], device=losses.loss.device) * pairs.sum(),
        "patches": torch.stack([part.asked.any(-1).sum() / (2 * images) for part in parts]),
    }
    signs = {}
    for place, (name, loss) in enumerate((("cls", losses.dino), ("patches", losses.ibot))):
        share = shares[name].sum()
        each = shares[name] / share.clamp_min(1e-12)
        entropy = torch.stack([stat[place].entropy for stat in stats]) @ each
        mass = each @ torch.stack([stat[place].mass for stat in stats])
        signs |= target_health(name, loss=loss, entropy=entropy, mass=mass, share=share, group=recipe.group)
    cls = torch.cat([features.cls for features in seen])
    cosines = [
        cls_patch_cosine(features.cls, features.patches, part.asked.nonzero()[:, 0])
        for features, part in zip(seen, parts, strict=True)
    ]
    return signs | {
        "rank": rankme(cls, group=recipe.group),
        "cls_patch_cosine": torch.stack(cosines).mean(),
        "ema_distance": ema_distance(state.ema, state.student, group=recipe.group),
    }
