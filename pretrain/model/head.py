"""The projection head of DINO and iBOT: an MLP to a bottleneck on the unit sphere, then prototypes.

M rows, D width, d bottleneck, K prototypes.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


class Prototypes(nn.Module):
    """K directions of width d: with a trainable gain each (DINOv2's weight-normed layer), or plain (DINOv3)."""

    def __init__(self, dim: int, num_prototypes: int, *, weight_norm: bool):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_prototypes, dim), std=0.02))
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1)) if weight_norm else None

    def start(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill `value` with the start of parameter `name`."""
        if name == "gain":
            value.fill_(1.0)
        else:
            nn.init.trunc_normal_(value, std=0.02, generator=generator)

    def forward(self) -> Tensor:
        """Effective prototypes [K, d]."""
        if self.gain is None:
            return self.weight
        # gain * weight / |weight| as torch.nn.utils.parametrizations.weight_norm has it: no copy for backward.
        return torch._weight_norm(self.weight, self.gain, 0)  # pyright: ignore[reportPrivateImportUsage]


class Head(nn.Module):
    """D -> hidden -> ... -> d (GELU between), normalised, then prototypes (DINO, Caron et al. 2021, app. C)."""

    def __init__(
        self, dim: int, *, hidden: int, bottleneck: int, num_layers: int, num_prototypes: int, weight_norm: bool = True
    ):
        super().__init__()
        widths = [dim] + [hidden] * (num_layers - 1) + [bottleneck]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = Prototypes(bottleneck, num_prototypes, weight_norm=weight_norm)

    def forward(self, x: Tensor, read: Callable[[Tensor, Tensor], T] = F.linear) -> T:
        """`read(z, w)` of features [M, D], with z [M, d] their bottleneck and w [K, d] the effective prototypes.

        Without `read` these are the logits [M, K]. What needs the prototypes is handed in because they are gathered
        from all processes only while this module's forward runs.
        """
        z = self.mlp(x)
        # Normalised in float32: in half precision the norm of a small vector underflows. The prototypes take on the
        # type of the features, as autocast would have it, once for all that `read` does with them.
        return read(F.normalize(z.float(), dim=-1).to(z.dtype), self.prototypes().to(z.dtype))
