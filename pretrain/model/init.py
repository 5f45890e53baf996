"""Start values of parameters.

Whoever owns parameters of its own beside PyTorch's layers says what they start from in a method
`start(name, value, generator)`, which fills `value` in place.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["reference", "fan_in"]


def start_value(
    module: nn.Module, name: str, shape: Sequence[int], *, init: Init, generator: torch.Generator
) -> Tensor:
    """The start of `module`'s own parameter or buffer `name`, float32 on the CPU; NaN where nothing says what it is.

    Linear layers: truncated normal weights and zero biases. `reference`: standard deviation 0.02, as in DINOv2's code,
    which suits widths of 768 and more. `fan_in`: 1 / sqrt(inputs); at widths around 100 the former shrinks every branch
    to a hundredth and the class tokens of different images start out nearly equal, which costs a short run most of its
    steps. Convolutions: uniform within 1 / sqrt(inputs), PyTorch's default, which DINOv2's patch embedding keeps.
    """
    value = torch.full(shape, math.nan)
    if isinstance(module, nn.Linear):
        if name == "bias":
            return value.zero_()
        std = 0.02 if init == "reference" else module.in_features**-0.5
        return nn.init.trunc_normal_(value, std=std, generator=generator)
    if isinstance(module, nn.Conv2d):
        bound = (module.in_channels * math.prod(module.kernel_size)) ** -0.5
        return value.uniform_(-bound, bound, generator=generator)
    if isinstance(module, nn.LayerNorm):
        return value.fill_(float(name == "weight"))
    start = getattr(module, "start", None)
    if start is not None:
        start(name, value, generator)
    return value
