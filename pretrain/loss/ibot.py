"""The patch-level loss of iBOT (Zhou et al. 2022, sec. 3.2; DINOv2 sec. 4, "Patch-level objective").

Cross-entropy of masked patches, by `prototype_loss` with these weights. B global crops, N patches, M masked patches.
"""

from torch import Tensor


def mask_weights(masks: Tensor) -> Tensor:
    """1 / (masked patches of the crop) for each masked patch of `masks` bool [B, N], row by row: [M].

    So every masked crop counts alike; divided by all B crops, masked or not, as DINOv2 does, these are the weights of
    the loss.
    """
    per_crop = masks.sum(-1, keepdim=True).clamp_min(1)
    return (1 / per_crop).expand_as(masks)[masks]
