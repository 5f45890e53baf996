"""The image-level loss of DINO (Caron et al. 2021, sec. 3.1; DINOv2 sec. 4, "Image-level objective").

B images, K prototypes, L local crops of an image, R = 2 + L crops of an image.
"""

import torch
from torch import Tensor


def crop_pairs(num_local: int, *, local_weight: float = 1.0) -> Tensor:
    """Factors [2 + L, 2] of (student crop, teacher's global crop) pairs for `prototype_loss`.

    1 / (2 + 2 L) for each of the 2 cross pairs of global crops and 2 L pairs of a local and a global crop; the latter
    times `local_weight` (0.5 in DINOv3's later stages). A crop is no pair with itself.
    """
    pairs = torch.ones(2 + num_local, 2)
    pairs[2:] *= local_weight
    same_crop = torch.arange(2 + num_local)[:, None] == torch.arange(2)
    return pairs.masked_fill(same_crop, 0) / (2 + 2 * num_local)


def dino_loss(student_globals: Tensor, student_locals: Tensor, targets: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy over the 2 cross pairs of global crops and the 2 L pairs of a local and a global crop.

    `student_globals` logits [2, B, K], `student_locals` logits [L, B, K] (L may be 0), `targets` probabilities
    [2, B, K] of the teacher. A global crop is never its own target: the diagonal is dropped by swapping the targets.
    """
    log_globals = (student_globals.float() / temperature).log_softmax(dim=-1)
    swapped = targets.flip(0)
    total = -(swapped * log_globals).sum(dim=(0, 2))  # [B]
    num_locals = student_locals.shape[0]
    if num_locals:
        log_locals = (student_locals.float() / temperature).log_softmax(dim=-1)
        total = total - torch.einsum("bk,lbk->b", targets.sum(0), log_locals)
    return total.mean() / (2 + 2 * num_locals)
