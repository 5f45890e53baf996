"""Which patches of the global crops are hidden from the student (iBOT, Zhou et al. 2022, sec. 3.2).

Blocks are drawn as in BEiT (Bao et al. 2022, algorithm 1): area, aspect ratio and place at random until enough is
covered. The last patches that no block fits are drawn one by one, so a mask has its exact count (the DINOv2 code
falls short by up to two patches).
"""

import math

import numpy as np
import torch
from torch import Tensor

from runtime.seeding import generator

from .config import MaskConfig

SMALLEST_BLOCK = 4  # patches
ASPECT = (0.3, 1 / 0.3)  # height / width of a block
ATTEMPTS = 10  # misses before the rest is drawn patch by patch


def draw_masks(
    seed: int, step: int, *, num_crops: int, crops: np.ndarray, grid: tuple[int, int], config: MaskConfig
) -> Tensor:
    """Masks (bool [C, H * W], True: hidden) of `crops` (integers [C]), some of the `num_crops` global crops of a step.

    `grid` is (H, W) in patches. A crop's mask depends on seed, step and its number, so that a rank draws its own only.
    """
    counts = mask_counts(
        generator(seed, "mask counts", step), num_crops=num_crops, num_patches=grid[0] * grid[1], config=config
    )
    masks = np.zeros((len(crops), *grid), bool)
    for row in np.flatnonzero(counts[crops]):
        crop = int(crops[row])
        masks[row] = block_mask(generator(seed, "mask", step, crop), grid, int(counts[crop]))
    return torch.from_numpy(masks.reshape(len(crops), -1))


def mask_counts(random: np.random.Generator, *, num_crops: int, num_patches: int, config: MaskConfig) -> np.ndarray:
    """Number of masked patches of each crop, int64 [num_crops].

    A share `probability` of the crops is masked. Their ratios fill the range evenly: one is drawn from each of as many
    strata as there are masked crops (DINOv2), and then dealt out at random.
    """
    num_masked = int(num_crops * config.probability)
    strata = np.linspace(config.ratio_min, config.ratio_max, num_masked + 1)
    ratios = strata[:-1] + random.random(num_masked) * np.diff(strata)
    counts = np.zeros(num_crops, np.int64)
    counts[:num_masked] = np.floor(num_patches * ratios + 1e-9)
    return random.permutation(counts)


def block_mask(random: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """A mask (bool [H, W]) of exactly `count` patches in rectangular blocks."""
    height, width = grid
    mask = np.zeros(grid, bool)
    missing, misses = count, 0
    while missing >= SMALLEST_BLOCK and misses < ATTEMPTS:
        area, aspect, y, x = random.random(4).tolist()
        area = SMALLEST_BLOCK + area * (missing - SMALLEST_BLOCK)
        aspect = math.exp(math.log(ASPECT[0]) + aspect * math.log(ASPECT[1] / ASPECT[0]))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h > height or w > width:
            misses += 1
            continue
        top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(block))
        if 0 < new <= missing:
            block[:] = True
            missing -= new
        else:
            misses += 1
    rest = random.choice(np.flatnonzero(~mask), missing, replace=False)
    mask.flat[rest] = True
    return mask
