"""Pixel verification: two pictures are copies of one another if, laid on each other, they agree nearly everywhere.

Embeddings and perceptual hashes propose pairs; this decides. The likely poses of a pair are refined by Gauss-Newton
steps (Lucas and Kanade 1981) on images of normalised local contrast: first at half the resolution, where the best pose
is chosen, then in full, blurred before sharp. A pose is an affine map, so that a copy turned by a few degrees is found
too. Its worth is the correlation of small windows, averaged over the overlap and weighted by their texture. A caption
or a border costs the windows it covers and no more; two photographs under one caption agree in its windows and no more.

M poses, T thumbnail side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .correlate import NOISE, Poses, Spectra, box_mean, likely_poses, spectra

TOP = 3  # poses tried per pair
FLOOR = 0.35  # correlation of the coarse search below which a pose is not refined
ENOUGH = 0.4  # agreement at half the resolution below which a pose is not looked at in full
CLEAR = 0.85  # agreement in full from which a pose is not looked for once more
STEPS = 3  # of refinement: at half the resolution, blurred, and sharp
DAMPING = 0.3  # of the normal equations, in squared units of contrast per pixel
WINDOW = 4  # pixels, radius of the windows that are compared; half of it at half the resolution
TEXTURE = 100.0  # grey levels squared: variance at which a window weighs half
MIN_OVERLAP = 0.25  # of the larger picture that the overlap must cover
MIN_INSIDE = 0.5  # of the smaller picture that must lie within the larger
MAX_SHEAR = 0.45  # tangent of the largest turn or shear
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
    small, coarse = (F.avg_pool2d(x[:, None], 2)[:, 0] for x in (images, blurred))
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
        pose, found = _fit(small, (coarse,), poses, from_boxes(poses.box), window=WINDOW // 2)
        best = torch.zeros_like(scores[chunk]).scatter_reduce(0, poses.pair, found, "amax")
        chosen = ((found >= ENOUGH) & (found == best[poses.pair])).nonzero()[:, 0]
        poses = poses.take(chosen)
        _, found = _fit(images, (blurred, sharp), poses, pose[chosen], window=WINDOW)
        # Half the resolution can lead astray among repeated shapes: where in doubt, once more without it.
        doubt = (found < CLEAR).nonzero()[:, 0]
        _, again = _fit(images, (blurred, sharp), poses.take(doubt), from_boxes(poses.box[doubt]), window=WINDOW)
        found[doubt] = torch.maximum(found[doubt], again)
        scores[chunk] = scores[chunk].scatter_reduce(0, poses.pair, found, "amax")
    return scores


def _fit(
    images: Tensor, contrasts: tuple[Tensor, ...], poses: Poses, pose: Tensor, *, window: int
) -> tuple[Tensor, Tensor]:
    """Poses [M, 2, 3] refined on each contrast [N, T, T] in turn, and the agreement [M] of the pictures [N, T, T]."""
    if not len(pose):
        return pose, pose.new_zeros(0)

    def moved(x: Tensor) -> Tensor:
        x = x[poses.moving]
        return torch.where(poses.mirrored[:, None, None], x.flip(-1), x)

    for contrast in contrasts:
        pose = refine(contrast[poses.reference], moved(contrast), pose, steps=STEPS)
    return pose, agreement(images[poses.reference], moved(images), pose, window=window)


def local_contrast(images: Tensor) -> Tensor:
    """Deviation from the local mean in units of the local deviation; [N, T, T]."""

    share = box_mean(torch.ones_like(images[:1]), WINDOW)  # of a window within the image
    deviation = images - box_mean(images, WINDOW) / share
    return deviation / (box_mean(deviation.square(), WINDOW) / share + NOISE).sqrt()


def from_boxes(box: Tensor) -> Tensor:
    """Poses [M, 2, 3] that lay a picture into the boxes [M, 4] (left, top, width, height) of its reference.

    A pose maps (x, y, 1), with x and y from -0.5 to 0.5 over the reference, to -1 to 1 over the picture.
    """
    pose = box.new_zeros(len(box), 2, 3)
    for axis in (0, 1):
        scale = 2 / box[:, axis + 2]
        pose[:, axis, axis] = scale
        pose[:, axis, 2] = scale * (0.5 - box[:, axis]) - 1
    return pose


def refine(reference: Tensor, moving: Tensor, pose: Tensor, *, steps: int) -> Tensor:
    """Poses [M, 2, 3] changed so that `moving` fits `reference` (both [M, T, T]) better.

    Gauss-Newton on the six numbers of the pose, at most 1.5 pixels a step; pixels that disagree much count little (they
    belong to captions and borders).
    """
    side = reference.shape[-1]
    at = _axis(side, pose.device)
    ones = torch.ones(side, side, device=pose.device)
    basis = torch.stack([at.expand(side, side), at[:, None].expand(side, side), ones]).flatten(1)  # [3, T*T]
    limit = torch.tensor([3.0, 3.0, 1.5], device=pose.device) / side
    for _ in range(steps):
        warped, inside = _draw(moving, pose)
        dx, dy = torch.zeros_like(warped), torch.zeros_like(warped)
        dx[:, :, 1:-1] = (warped[:, :, 2:] - warped[:, :, :-2]) / 2
        dy[:, 1:-1] = (warped[:, 2:] - warped[:, :-2]) / 2
        jacobian = torch.cat([x.flatten(1)[:, None] * basis for x in (dx, dy)], 1)  # [M, 6, T*T], in pixels
        error = (reference - warped).flatten(1)
        weighted = jacobian * (inside.flatten(1) / (1 + error.square()))[:, None]
        normal = weighted @ jacobian.mT + DAMPING * torch.eye(6, device=pose.device)
        change = torch.linalg.solve(normal, weighted @ error[..., None])[..., 0].view(-1, 2, 3) / side
        # Where `pose` found a point of the reference, the new one finds the point moved by `change`.
        pose = pose + pose[:, :, :2] @ change.clamp(-limit, limit)
    return pose


def agreement(reference: Tensor, moving: Tensor, pose: Tensor, *, window: int = WINDOW) -> Tensor:
    """Mean correlation of the windows in the overlap, weighted by texture; [M], 0 where the overlap is too small."""
    warped, inside = _draw(moving, pose)
    squares = reference.square(), warped.square()
    products = torch.stack([reference, warped, *squares, reference * warped], 1)  # [M, 5, T, T]
    share = box_mean(inside, window).clamp_min(1e-3)  # of a window within the overlap
    means = box_mean(products * inside[:, None], window) / share[:, None]
    mean_r, mean_w, square_r, square_w, product = means.unbind(1)
    var_r, var_w = (square_r - mean_r.square()).clamp_min(0), (square_w - mean_w.square()).clamp_min(0)
    covariance = product - mean_r * mean_w
    correlation = covariance / ((var_r + NOISE) * (var_w + NOISE)).sqrt()
    strongest = torch.maximum(var_r, var_w)
    texture = inside * strongest / (strongest + TEXTURE)
    score = (texture * correlation).sum((1, 2)) / texture.sum((1, 2)).clamp_min(1e-3)
    overlap = inside.mean((1, 2))
    (xx, xy), (yx, yy) = (row.unbind(1) for row in pose[:, :, :2].unbind(1))
    area = 4 / (xx * yy - xy * yx).clamp_min(1e-6)  # of the moving picture, in units of the reference
    upright = (xx > 0) & (yy > 0) & (xy.abs() < MAX_SHEAR * xx) & (yx.abs() < MAX_SHEAR * yy)
    enough = (overlap >= MIN_OVERLAP) & (overlap >= MIN_INSIDE * area) & upright
    return torch.where(enough, score.clamp(0, 1), 0.0)


def _axis(side: int, device: torch.device) -> Tensor:
    return (torch.arange(side, device=device) + 0.5) / side - 0.5


def _draw(moving: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """`moving` [M, T, T] as it lies in its reference, and where it lies [M, T, T]."""
    at = _axis(moving.shape[-1], pose.device)
    along, down, shift = pose[..., None, None].unbind(2)  # [M, 2, 1, 1] each
    x, y = (along * at + down * at[:, None] + shift).unbind(1)
    drawn = F.grid_sample(moving[:, None], torch.stack([x, y], -1), padding_mode="border", align_corners=False)
    return drawn[:, 0], ((x.abs() < 1) & (y.abs() < 1)).float()
