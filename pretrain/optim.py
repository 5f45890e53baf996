"""AdamW with DINOv2's parameter groups, and gradient clipping per module."""

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .build import Learner
from .config import OptimConfig
from .schedules import StepValues


def build_optimizer(learner: Learner, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW. Each group carries its own factors on rate and weight decay.

    No decay on biases, norms and LayerScale gammas; class, mask, register tokens and positions are decayed, as in the
    reference code. The patch embedding and lower blocks learn more slowly (`patch_embed_lr`, `layer_decay`).
    """
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in learner.named_parameters():
        exempt = name.endswith((".bias", "gamma")) or "norm" in name
        factor = _rate_factor(name, optim, depth=learner.backbone.shape.depth)
        groups.setdefault((factor, 0.0 if exempt else 1.0, "prototypes" in name), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "lr_factor": factor, "wd_factor": decay, "last_layer": last}
            for (factor, decay, last), params in groups.items()
        ],
        lr=0.0,
        betas=(0.9, optim.beta2),
        fused=True,
    )


def _rate_factor(name: str, optim: OptimConfig, *, depth: int) -> float:
    """layer_decay^(blocks above the parameter), times the factor of the patch embedding."""
    if not name.startswith("backbone."):
        return 1.0
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    else:
        layer = depth + 1 if name.startswith("backbone.norm") else 0
    factor = optim.layer_decay ** (depth + 1 - layer)
    return factor * (optim.patch_embed_lr if "patch_embed" in name else 1.0)


def set_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Give every group its rate and weight decay of this step."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_factor"] * (values.last_layer_lr if group["last_layer"] else values.lr)
        group["weight_decay"] = group["wd_factor"] * values.weight_decay


def clip_gradients(learner: nn.Module, clip: float) -> dict[str, Tensor]:
    """Clip backbone and heads apart (as DINOv2 does); returns the norm of each before clipping."""
    norms = {}
    for name, module in learner.named_children():
        parameters = list(module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else float("inf"))
        norms[f"grad_norm/{name}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms
