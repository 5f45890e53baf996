"""The teacher's targets as a recipe: computed where they are read, chunk by chunk, and never written out.

A target is p_k = softmax_k(z . w_k / T + shift_k). Sinkhorn-Knopp (SwAV, Caron et al. 2020; DINOv2 sec. 4) and softmax
centring (DINO, Caron et al. 2021, eq. 4) differ in `shift` alone, a vector over prototypes.

M rows, C sets of rows, d bottleneck, K prototypes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**24  # scores that are looked at together, a student's and its targets' (64 MiB in float32)


@dataclass(frozen=True)
class Targets:
    """Everything that `scores` needs, and no graph."""

    features: Tensor  # bottleneck features [C, M, d] of the teacher, on the unit sphere
    prototypes: Tensor  # [K, d], as the teacher's head gives them to `read`
    shift: Tensor  # [K], float32
    temperature: float

    def rows(self, part: slice) -> "Targets":
        """The targets of a part of the M rows."""
        return replace(self, features=self.features[:, part])

    def scores(self) -> Tensor:
        """[C, M, K], float32; softmax of them over K is the targets. Large, unless for few `rows`."""
        return scores_of(self.features, self.prototypes, temperature=self.temperature).add_(self.shift)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The type in which products are computed: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def scores_of(z: Tensor, w: Tensor, *, temperature: float) -> Tensor:
    """z . w / temperature: [..., K] of features [..., d]. The product is of their type, the result float32 at least."""
    scores = F.linear(z, w)
    # Divided only now: float16 ends at 65504, which a logit of 2621 divided by 0.04 exceeds.
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).div_(temperature)


@torch.no_grad()
def sinkhorn_shift(
    z: Tensor, w: Tensor, *, temperature: float, num_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Shift [K] that turns the targets of rows `z` [M, d] into those of Sinkhorn-Knopp with prototypes `w` [K, d].

    The matrix exp(z w^T / T) is scaled by a vector over rows and one over prototypes in turn, so that rows sum to 1
    and prototypes get nearly equal mass over the rows of all processes of `group` (None: one process). The shift is
    the logarithm of the second vector; the first is what softmax does. In the log domain, so that no score overflows
    (dinov3's plain prototypes are unbounded) and no prototype loses its rows; `CHUNK` scores exist at a time. A
    process may have no rows; where none has, the shift is the same for all prototypes.
    """
    z, w = z.to(product_dtype(w)), w.to(product_dtype(w))
    blocks = z.split(max(1, CHUNK // (2 * len(w))))
    held = [scores_of(z, w, temperature=temperature)] if len(blocks) == 1 else None

    def passes() -> Iterable[Tensor]:
        return held or (scores_of(block, w, temperature=temperature) for block in blocks)

    log_mass = w.new_full((len(w),), -torch.inf, dtype=torch.promote_types(w.dtype, torch.float32))
    for scores in passes():
        log_mass = torch.logaddexp(log_mass, scores.logsumexp(dim=0))
    if group is not None:
        top = log_mass.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        mass = (log_mass - top.clamp_min(torch.finfo(top.dtype).min)).exp()
        dist.all_reduce(mass, group=group)
        log_mass = top + mass.log()
    shift = torch.where(log_mass.isfinite(), -log_mass, 0)
    for _ in range(num_iterations - 1):
        mass = torch.zeros_like(shift)
        for scores in passes():
            mass += (scores + shift).softmax(dim=-1).sum(dim=0)
        if group is not None:
            dist.all_reduce(mass, group=group)
        # Columns summed to 1 before the rows were divided by at most K: no mass is below 1 / K, where there are rows.
        shift = shift - mass.clamp_min(1 / len(w)).log()
    return shift


def center_shift(center: Tensor, *, temperature: float) -> Tensor:
    """Shift [K] of softmax centring with the moving centre [K] of the logits (DINO, eq. 4)."""
    return -center / temperature


@torch.no_grad()
def update_center(
    center: Tensor, z: Tensor, w: Tensor, *, momentum: float = 0.9, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The centre [K] after a batch of rows `z` [M, d] of each process: an average of mean logits (DINO, eq. 4).

    The mean logit is the logit of the mean row, so no logits are made. Without rows the centre stays.
    """
    total = torch.cat([z.to(center.dtype).sum(dim=0), center.new_tensor([float(len(z))])])
    if group is not None:
        dist.all_reduce(total, group=group)
    with torch.autocast(center.device.type, enabled=False):
        mean = w.to(center.dtype) @ (total[:-1] / total[-1].clamp_min(1))
    return torch.where(total[-1] > 0, torch.lerp(mean, center, momentum), center)
