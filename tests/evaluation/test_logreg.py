import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from evaluation import logreg
from evaluation.classify import Reading, evaluate_labelled, hold_out, read_halves
from evaluation.data import open_labelled
from evaluation.logreg import judge_logreg
from evaluation.models import load_model
from evaluation.tables import accuracy_table
from runtime.errors import UserError

FEW = (1e-3, 1e-1, 10.0)


def test_the_published_grid():
    assert len(logreg.STRENGTHS) == 45
    assert np.allclose(logreg.STRENGTHS, [10 ** (-6 + i / 4) for i in range(45)])


def test_equals_scikit_learn_called_directly(monkeypatch):
    """On the embedded set, where the choice of c matters and the answer is neither trivial nor chance."""
    monkeypatch.setattr(logreg, "STRENGTHS", FEW)
    task, model, how = open_labelled("embedded:eval"), load_model("pixels"), Reading(None, 64, 2, 3)
    row = judge_logreg(model, task, how)
    halves = read_halves(model, task, how)
    fitted, held = hold_out(halves.train_labels, halves.classes, seed=3)
    x, y = halves.train.astype(np.float64), halves.train_labels

    def direct(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, tol=1e-12, max_iter=1000)

    expected = [float(direct(c).fit(x[fitted], y[fitted]).score(x[held], y[held])) for c in FEW]
    assert [entry["accuracy"] for entry in row["held_out"]] == pytest.approx(expected)
    losses = [log_loss(y[held], direct(c).fit(x[fitted], y[fitted]).predict_proba(x[held])) for c in FEW]
    assert [entry["loss"] for entry in row["held_out"]] == pytest.approx(losses, rel=1e-3)
    assert len(set(expected)) > 1
    best = max(zip(expected, [-loss for loss in losses], FEW, strict=True))[2]
    assert row["logreg"]["c"] == best
    assert row["logreg"]["accuracy"] == direct(best).fit(x, y).score(halves.test, halves.test_labels)
    assert 0.1 < row["logreg"]["low"] < row["logreg"]["accuracy"] < row["logreg"]["high"] < 0.8


def test_rows_and_table(monkeypatch, colours: Path, tmp_path: Path):
    monkeypatch.setattr(logreg, "STRENGTHS", FEW)
    (colours / "test" / "red" / "4.png").write_bytes(b"broken")
    out = tmp_path / "logreg.json"
    rows = evaluate_labelled(["pixels"], str(colours), out, judge_logreg)
    assert json.loads(out.read_text()) == rows
    assert (rows[0]["num_train"], rows[0]["num_test"], rows[0]["skipped"]) == (8, 5, 1)
    assert rows[0]["logreg"]["accuracy"] == 1.0
    assert rows[0]["logreg"]["c"] == FEW[-1]  # all are right: the surest
    assert rows[0]["versions"]["scikit-learn"]
    assert "100.0 [100.0, 100.0]" in accuracy_table(rows, "logreg", ("c", "converged"))


def test_without_a_test_half(colours: Path):
    with pytest.raises(UserError, match=r"evaluate logreg: .* has no test half"):
        evaluate_labelled(["pixels"], str(colours / "train"), None, judge_logreg)
