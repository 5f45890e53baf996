"""The exponential moving average of the student that serves as teacher (DINO sec. 3.1), on shards where sharded."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, momentum: float) -> None:
    """ema <- momentum * ema + (1 - momentum) * student, in place; buffers are copied. Both are sharded alike."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: found {momentum}; expected 0 to 1")
    for module in ema.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without gradients leaves the root's parameters gathered
    torch._foreach_lerp_(_local(ema.parameters()), _local(student.parameters()), 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
    for ours, theirs in zip(ema.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]
