"""The randomness of a training forward pass: drawn from named seeds on the CPU, never from torch's global generator.

S sequences of a group.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.seeding import torch_generator


@dataclass(frozen=True)
class Noise:
    """Seeds of one forward pass. The same seeds give the same draws on every device."""

    rope: int  # of the stretch of RoPE's coordinates, one draw for all images, crops and layers
    drop: int  # of stochastic depth


def draw_stretch(noise: Noise | None, *, jitter: float) -> float:
    """A factor on RoPE's coordinates, log-uniform in [1 / jitter, jitter] (DINOv3 sec. 3.2, "RoPE-box jittering")."""
    if noise is None or jitter == 1:
        return 1.0
    uniform = torch.rand((), generator=torch_generator(noise.rope, "rope")).item()
    return math.exp((2 * uniform - 1) * math.log(jitter))


def draw_kept(noise: Noise, *, group: int, num_sequences: int, drop: float, draws: int) -> Tensor:
    """The sequences of a group that stochastic depth computes, for each of several branches: int64 [draws, kept].

    A random share 1 - drop of the S sequences, at least one, in ascending order (DINOv2 sec. 5, "Efficient stochastic
    depth"). It depends on the seed and the group's number alone, not on what else is packed with it.
    """
    kept = max(1, round(num_sequences * (1 - drop)))
    scores = torch.rand(draws, num_sequences, generator=torch_generator(noise.drop, "drop path", group))
    return scores.argsort(dim=1)[:, :kept].sort(dim=1).values
