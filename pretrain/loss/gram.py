"""Gram anchoring (DINOv3 sec. 4): patch tokens keep the similarities to one another that an early teacher saw.

B images, N patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines of all pairs of patches of an image, in float32.

    `student` and `teacher` [B, N, D] patch tokens of the same crops on the same grid (the widths may differ); no
    gradient reaches the teacher (DINOv3 sec. 4, with the mean in place of the sum).
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(_cosines(student), _cosines(teacher.detach()))


def _cosines(tokens: Tensor) -> Tensor:
    """[B, N, N], float32."""
    unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
    return unit @ unit.transpose(1, 2)


def resample_tokens(tokens: Tensor, *, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Tokens [B, h * w, D] of a grid of (h, w) patches on another grid (H, W): [B, H * W, D], float32, row by row.

    Bicubic, as DINOv3 sec. 4 brings the features of a teacher that saw twice the resolution to the student's grid.
    """
    images = tokens.float().transpose(1, 2).unflatten(2, grid)
    return F.interpolate(images, size=to, mode="bicubic").flatten(2).transpose(1, 2)
