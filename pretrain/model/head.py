"""The projection head of DINO and iBOT: an MLP to a bottleneck on the unit sphere, then prototypes.

M rows, D width, d bottleneck, K prototypes.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .init import init_linear


class Prototypes(nn.Module):
    """Weight-normed linear layer d -> K with a trainable gain per prototype, as in DINOv2."""

    def __init__(self, dim: int, num_prototypes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, dim))
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [M, K] of unit vectors [M, d]."""
        return F.linear(x, self.gain * F.normalize(self.weight, dim=-1))


class Head(nn.Module):
    """D -> hidden -> ... -> d (GELU between), normalised, then prototypes (DINO, Caron et al. 2021, app. C)."""

    def __init__(self, dim: int, *, hidden: int, bottleneck: int, num_layers: int, num_prototypes: int):
        super().__init__()
        widths = [dim] + [hidden] * (num_layers - 1) + [bottleneck]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = Prototypes(bottleneck, num_prototypes)
        init_linear(self, "reference")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [M, K] of features [M, D]."""
        # Normalised in float32: in half precision the norm of a small vector underflows.
        return self.prototypes(F.normalize(self.mlp(x).float(), dim=-1).to(x.dtype))
