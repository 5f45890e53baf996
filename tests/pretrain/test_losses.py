"""Pairs and weights of the image-level and patch-level loss, KoLeo and Gram, against slow loops and by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.loss.dino import crop_pairs
from pretrain.loss.gram import gram_loss, resample_tokens
from pretrain.loss.ibot import mask_weights
from pretrain.loss.koleo import koleo_loss


def test_a_global_crop_is_no_pair_with_itself():
    assert crop_pairs(0).tolist() == [[0, 0.5], [0.5, 0]]
    expected = [[0, 1 / 6], [1 / 6, 0], [1 / 6, 1 / 6], [1 / 6, 1 / 6]]
    assert torch.allclose(crop_pairs(2), torch.tensor(expected))
    assert torch.equal(crop_pairs(2, local_weight=0.5)[2:], crop_pairs(2)[2:] / 2)


def test_pairs_are_a_mean_over_18_of_dinov2():
    assert crop_pairs(8).count_nonzero() == 18
    assert crop_pairs(8).sum() == pytest.approx(1)


def test_every_masked_crop_counts_alike():
    masks = torch.tensor([[True, True, False], [False, False, False], [False, False, True]])
    assert mask_weights(masks).tolist() == [0.5, 0.5, 1]
    assert mask_weights(torch.zeros(4, 9, dtype=torch.bool)).shape == (0,)  # mask ratio 0
    assert torch.allclose(mask_weights(torch.ones(4, 9, dtype=torch.bool)), torch.tensor(1 / 9))  # and 1


def slow_koleo(x, groups):
    """Mean over the rows that have another row in their group."""
    unit = [row / row.norm() for row in x]
    logs = [
        math.log(min((unit[i] - unit[j]).norm().item() for j in group if j != i))
        for group in groups
        for i in group
        if len(group) > 1
    ]
    return -sum(logs) / len(logs)


def test_koleo_equals_a_loop_and_a_hand_made_case():
    torch.manual_seed(2)
    x = torch.randn(7, 5)
    assert koleo_loss(x).item() == pytest.approx(slow_koleo(x, [range(7)]), rel=1e-5)
    # Two unit vectors at a right angle: distance sqrt(2) for both.
    assert koleo_loss(torch.eye(2)).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)


def test_koleo_in_groups_looks_for_the_nearest_within_the_group():
    """DINOv3: groups of 16. The last row is alone in its group and does not count."""
    torch.manual_seed(3)
    x = torch.randn(7, 5)
    assert koleo_loss(x, rows=3).item() == pytest.approx(slow_koleo(x, [(0, 1, 2), (3, 4, 5), (6,)]), rel=1e-5)
    assert koleo_loss(x, rows=7) == koleo_loss(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_of_coinciding_features_is_finite(dtype):
    """dinov2 #143, #314, #492: two equal class tokens gave inf in half precision."""
    x = torch.randn(1, 8).to(dtype).repeat(4, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype):
        loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("images", [0, 1])
def test_koleo_of_one_image_is_zero(images, rows):
    x = torch.randn(images, 8, requires_grad=True)
    loss = koleo_loss(x, rows=rows)
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(images, 8))


def test_gram_equals_a_loop_over_pairs_of_patches():
    torch.manual_seed(4)
    student, teacher = torch.randn(2, 5, 6), torch.randn(2, 5, 3)
    squares = [
        (F.cosine_similarity(student[b, i], student[b, j], dim=0) - F.cosine_similarity(*teacher[b, [i, j]], dim=0))
        .square()
        .item()
        for b, i, j in itertools.product(range(2), range(5), range(5))
    ]
    assert gram_loss(student, teacher).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_gram_by_hand():
    """Orthogonal patches against equal ones: the two entries off the diagonal differ by 1. Length does not matter."""
    student, teacher = torch.eye(2)[None], torch.ones(1, 2, 2)
    assert gram_loss(student, teacher).item() == pytest.approx(0.5)
    assert gram_loss(7 * student, student) == 0


def test_gram_is_computed_in_float32_and_leaves_the_teacher_alone():
    student, teacher = (torch.randn(1, 4, 8, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = gram_loss(student, teacher)
    assert loss == gram_loss(student, teacher)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_tokens_are_resampled_over_the_grid_and_not_across_rows():
    """A plane over a grid of 8 x 12 (another value for each axis) is the same plane on 4 x 6, away from the edges."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    tokens = torch.stack([y, x], dim=-1).reshape(1, 96, 2)
    got = resample_tokens(tokens, grid=(8, 12), to=(4, 6)).reshape(4, 6, 2)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    assert torch.allclose(got[1:-1, 1:-1], 2 * torch.stack([y, x], dim=-1)[1:-1, 1:-1] + 0.5, atol=1e-5)


@pytest.mark.parametrize("name", ["koleo", "koleo in groups", "gram"])
def test_gradients_numerically(name):
    torch.manual_seed(5)
    x, teacher = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4).double()
    losses = {
        "koleo": lambda x: koleo_loss(x.flatten(0, 1)),
        "koleo in groups": lambda x: koleo_loss(x.flatten(0, 1), rows=4),
        "gram": lambda x: gram_loss(x, teacher),
    }
    assert torch.autograd.gradcheck(losses[name], (x,))
