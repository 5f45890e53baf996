"""Pixel verification: two pictures are copies of one another if, laid on each other, they agree nearly everywhere.

Embeddings and perceptual hashes propose pairs; this decides. The likely poses of a pair are refined by Gauss-Newton
steps (Lucas and Kanade 1981) on images of normalised local contrast, and the pose's worth is the correlation of
small windows, averaged over the overlap and weighted by their texture. A caption or a border costs the windows it
covers and no more; two photographs under one caption agree in its windows and no more.

M poses, T thumbnail side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .correlate import NOISE, Poses, Spectra, box_mean, likely_poses, spectra

TOP = 3  # poses tried per pair
FLOOR = 0.35  # correlation of the coarse search below which a pose is not refined
STEPS = 3  # of refinement, first on blurred images, then on sharp ones
WINDOW = 4  # pixels, radius of the windows that are compared
TEXTURE = 100.0  # grey levels squared: variance at which a window weighs half
MIN_OVERLAP = 0.25  # of the larger picture that the overlap must cover
MIN_INSIDE = 0.5  # of the smaller picture that must lie within the larger
MAX_IMAGES = 1024  # whose spectra are held at a time: 38 KB each
BATCH = 128  # pairs or poses computed at a time; small enough for the caches of a CPU


def verify_pairs(thumbs: np.ndarray, aspect: np.ndarray, pairs: np.ndarray, device: torch.device) -> np.ndarray:
    """How well the pictures of each pair agree once aligned, 0 to 1; float32 [E].

    thumbs: uint8 [N, T, T] grey, aspect ignored; aspect: float [N], width / height; pairs: int [E, 2], sorted by their
    first column for speed. The score is symmetric but for rounding. 0: no pose in which they overlap enough.
    """
    scores = np.zeros(len(pairs), dtype=np.float32)
    start = 0
    while start < len(pairs):
        stop = start + _num_pairs_of(pairs[start:], MAX_IMAGES)
        rows, index = np.unique(pairs[start:stop], return_inverse=True)
        images = torch.from_numpy(thumbs[rows]).to(device, torch.float32)
        ratio = torch.from_numpy(aspect[rows]).to(device, torch.float32)
        a, b = torch.from_numpy(index.reshape(-1, 2)).to(device).unbind(1)
        scores[start:stop] = _verify(images, ratio, a, b).cpu().numpy()
        start = stop
    return scores


def _num_pairs_of(pairs: np.ndarray, num_images: int) -> int:
    """How many leading pairs stay within a number of distinct images (at least one pair)."""
    _, first = np.unique(pairs.reshape(-1), return_index=True)
    return len(pairs) if len(first) <= num_images else max(1, int(np.sort(first)[num_images]) // 2)


def _verify(images: Tensor, aspect: Tensor, a: Tensor, b: Tensor) -> Tensor:
    sharp = torch.cat([local_contrast(chunk) for chunk in images.split(BATCH)])
    blurred = F.avg_pool2d(sharp[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    parts = [spectra(*chunk) for chunk in zip(images.split(BATCH), aspect.split(BATCH), strict=True)]
    transformed = Spectra(
        values=torch.cat([part.values for part in parts], 1),
        energy=torch.cat([part.energy for part in parts], 1),
        size=torch.cat([part.size for part in parts], 1),
    )
    scores = torch.zeros(len(a), device=a.device)
    for start in range(0, len(a), BATCH):
        chunk = slice(start, start + BATCH)
        poses = likely_poses(transformed, a[chunk], b[chunk], top=TOP, floor=FLOOR)
        if len(poses.pair):
            found = _judge(images, sharp, blurred, poses)
            scores[chunk] = scores[chunk].scatter_reduce(0, poses.pair, found, "amax")
    return scores


def _judge(images: Tensor, sharp: Tensor, blurred: Tensor, poses: Poses) -> Tensor:
    """Agreement of each refined pose; [M]."""

    def moved(x: Tensor) -> Tensor:
        x = x[poses.moving]
        return torch.where(poses.mirrored[:, None, None], x.flip(-1), x)

    box = refine(blurred[poses.reference], moved(blurred), poses.box, steps=STEPS)
    box = refine(sharp[poses.reference], moved(sharp), box, steps=STEPS)
    return agreement(images[poses.reference], moved(images), box)


def local_contrast(images: Tensor) -> Tensor:
    """Deviation from the local mean in units of the local deviation; [N, T, T]."""

    share = box_mean(torch.ones_like(images[:1]), WINDOW)  # of a window within the image
    deviation = images - box_mean(images, WINDOW) / share
    return deviation / (box_mean(deviation.square(), WINDOW) / share + NOISE).sqrt()


def refine(reference: Tensor, moving: Tensor, box: Tensor, *, steps: int) -> Tensor:
    """Boxes [M, 4] moved and scaled so that `moving` fits `reference` (both [M, T, T]) better.

    Gauss-Newton on position and size, at most 1.5 pixels a step; pixels that disagree much count little (they belong
    to captions and borders).
    """
    side = reference.shape[-1]
    for _ in range(steps):
        warped, inside, x, y = _warp(moving, box)
        dx, dy = torch.zeros_like(warped), torch.zeros_like(warped)
        dx[:, :, 1:-1] = (warped[:, :, 2:] - warped[:, :, :-2]) / 2
        dy[:, 1:-1] = (warped[:, 2:] - warped[:, :-2]) / 2
        # Derivatives by: shift right, shift down, growth in width, growth in height, in pixels.
        jacobian = -torch.stack([dx, dy, dx * x[:, None, :] / 2, dy * y[:, :, None] / 2], 1).flatten(2)  # [M, 4, T*T]
        error = (reference - warped).flatten(1)  # [M, T*T]
        weighted = jacobian * (inside.flatten(1) / (1 + error.square()))[:, None]
        normal = weighted @ jacobian.mT + torch.eye(4, device=box.device)  # [M, 4, 4]
        change = torch.linalg.solve(normal, weighted @ error[..., None])[..., 0].clamp(-1.5, 1.5) / side  # [M, 4]
        size = (box[:, 2:] + change[:, 2:]).clamp(0.2, 3.0)
        box = torch.cat([box[:, :2] + change[:, :2] - change[:, 2:] / 2, size], -1)
    return box


def agreement(reference: Tensor, moving: Tensor, box: Tensor) -> Tensor:
    """Mean correlation of the windows in the overlap, weighted by texture; [M], 0 where the overlap is too small."""
    warped, inside, _, _ = _warp(moving, box)
    squares = reference.square(), warped.square()
    products = torch.stack([reference, warped, *squares, reference * warped], 1)  # [M, 5, T, T]
    share = box_mean(inside, WINDOW).clamp_min(1e-3)  # of a window within the overlap
    means = box_mean(products * inside[:, None], WINDOW) / share[:, None]
    mean_r, mean_w, square_r, square_w, product = means.unbind(1)
    var_r, var_w = (square_r - mean_r.square()).clamp_min(0), (square_w - mean_w.square()).clamp_min(0)
    covariance = product - mean_r * mean_w
    correlation = covariance / ((var_r + NOISE) * (var_w + NOISE)).sqrt()
    strongest = torch.maximum(var_r, var_w)
    texture = inside * strongest / (strongest + TEXTURE)
    score = (texture * correlation).sum((1, 2)) / texture.sum((1, 2)).clamp_min(1e-3)
    overlap = inside.mean((1, 2))
    enough = (overlap >= MIN_OVERLAP) & (overlap >= MIN_INSIDE * box[:, 2] * box[:, 3])
    return torch.where(enough, score.clamp(0, 1), 0.0)


def _warp(moving: Tensor, box: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`moving` [M, T, T] drawn into its box of the reference; where it lies; and x, y [M, T] in it, -1 to 1."""
    side = moving.shape[-1]
    at = (torch.arange(side, device=box.device) + 0.5) / side
    x, y = ((at - box[:, i, None]) / box[:, i + 2, None] * 2 - 1 for i in (0, 1))  # [M, T]
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    warped = F.grid_sample(moving[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    return warped, ((x.abs() < 1)[:, None, :] & (y.abs() < 1)[:, :, None]).float(), x, y
