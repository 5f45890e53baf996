"""Photometric changes of many crops at once, each with its own strength; pure functions of tensors on any device.

The formulas are torchvision's for float tensors (a test holds them to it). torchvision takes one strength per call and
spends most of its time on small crops between the kernels; here a crop costs what its pixels cost. Every operation is
exact or correctly rounded by itself, so a crop's bits do not depend on its neighbours or on the number of threads.

n crops, S pixels a side, values 0 to 1, strengths [n].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # luma of R, G, B (ITU-R BT.601)
BLUR_REACH = 4  # pixels to each side: a kernel of 9, as in the DINOv2 code


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Images [n, 3, S, S] towards black (factor 0) or beyond themselves (above 1)."""
    return (images * _each(factors)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Images [n, 3, S, S] towards (factor 0) or away from (above 1) their mean gray."""
    # A sum of integers is exact in float64 in any order; a float32 mean would depend on threads and batch shape.
    mean = (gray(images) * 65535).round_().sum((1, 2, 3), dtype=torch.float64) / (65535 * images[0, 0].numel())
    return _blend(images, _each(mean.to(images.dtype)), factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Images [n, 3, S, S] towards (factor 0) or away from (above 1) their own gray."""
    return _blend(images, gray(images), factors)


def hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Images [n, 3, S, S] with their hue turned by `shifts` (in turns, -0.5 to 0.5); value and saturation stay."""
    red, green, blue = images.unbind(1)  # [n, S, S] each
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp_min(1e-30)  # where chroma is 0, so are the differences
    # torch.where would take most of the time here: it is not vectorised on the CPU.
    is_red = (high == red).to(images.dtype)
    is_green = (high == green).to(images.dtype) * (1 - is_red)
    sector = is_red * ((green - blue) / divisor)
    sector += is_green * ((blue - red) / divisor + 2)
    sector += (1 - is_red - is_green) * ((red - green) / divisor + 4)  # hue in sixths of a turn, -1 to 5
    sector += 6 * shifts[:, None, None]
    sector -= 6 * (sector / 6).floor_()
    turned = torch.stack([(sector - 3).abs_() - 1, 2 - (sector - 2).abs_(), 2 - (sector - 4).abs_()], dim=1)
    return turned.clamp_(0, 1).mul_(chroma[:, None]).add_((high - chroma)[:, None])


def gray(images: Tensor) -> Tensor:
    """The luma [n, 1, S, S] of images [n, 3, S, S]."""
    red, green, blue = images.split(1, dim=1)
    return (red * GRAY[0]).add_(green * GRAY[1]).add_(blue * GRAY[2])


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Images [n, 3, S, S] under a Gaussian of `sigmas` pixels cut off at 4 pixels, borders reflected; S above 4."""
    offsets = torch.arange(BLUR_REACH + 1, dtype=torch.float64, device=sigmas.device)
    taps = torch.exp(-0.5 * (offsets / sigmas.double()[:, None]) ** 2)  # [n, 5], center first
    taps = (taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])).to(images.dtype)
    padded = F.pad(images, (BLUR_REACH,) * 4, mode="reflect")  # [n, 3, S + 8, S + 8]
    return _filter(_filter(padded, taps, dim=3), taps, dim=2)


def solarize(images: Tensor) -> Tensor:
    """Images with values from the middle up inverted (threshold 128 of 255)."""
    return torch.minimum(images, 1 - images)


def _filter(images: Tensor, taps: Tensor, dim: int) -> Tensor:
    """A symmetric filter along `dim`, which loses 4 pixels at either end."""
    size = images.shape[dim] - 2 * BLUR_REACH
    result = images.narrow(dim, BLUR_REACH, size) * _each(taps[:, 0])
    for i in range(1, BLUR_REACH + 1):
        pair = images.narrow(dim, BLUR_REACH - i, size) + images.narrow(dim, BLUR_REACH + i, size)
        result.add_(pair.mul_(_each(taps[:, i])))
    return result


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    return (images * _each(factors)).add_(others * _each(1 - factors)).clamp_(0, 1)


def _each(values: Tensor) -> Tensor:
    """[n] as [n, 1, 1, 1]."""
    return values[:, None, None, None]
