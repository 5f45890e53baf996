"""The image-level loss of DINO (Caron et al. 2021, sec. 3.1; DINOv2 sec. 4, "Image-level objective").

Cross-entropy between crops of an image, by `prototype_loss` with these pairs. L local crops of an image.
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
