"""`troodon evaluate`: measures of models, one kind each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EXIT_DONE

if TYPE_CHECKING:
    from runtime.signals import StopRequest

MODELS = "export folder, random:FOLDER (same shape, fresh weights), pixels (colour thumbnail) or timm:NAME"
HALVES = "DIR/{train,test}/CLASS/*"
EITHER = HALVES + " or DIR/CLASS/* (leave-one-out)"
EXPORT = "runs/mine/pretrain/exports/step-00000300"


def add_evaluate(verbs: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """The verb and its kinds. add: `verbs.add`."""
    group = add(verbs, "evaluate", None, "measure models", "troodon evaluate knn --help")
    kinds = group.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(
        name: str, function: Callable[..., int], what: str, *, data: str = EITHER, where: str = "/my/labelled"
    ) -> argparse.ArgumentParser:
        example = f"troodon evaluate {name} {EXPORT} pixels --data {where} --json {name}.json"
        verb = add(kinds, name, function, what, example, needs_torch=True)
        verb.add_argument("models", nargs="+", metavar="MODEL", help=MODELS)
        verb.add_argument("--data", required=True, metavar="DIR", help=data)
        verb.add_argument("--json", metavar="OUT", help="also write the rows here, and keep the features beside it")
        verb.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        verb.add_argument("--workers", type=int, default=2, help="processes that decode (2)")
        verb.add_argument("--seed", type=int, default=0, help="of intervals, of what is drawn, of fresh weights (0)")
        return verb

    kind("knn", knn, "k-NN accuracy on a labelled folder, with its interval")
    verb = kind("linear", linear, "accuracy of the best of a grid of linear classifiers", data=HALVES)
    verb.add_argument("--steps", type=int, default=12_500, help="of SGD, for all classifiers together (12500)")
    kind("logreg", logreg, "accuracy of a logistic regression (scikit-learn)", data=HALVES)
    kind("retrieval", retrieval, "mean average precision: test images search the train images for their class")
    kind(
        "labelfree",
        labelfree,
        "scores that need no labels: rank, spectrum and uniformity of the features",
        data="images or shards",
        where="/my/images",
    )


def knn(args: argparse.Namespace, _: StopRequest) -> int:
    from evaluation.run import evaluate_knn
    from evaluation.tables import knn_table

    print(knn_table(evaluate_knn(args.models, args.data, _json_path(args), **_settings(args))))
    return EXIT_DONE


def linear(args: argparse.Namespace, _: StopRequest) -> int:
    from evaluation.linear import judge_linear

    return _judged(args, partial(judge_linear, steps=args.steps), ("blocks", "patches", "rate"))


def logreg(args: argparse.Namespace, _: StopRequest) -> int:
    from evaluation.logreg import judge_logreg

    return _judged(args, judge_logreg, ("c", "converged"))


def retrieval(args: argparse.Namespace, _: StopRequest) -> int:
    from evaluation.retrieval import judge_retrieval

    return _judged(args, judge_retrieval, ())


def labelfree(args: argparse.Namespace, _: StopRequest) -> int:
    from evaluation.run import evaluate_labelfree
    from evaluation.tables import labelfree_table

    print(labelfree_table(evaluate_labelfree(args.models, args.data, _json_path(args), **_settings(args))))
    return EXIT_DONE


def _judged(args: argparse.Namespace, judge: Any, chosen: Sequence[str]) -> int:
    """Run a protocol on a labelled folder and print its table."""
    from evaluation.classify import evaluate_labelled
    from evaluation.tables import accuracy_table

    rows = evaluate_labelled(args.models, args.data, _json_path(args), judge, **_settings(args))
    print(accuracy_table(rows, args.kind, chosen))
    return EXIT_DONE


def _json_path(args: argparse.Namespace) -> Path | None:
    return Path(args.json) if args.json else None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "workers": args.workers, "seed": args.seed}
