"""Each sign on tensors whose answer is known, one process against two, and in a real tiny run."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.health import cls_patch_cosine, ema_distance, rankme, status_note, target_health


def numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all(value.shape == () for value in values.values())
    return {name: float(value) for name, value in values.items()}


def health_of(targets: torch.Tensor, student: torch.Tensor, **kwargs) -> dict[str, float]:
    """By hand from probabilities [M, K]."""
    loss = -(targets * student.log()).sum(-1).mean()
    entropy = torch.special.entr(targets).sum(-1).mean()
    return numbers(target_health("cls", loss=loss, entropy=entropy, mass=targets.mean(0), **kwargs))


def test_targets_that_say_nothing():
    uniform = torch.full((5, 8), 1 / 8)
    found = health_of(uniform, uniform)
    assert found == {
        "teacher_entropy/cls": pytest.approx(math.log(8)),
        "mean_entropy/cls": pytest.approx(math.log(8)),
        "kl/cls": pytest.approx(0, abs=1e-6),
        "usage/cls": 1,
        "perplexity/cls": pytest.approx(8),
        "top_prototype/cls": pytest.approx(1 / 8),
    }


def test_one_prototype_for_all():
    one = F.one_hot(torch.zeros(5, dtype=torch.long), 8).float()
    found = health_of(one, torch.full((5, 8), 1 / 8))
    assert found["teacher_entropy/cls"] == found["mean_entropy/cls"] == 0
    assert (found["perplexity/cls"], found["top_prototype/cls"], found["usage/cls"]) == (1, 1, 1 / 8)
    assert found["kl/cls"] == pytest.approx(math.log(8))


def test_kl_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, 10, generator=generator).softmax(-1) for _ in range(2))
    expected = F.kl_div(q.log(), p, reduction="batchmean")
    assert health_of(p, q)["kl/cls"] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_over_half_of_the_crops_is_scaled_before_the_entropy_is_taken_off():
    entropy, mass = torch.tensor(1.0), torch.full((4,), 0.25)
    found = target_health("patches", loss=torch.tensor(0.75), entropy=entropy, mass=mass, share=0.5)
    assert found["kl/patches"] == pytest.approx(0.5)
    nothing = target_health("patches", loss=torch.tensor(0.0), entropy=torch.tensor(0.0), mass=0 * mass, share=0.0)
    assert all(math.isfinite(value) for value in nothing.values())
    assert nothing["kl/patches"] == 0


def slow_rank(rows: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(rows.double())
    p = singular / singular.sum()
    return math.exp(-sum(float(x * math.log(x)) for x in p if x > 1e-12))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_rank_is_that_of_the_singular_values(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert float(rankme(rows)) == pytest.approx(slow_rank(rows), rel=1e-5)


def test_rank_of_known_features():
    assert float(rankme(torch.eye(6))) == pytest.approx(6, rel=1e-5)
    assert float(rankme(torch.ones(50, 1) * torch.randn(1, 20))) == pytest.approx(1, abs=1e-3)
    assert float(rankme(torch.zeros(4, 3))) == 1
    assert 1 <= float(rankme(torch.randn(3000, 4))) <= 4


def test_rank_notices_a_collapse_that_float32_squares_would_hide():
    """Noise of 1e-5 in each of 300 other directions is nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 1, generator=generator) @ torch.ones(1, 300)
    noisy = rows + 1e-5 * torch.randn(400, 300, generator=generator)
    assert float(rankme(noisy)) == pytest.approx(slow_rank(noisy), rel=1e-3)
    assert float(rankme(noisy)) < 1.1


def test_cosine_of_class_token_and_its_own_patches():
    cls = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    patches = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    assert float(cls_patch_cosine(cls, patches, torch.tensor([0, 0, 1]))) == pytest.approx(2 / 3)
    assert float(cls_patch_cosine(cls, patches[:0], torch.tensor([], dtype=torch.long))) == 0


def test_distance_of_the_ema():
    ema, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for parameter in student.parameters():
        torch.nn.init.constant_(parameter, 2.0)
    for parameter in ema.parameters():
        torch.nn.init.constant_(parameter, 2.5)
    assert float(ema_distance(ema, student)) == pytest.approx(0.25)
    assert float(ema_distance(student, student)) == 0


def test_the_status_line_of_the_design():
    row = {
        "loss": 8.41, "dino": 5.9, "ibot": 2.1, "koleo": 0.4, "knn": 0.613, "rank": 212.3, "images_per_second": 1843.2,
        "mfu": 0.41, "wait": 0.02, "memory_gb": 31.2, "lr": 1.0,
    }  # fmt: skip
    assert status_note(row) == (
        "loss 8.410 (dino 5.9 ibot 2.1 koleo 0.4) kNN 61.3 rank 212 1843 img/s 41% MFU wait 2% 31.2 GB"
    )
    assert status_note({"loss": 1.0}) == "loss 1.000"
