"""The exponential moving average of the student that serves as teacher (DINO sec. 3.1), on shards where sharded."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, momentum: float) -> None:
    """ema <- momentum * ema + (1 - momentum) * student, in place; both are sharded alike."""
    for module in ema.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without gradients leaves the root's parameters gathered
    torch._foreach_lerp_(_local(ema), _local(student), 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def _local(module: nn.Module) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in module.parameters()]
