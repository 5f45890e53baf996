"""Masks have exact counts, stratified ratios and blocks."""

import numpy as np
import pytest
import torch

from pretrain.data.config import MaskConfig
from pretrain.data.masks import block_mask, draw_masks, mask_counts
from runtime.seeding import generator


def draw(num_crops=64, grid=(8, 8), config=None, seed=0, step=0, crops=None):
    crops = np.arange(num_crops) if crops is None else crops
    return draw_masks(seed, step, num_crops=num_crops, crops=crops, grid=grid, config=config or MaskConfig())


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 7), (5, 3), (14, 14)])
def test_any_count_is_met_exactly(grid):
    for count in range(grid[0] * grid[1] + 1):
        mask = block_mask(generator(0, "test", count), grid, count)
        assert mask.shape == grid
        assert mask.sum() == count


def test_half_of_the_crops_is_masked_with_ratios_spread_evenly():
    masks = draw(num_crops=200, grid=(20, 20))
    assert masks.dtype == torch.bool
    assert masks.shape == (200, 400)
    ratios = masks.float().mean(1)
    ratios = ratios[ratios > 0].sort().values
    assert len(ratios) == 100
    edges = torch.linspace(0.1, 0.5, 101)
    assert ((ratios >= edges[:-1] - 1 / 400) & (ratios <= edges[1:])).all()  # one in each stratum, rounded down


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MaskConfig(probability=0.0), 0),
        (MaskConfig(probability=1.0, ratio_min=0.0, ratio_max=0.0), 0),
        (MaskConfig(probability=1.0, ratio_min=1.0, ratio_max=1.0), 16),
        (MaskConfig(probability=1.0, ratio_min=0.5, ratio_max=0.5), 8),
    ],
)
def test_extremes(config, expected):
    assert draw(num_crops=6, grid=(4, 4), config=config).sum(1).tolist() == [expected] * 6


def test_which_crops_are_masked_changes_with_the_step():
    masked = np.stack([draw(step=step).any(1).numpy() for step in range(40)])
    assert (masked.sum(1) == 32).all()
    assert abs(masked.mean(0) - 0.5).max() < 0.4  # 5 standard deviations of a fair deal
    assert len({row.tobytes() for row in masked}) == 40


def test_a_rank_draws_the_same_masks_as_one_process():
    whole = draw(num_crops=32)
    part = draw(num_crops=32, crops=np.array([3, 17, 30]))
    assert torch.equal(part, whole[[3, 17, 30]])
    assert not torch.equal(draw(num_crops=32, seed=1), whole)


def test_masks_are_blocks_not_dust():
    """Of two horizontal neighbours one is masked and one not: far more often among scattered patches."""
    random = generator(0, "test")
    blocks = [block_mask(random, (14, 14), 60) for _ in range(100)]
    edges = np.mean([(mask[:, 1:] != mask[:, :-1]).sum() for mask in blocks])
    scattered = 2 * 14 * 13 * (60 / 196) * (136 / 195)
    assert edges < 0.5 * scattered


def test_masks_cover_the_whole_crop():
    random = generator(1, "test")
    cover = np.mean([block_mask(random, (8, 8), 20) for _ in range(600)], axis=0)
    assert cover.min() > 0.05  # few blocks reach a corner: 0.09 here
    assert cover.max() < 0.6


def test_counts_of_one_masked_crop_span_the_range():
    counts = [
        mask_counts(generator(0, "t", i), num_crops=2, num_patches=100, config=MaskConfig()).max() for i in range(300)
    ]
    assert min(counts) < 13
    assert max(counts) > 46


def test_masked_patches_are_never_short_of_their_count():
    """The reference falls short by up to two patches (method 2.4): here every count of every step is met."""
    for step in range(20):
        masks = draw(num_crops=64, grid=(14, 14), step=step)
        counts = mask_counts(generator(0, "mask counts", step), num_crops=64, num_patches=196, config=MaskConfig())
        assert masks.sum(1).tolist() == counts.tolist()
