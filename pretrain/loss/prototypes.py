"""Cross-entropy over prototypes that never holds the logits, for the image-level and the patch-level loss.

Linear layer, softmax and cross-entropy in chunks of rows. The gradients are made in the forward pass, while a chunk's
probabilities are there, so that nothing of size M x K outlives its chunk.

R sets of student rows, C sets of targets, M rows, m rows of a chunk, d bottleneck, K prototypes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import targets as _targets
from .targets import Targets, product_dtype, scores_of


class PrototypeLoss(NamedTuple):
    """A loss and, for monitoring, what its targets are like; only the loss has a gradient."""

    loss: Tensor  # scalar
    entropy: Tensor  # mean entropy of a target, with the rows' weights; loss - entropy is the KL divergence
    mass: Tensor  # mean target [K], with the rows' weights


def prototype_loss(
    z: Tensor,
    w: Tensor,
    targets: Targets,
    *,
    pairs: Tensor,
    weights: Tensor,
    temperature: float = 0.1,
    measure: bool = True,
) -> PrototypeLoss:
    """sum over m, r, c of weights_m pairs_rc CE(p_cm, softmax(z_rm . w / temperature)).

    Rows `z` [R, M, d] and prototypes `w` [K, d] of the student, `targets.features` [C, M, d], `pairs` [R, C] and
    `weights` [M]. Image level (DINOv2 sec. 4): C = 2 global crops, R = 2 + L crops, M images, pairs of `crop_pairs`,
    weights 1 / M. Patch level: R = C = 1, M masked patches. Products are computed as autocast says, softmax and
    losses in float32. No row gives 0. Without `measure`, entropy and mass are 0.
    """
    learns = torch.is_grad_enabled()
    asked = Asked(learns and z.requires_grad, learns and w.requires_grad, measure)
    return PrototypeLoss(*_PrototypeLoss.apply(z, w, targets, pairs, weights, temperature, asked))


class Asked(NamedTuple):
    """What a call computes beside the loss."""

    grad_z: bool
    grad_w: bool
    measures: bool


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        w: Tensor,
        targets: Targets,
        pairs: Tensor,
        weights: Tensor,
        temperature: float,
        asked: Asked,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = product_dtype(w)
        exact = torch.promote_types(dtype, torch.float32)
        # float16 would lose the gradient of a single logit, which is of the order weight / K.
        back = torch.bfloat16 if dtype == torch.bfloat16 else exact
        grad_z = torch.zeros_like(z, dtype=exact) if asked.grad_z else None
        grad_w = torch.zeros_like(w, dtype=exact) if asked.grad_w else None
        with torch.autocast(w.device.type, enabled=False):
            pairs, weights = pairs.to(exact), weights.to(exact)
            each = pairs.sum(1)  # [R]; what a row counts for, so that its mixed targets sum to 1
            mix = pairs / torch.where(each == 0, 1, each)[:, None]
            own, prototypes = z.to(dtype), w.to(dtype)
            others = prototypes.to(back)
            told = Targets(targets.features.to(dtype), targets.prototypes.to(dtype), targets.shift, targets.temperature)
            loss, entropy, mass = (w.new_zeros(shape, dtype=exact) for shape in ((), (), (len(w),)))
            for part in _chunks(z.shape[1], width=(len(z) + len(told.features)) * len(w)):
                factor = each[:, None] * weights[part]  # [R, m]
                scores = told.rows(part).scores()
                p = scores.softmax(-1)  # [C, m, K]
                if asked.measures:
                    entropy -= (torch.linalg.vecdot(p, scores.log_softmax(-1)).mean(0) * weights[part]).sum()
                    mass += (weights[part].repeat(len(p)) / len(p)) @ p.flatten(0, 1)
                del scores
                log_q = scores_of(own[:, part], prototypes, temperature=temperature).log_softmax(-1)  # [R, m, K]
                t = p if mix.numel() == 1 else (mix @ p.flatten(1)).view_as(log_q)
                loss -= (torch.linalg.vecdot(t, log_q) * factor).sum()
                if grad_z is None and grad_w is None:
                    continue
                slope = log_q.exp_().sub_(t).to(back).flatten(0, 1)  # [R * m, K]; times factor / temperature below
                scaled = (factor / temperature)[..., None]
                if grad_z is not None:
                    grad_z[:, part] = (slope @ others).view_as(grad_z[:, part]) * scaled
                if grad_w is not None:
                    rows = (z[:, part] * scaled).to(back).flatten(0, 1)
                    grad_w = grad_w.addmm_(slope.T, rows) if back == exact else grad_w.add_(slope.T @ rows)
            total = weights.sum().clamp_min(torch.finfo(exact).tiny)
            entropy, mass = entropy / total, mass / total
        ctx.mark_non_differentiable(entropy, mass)
        # float16 is left for backward, where a loss scale comes in.
        held = torch.bfloat16 if w.dtype == torch.bfloat16 else exact
        ctx.save_for_backward(grad_z, None if grad_w is None else grad_w.to(held))
        ctx.dtypes = z.dtype, w.dtype
        return loss, entropy, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        made = [
            None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*made, None, None, None, None, None)


def _chunks(num_rows: int, *, width: int) -> list[slice]:
    """Equal parts of the rows that hold at most CHUNK scores each, or one row."""
    parts = max(1, -(-num_rows * width // _targets.CHUNK))
    size = max(1, -(-num_rows // parts))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
