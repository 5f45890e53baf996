"""FSDP2 around a learner from outside; the model knows nothing of it."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..build import Learner


def shard(learner: Learner, mesh: DeviceMesh) -> None:
    """Shard every block, then the backbone's rest, then each head, in place.

    Blocks are the unit of gathering; backbone and heads are roots of their own because each is called by itself.
    """
    for block in learner.backbone.blocks:
        fully_shard(block, mesh=mesh)
    for module in (learner.backbone, learner.dino_head, learner.ibot_head):
        fully_shard(module, mesh=mesh)
