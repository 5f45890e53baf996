"""The loss of SSCD (Pizzi et al. 2022, sec. 4): InfoNCE on pairs of views, and spread vectors.

B images, D numbers per vector.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def copy_loss(first: Tensor, second: Tensor, *, temperature: float, entropy_weight: float) -> tuple[Tensor, Tensor]:
    """(InfoNCE + weight * entropy term, InfoNCE alone) of the unit vectors of two views, [B, D] each.

    InfoNCE: each of the 2B vectors picks its partner among the 2B - 1 others (SimCLR). Entropy term: the mean of
    -log of the distance to the nearest vector of another image (Sablayrolles et al. 2019, KoLeo), which makes
    distances comparable over all of space and so one threshold meaningful.
    """
    vectors = torch.cat([first, second])
    count = len(first)
    own = torch.eye(2 * count, dtype=torch.bool, device=vectors.device)
    partner = torch.arange(2 * count, device=vectors.device).roll(count)
    similarity = vectors @ vectors.T
    contrast = F.cross_entropy((similarity / temperature).masked_fill(own, -torch.inf), partner)
    others = similarity.masked_fill(own | own.roll(count, 0), -2.0).amax(1)
    distance = (2 - 2 * others).clamp(min=1e-6).sqrt()
    return contrast - entropy_weight * distance.log().mean(), contrast
