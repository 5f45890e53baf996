"""Sinkhorn-Knopp centring of the teacher's scores (SwAV, Caron et al. 2020; DINOv2 sec. 4).

M rows (over all processes), K prototypes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, *, temperature: float, num_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Targets [M, K] whose rows sum to 1 and whose prototypes get nearly equal mass over all rows of all processes.

    Keeps two scaling vectors instead of rescaling a matrix: Q = diag(rows) exp(logits / T) diag(columns). Each row's
    maximum is subtracted before the exponential, and given back through the start value of `rows`, so that neither
    large logits overflow nor a low row vanishes. `group=None` means one process.
    """
    scores = logits.float() / temperature
    row_max = scores.amax(dim=1)
    top = row_max.amax() if row_max.numel() else row_max.new_tensor(-torch.inf)
    count = torch.tensor(float(len(scores)), device=scores.device)
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(count, group=group)
    kernel = (scores - row_max[:, None]).exp_()  # [M, K], each row's maximum is 1
    rows = (row_max - top).exp()
    columns = kernel.new_ones(kernel.shape[1])
    for _ in range(num_iterations):
        mass = rows @ kernel  # [K]
        if group is not None:
            dist.all_reduce(mass, group=group)
        columns = 1 / (kernel.shape[1] * mass.clamp_min(torch.finfo(mass.dtype).tiny))
        rows = 1 / (count * (kernel @ columns))
    return kernel * columns * (rows * count)[:, None]
