"""The patch-level loss of iBOT (Zhou et al. 2022, sec. 3.2; DINOv2 sec. 4, "Patch-level objective").

M masked patches, K prototypes, B global crops.
"""

from torch import Tensor


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, *, num_crops: int, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of masked patches: `student` logits [M, K], `targets` probabilities [M, K], `weights` [M].

    `weights` is 1 / (masked patches of the same crop), so that every masked crop counts alike; the sum is divided by
    all `num_crops` global crops, masked or not, as DINOv2 does. No masked patch gives 0.
    """
    log_probabilities = (student.float() / temperature).log_softmax(dim=-1)
    return -((targets * log_probabilities).sum(-1) * weights).sum() / num_crops


def mask_weights(masks: Tensor) -> Tensor:
    """1 / (masked patches of the crop) for each masked patch of `masks` [B, N], in row-major order: [M]."""
    per_crop = masks.sum(-1, keepdim=True).clamp_min(1)
    return (1 / per_crop).expand_as(masks)[masks]
