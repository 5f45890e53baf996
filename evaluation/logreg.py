"""Logistic regression on frozen features: by scikit-learn, where DINOv2's evaluation takes cuML.

M images, D width, C classes; `c` is the inverse strength of the L2 penalty.
"""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from runtime.progress import Progress

from .classify import Reading, hold_out, need_test, read_halves
from .data import LabelledImages
from .knn import bootstrap_interval
from .models import Extractor
from .tables import Row

STRENGTHS = tuple(float(c) for c in np.logspace(-6, 5, 45))  # values of c (DINOv2's code)
ITERATIONS = 1000  # at most (DINOv2's code)
TOLERANCE = 1e-12  # on the gradient: in effect L-BFGS goes on until the loss stands still (DINOv2's code)


def judge_logreg(model: Extractor, task: LabelledImages, how: Reading) -> Row:
    """Accuracy on the test half with the `c` that is best on a held-out tenth of the train half, fitted again on all.

    Of equally good ones the `c` of smallest cross-entropy there: a tenth of a small set has many ties. Features are
    neither scaled nor centred.
    """
    need_test(task, "logreg")
    halves = read_halves(model, task, how)
    assert halves.test is not None
    train, labels = halves.train.astype(np.float64), halves.train_labels
    fitted, held = hold_out(labels, halves.classes, seed=how.seed)
    classifier = LogisticRegression(tol=TOLERANCE, max_iter=ITERATIONS, warm_start=True)  # L2, L-BFGS
    found = []
    with Progress(f"logreg {model.name}", total=len(STRENGTHS), unit="fits") as progress:
        for c in STRENGTHS:  # from strong to weak penalties: each fit starts at the last one's solution
            fit(classifier.set_params(C=c), train[fitted], labels[fitted])
            scores = classifier.predict_log_proba(train[held])  # [M, C]
            wanted = np.searchsorted(classifier.classes_, labels[held])
            loss = -scores[np.arange(len(held)), wanted].mean()
            found.append({"c": c, "accuracy": float((scores.argmax(axis=1) == wanted).mean()), "loss": float(loss)})
            progress.advance(1)
    best = max(found, key=lambda entry: (entry["accuracy"], -entry["loss"]))["c"]
    final = fit(LogisticRegression(C=best, tol=TOLERANCE, max_iter=ITERATIONS), train, labels)
    correct = np.equal(final.predict(halves.test.astype(np.float64)), halves.test_labels)
    low, high = bootstrap_interval(correct, seed=how.seed)
    settings = {"c": best, "converged": bool(final.n_iter_.max() < ITERATIONS)}
    return {
        **halves.facts,
        "logreg": {"accuracy": float(correct.mean()), "low": low, "high": high, **settings},
        "held_out": found,
    }


def fit(classifier: LogisticRegression, x: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """The classifier, fitted to x float64 [M, D] and labels [M]; its warnings left out, for rows say `converged`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(x, labels)
