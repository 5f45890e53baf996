import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from evaluation.classify import evaluate_labelled
from evaluation.retrieval import average_precision, judge_retrieval, mean_interval
from evaluation.tables import accuracy_table
from runtime.errors import UserError


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_a_case_by_hand():
    """Nearest first the classes are 1, 0, 1, 0 for the query at 0 degrees: of class 0 at ranks 2 and 4."""
    gallery, labels = on_circle(10, 20, 30, 40), torch.tensor([1, 0, 1, 0])
    found = average_precision(gallery, labels, 3 * on_circle(0, 0, 50), torch.tensor([0, 1, 0]))
    assert found.tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2, (1 / 1 + 2 / 3) / 2, (1 / 1 + 2 / 3) / 2])


def test_leave_one_out_by_hand():
    """The image at 0 degrees finds classes 1, 0, 1; its own copy of rank 0 counts for nothing."""
    found = average_precision(on_circle(0, 10, 20, 45), torch.tensor([0, 1, 0, 1]), None, torch.tensor([0, 1, 0, 1]))
    # 0: 1 0 1 | 10 (ties 0 and 20, gallery's order): 0 0 1 | 20: 1 0 1 | 45: 0 1 0
    assert found.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 2])


def test_equals_scikit_learn_whatever_the_block():
    draw = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(40, 8, generator=draw), torch.randn(15, 8, generator=draw)
    labels, wanted = torch.arange(40) % 4, torch.arange(15) % 4
    cosines = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
    expected = [average_precision_score(labels == wanted[i], cosines[i]) for i in range(15)]
    for products in (2**24, 40 * 4, 1):
        found = average_precision(gallery, labels, queries, wanted, products=products)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    whole = average_precision(gallery, labels, None, labels)
    assert torch.equal(whole, average_precision(gallery, labels, None, labels, products=40 * 7))
    others = torch.arange(40) != 3
    alone = average_precision(gallery[others], labels[others], gallery[3:4], labels[3:4])
    assert whole[3].item() == pytest.approx(alone.item())


def test_interval_covers_the_mean_and_narrows():
    values = np.random.default_rng(0).random(400)
    low, high = mean_interval(values, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert mean_interval(values, seed=0) == (low, high)


def test_queries_and_gallery_or_leave_one_out(colours: Path, tmp_path: Path):
    out = tmp_path / "retrieval.json"
    (row,) = rows = evaluate_labelled(["pixels"], str(colours), out, judge_retrieval)
    assert json.loads(out.read_text()) == rows
    assert (row["num_train"], row["num_test"], row["leave_one_out"]) == (8, 6, False)
    assert row["by_class"] == {"blue": 1.0, "red": 1.0}  # red and blue differ in colour
    assert (row["retrieval"]["map"], row["retrieval"]["class_mean"]) == (1.0, 1.0)
    (alone,) = evaluate_labelled(["pixels"], str(colours / "train"), None, judge_retrieval)
    assert (alone["leave_one_out"], alone["num_test"], alone["retrieval"]["map"]) == (True, 8, 1.0)
    table = accuracy_table([row], "retrieval", ("class_mean",))
    assert "8 train images, 6 test, 2 classes" in table
    assert "100.0 [100.0, 100.0]" in table


def test_the_mean_is_over_queries_and_the_class_mean_over_classes(monkeypatch, colours: Path):
    (colours / "test" / "red" / "4.png").unlink()
    scores = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.8])  # three blue, two red
    monkeypatch.setattr("evaluation.retrieval.average_precision", lambda *_, **__: scores.double())
    (row,) = evaluate_labelled(["pixels"], str(colours), None, judge_retrieval)
    assert row["by_class"] == pytest.approx({"blue": 0.5, "red": 0.9})
    assert row["retrieval"]["map"] == pytest.approx(0.66)
    assert row["retrieval"]["class_mean"] == pytest.approx(0.7)


def test_a_class_that_one_image_is_left_of(colours: Path):
    for i in (1, 2, 3):
        (colours / "train" / "red" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"class red of .* has 1 train images that decode; expected 2 or more"):
        evaluate_labelled(["pixels"], str(colours / "train"), None, judge_retrieval)
