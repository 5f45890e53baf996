"""Axial rotary positions (DINOv3 sec. 3.2 and table 2; Su et al. 2021 for the rotation).

N patches of a grid, T tokens, E width of a head.
"""

import math

import torch
from torch import Tensor

BASE = 100.0  # ratio of the longest to the shortest period, nearly


def rotation(height: int, width: int, head_width: int, *, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of a grid of patches, each float32 [height * width, E].

    The centre of a patch has coordinates in [-1, 1] along each axis by itself, times `stretch`. A quarter of E is the
    number of periods BASE^0 ... BASE^1, shared by both axes; dimension i is rotated together with i + E / 2.
    """
    if head_width % 4:
        raise ValueError(f"rotary positions need a head width that is a multiple of 4; found {head_width}")
    y, x = ((torch.arange(size) + 0.5) / size * 2 - 1 for size in (height, width))
    grid = torch.cartesian_prod(y, x) * stretch  # [N, 2]
    periods = BASE ** (torch.arange(head_width // 4) * 4 / head_width)
    angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1).tile(2)  # [N, E]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [T, H, E] turned by their tokens' angles [T, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
