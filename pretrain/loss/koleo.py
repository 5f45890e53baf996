"""The KoLeo regulariser (Sablayrolles et al. 2019; DINOv2 sec. 4, "KoLeo regularizer").

B rows of a process, or of all processes; D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Added to the squared distance: 1e-4 apart counts as together. Two equal rows then give a finite loss and no
# gradient, where log(0) would give inf (dinov2 threads 143, 314 and 492).
EPSILON = 1e-8


def koleo_loss(features: Tensor, *, group: dist.ProcessGroup | None = None, rows: int = 0) -> Tensor:
    """-mean(log distance to the nearest other row) of L2-normalised `features` [B, D], in float32.

    With a process group the rows of all processes count, so that the loss does not depend on their number (DINOv2
    takes each GPU's rows alone). With `rows` the nearest is sought among so many rows in a row, counted over all
    processes (16 in DINOv3, sec. 3.2); a last group may be smaller. Every process computes the whole loss but holds
    the graph of its own rows only; its gradient is multiplied by the number of processes because data parallelism
    averages gradients. Equal row counts per process are required. A row that is alone in its group does not count.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        unit = own if group is None else _gather(own, group)
        with torch.no_grad():
            member = torch.arange(len(unit), device=unit.device) // (rows or max(1, len(unit)))
            cosines = (unit @ unit.T).masked_fill_(member[:, None] != member, -torch.inf).fill_diagonal_(-torch.inf)
            best, nearest = cosines.max(dim=1) if len(unit) else (unit.new_empty(0), member)
            counts = best > -torch.inf
        logs = 0.5 * ((unit - unit[nearest]).square().sum(-1) + EPSILON).log()
        loss = -(logs * counts).sum() / counts.sum().clamp_min(1)
        if group is None:
            return loss
        return loss.detach() + dist.get_world_size(group) * (loss - loss.detach())


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all processes [B, D] in rank order; the graph reaches this process's own rows only."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.detach(), group=group)
    parts[dist.get_rank(group)] = own
    return torch.cat(parts)
