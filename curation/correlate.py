"""How one picture might lie within another: scale, shift and mirroring by correlating small grey versions.

Each image is reduced to SIDE pixels (root of its area, aspect kept) and to three smaller scales, its local contrast is
normalised, and the spectra are kept. One inverse FFT per pair and scale then scores every shift at once, with either
image as the larger one, so that crops of 60 % a side, borders, captions and mirror images all peak where they fit.

B pairs, N images, S scales, M poses, P = PLANE.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28  # pixels, root of the area of an image at scale 1
PLANE = 48  # pixels, side of the plane of shifts; wraps around only where less than half of an image would overlap
SCALES = (1.0, 0.85, 0.72, 0.61)  # of the smaller image within the larger; neighbours are within the peak's width
RADIUS = 2  # pixels, of the window in which contrast is normalised
NOISE = 16.0  # grey levels squared; contrast below this is noise


@dataclass(frozen=True)
class Spectra:
    """N images at S scales."""

    values: Tensor  # complex64 [S, N, P, P // 2 + 1]
    energy: Tensor  # [S, N]: sum of squares before the transform
    size: Tensor  # [S, N, 2]: width and height in pixels of the plane


@dataclass(frozen=True)
class Poses:
    """M ways in which the images of a pair may lie on each other."""

    pair: Tensor  # int64 [M]: index of the pair
    reference: Tensor  # int64 [M]: the larger image
    moving: Tensor  # int64 [M]: the image that lies in it
    mirrored: Tensor  # bool [M]: whether `moving` is flipped left to right first
    box: Tensor  # [M, 4]: left, top, width, height of `moving` in units of `reference`
    score: Tensor  # [M]: correlation, about 1 where all of `moving` is found

    def take(self, index: Tensor) -> "Poses":
        """Some of the poses; index: int64."""
        return Poses(*(getattr(self, field.name)[index] for field in fields(self)))


def spectra(thumbs: Tensor, aspect: Tensor) -> Spectra:
    """thumbs: float [N, T, T], 0 to 255, aspect ignored; aspect: float [N], width / height."""
    small = F.avg_pool2d(thumbs[:, None], thumbs.shape[-1] // 32)  # [N, 1, 32, 32]
    values, energy, sizes = [], [], []
    for scale in SCALES:
        root = aspect.sqrt()
        size = (SIDE * scale * torch.stack([root, 1 / root], -1)).clamp(6, PLANE)  # [N, 2]
        plane, mask = _place(small, size)
        contrast = _local_contrast(plane, mask)
        values.append(torch.fft.rfft2(contrast))
        energy.append(contrast.square().sum((1, 2)))
        sizes.append(size)
    return Spectra(torch.stack(values), torch.stack(energy), torch.stack(sizes))


def likely_poses(images: Spectra, a: Tensor, b: Tensor, *, top: int, floor: float) -> Poses:
    """The `top` best poses of each pair with a score of at least `floor`. a, b: int64 [B] into `images`."""
    scores, boxes, kinds = [], [], []
    for mirrored in (False, True):
        for scale in range(len(SCALES)):
            for swap in (False, True) if scale else (False,):  # at scale 1 the roles are alike
                reference, moving = (b, a) if swap else (a, b)
                score, box = _best_shift(images, reference, moving, scale, mirrored)
                scores.append(score)
                boxes.append(box)
                kinds.append((mirrored, swap))
    best, kind = torch.stack(scores, 1).topk(top, dim=1)  # [B, top]
    pair, rank = (best >= floor).nonzero(as_tuple=True)  # [M]
    kind = kind[pair, rank]
    mirrored, swap = torch.tensor(kinds, device=a.device)[kind].unbind(-1)
    return Poses(
        pair=pair,
        reference=torch.where(swap, b[pair], a[pair]),
        moving=torch.where(swap, a[pair], b[pair]),
        mirrored=mirrored,
        box=torch.stack(boxes, 1)[pair, kind],
        score=best[pair, rank],
    )


def _best_shift(
    images: Spectra, reference: Tensor, moving: Tensor, scale: int, mirrored: bool
) -> tuple[Tensor, Tensor]:
    """Score [B] and box [B, 4] of the best shift of `moving`, at a scale, within `reference`."""
    spectrum = images.values[scale, moving]
    if mirrored:  # x -> -x around the origin; the box below is moved back by the width
        spectrum = spectrum[:, (-torch.arange(PLANE)) % PLANE].conj()
    plane = torch.fft.irfft2(images.values[0, reference] * spectrum.conj(), s=(PLANE, PLANE))  # [B, P, P]
    peak, at = plane.flatten(1).max(1)
    width, height = images.size[scale, moving].unbind(-1)
    whole_width, whole_height = images.size[0, reference].unbind(-1)
    x, y = (at % PLANE).float(), (at // PLANE).float()
    x = torch.where(x >= (whole_width + width / 2 if mirrored else PLANE - width / 2), x - PLANE, x)
    y = torch.where(y >= PLANE - height / 2, y - PLANE, y)
    if mirrored:
        x = x - (width - 1)
    box = torch.stack([x / whole_width, y / whole_height, width / whole_width, height / whole_height], -1)
    # Of a reference of even energy, an image at this scale covers scale^2.
    return peak / (images.energy[0, reference] * images.energy[scale, moving]).sqrt() / SCALES[scale], box


def _place(images: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] at `size` [N, 2] in the corner of a plane [N, P, P], and where they lie in it."""
    at = torch.arange(PLANE, device=size.device) + 0.5
    x, y = at / size[:, :1] * 2 - 1, at / size[:, 1:] * 2 - 1  # [N, P]
    grid = torch.stack([x[:, None, :].expand(-1, PLANE, -1), y[:, :, None].expand(-1, -1, PLANE)], -1)
    plane = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    return plane, ((x < 1)[:, None, :] & (y < 1)[:, :, None]).float()


def _local_contrast(plane: Tensor, mask: Tensor) -> Tensor:
    """Deviation from the local mean in units of the local deviation, within the mask; [N, P, P]."""

    def blur(x: Tensor) -> Tensor:
        return box_mean(box_mean(x, RADIUS), RADIUS)

    weight = blur(mask).clamp_min(1e-3)
    deviation = (plane - blur(plane * mask) / weight) * mask
    return deviation / (blur(deviation.square()) / weight + NOISE).sqrt() * mask


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over windows of side 2 * radius + 1, zero outside; x: [..., T, T].

    As products with a band matrix from both sides: for small images several times faster than pooling on a CPU.
    """
    at = torch.arange(x.shape[-1], device=x.device)
    band = ((at[:, None] - at).abs() <= radius).to(x.dtype) / (2 * radius + 1)
    return band @ (x @ band)
