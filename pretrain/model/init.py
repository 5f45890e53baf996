"""Start values of linear layers."""

from typing import Literal

from torch import nn

Init = Literal["reference", "fan_in"]


def init_linear(module: nn.Module, init: Init) -> None:
    """Truncated normal weights and zero biases for every linear layer below `module`, in place.

    `reference`: standard deviation 0.02, as in DINOv2's code, which suits widths of 768 and more. `fan_in`:
    1 / sqrt(inputs); at widths around 100 the former shrinks every branch to a hundredth and the class tokens of
    different images start out nearly equal, which costs a short run most of its steps.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02 if init == "reference" else layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
