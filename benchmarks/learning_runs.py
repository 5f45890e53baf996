"""Runs and judgements that bench_learning.py and bench_ablations.py share.

A run is the whole command of a user in a process of its own, on one thread of one core.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.config import EvaluateConfig
from evaluation.data import open_labelled
from evaluation.features import extract
from evaluation.knn import bootstrap_interval, knn_correct
from evaluation.models import COVERAGE, Extractor, load_model
from pretrain.checkpoint import checkpoints
from pretrain.export import MEAN, STD, convert, read_export
from runtime.errors import UserError

BINS = 8  # of a colour channel in the histogram


@dataclass(frozen=True)
class Command:
    name: str
    words: list[str]
    log: Path
    core: int


def together(commands: list[Command]) -> dict[str, dict[str, float]]:
    """Run commands at the same time, each on one thread of its core; seconds of each. UserError when one fails."""
    running = {}
    for command in commands:
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("w") as log:
            process = subprocess.Popen(
                ["taskset", "-c", str(command.core), *command.words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        running[process.pid] = (command, time.time())
    seconds = {}
    while running:
        pid, status, used = os.wait4(-1, 0)
        command, start = running.pop(pid)
        if status:
            raise UserError(f"{command.name}: failed\n  {command.log} says why")
        seconds[command.name] = {
            "started": start,
            "wall": round(time.time() - start, 1),
            "cpu": round(used.ru_utime + used.ru_stime, 1),
            "peak_memory_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        }
    return seconds


def ours(name: str, config: str, settings: list[str], *, out: Path, steps: int, points: int, core: int) -> Command:
    """`troodon pretrain` that keeps `points` checkpoints; the loader works in the training process."""
    shutil.rmtree(out, ignore_errors=True)
    every = max(1, steps // points)
    fixed = [f"train.steps={steps}", f"checkpoint.every={every}", f"checkpoint.keep={points + 1}", "workers=0"]
    words = [sys.executable, "-m", "tools.cli", "pretrain", config, *settings, *fixed, f"out={out}", "device=cpu"]
    return Command(name, words, out.with_suffix(".log"), core)


def our_curve(out: Path) -> list[tuple[int, float, Path]]:
    """Step, time of writing (seconds since the epoch) and backbone export of each checkpoint of a run."""
    points = []
    for folder in checkpoints(out):
        export = out / "backbones" / folder.name
        if not export.is_dir():
            convert(folder, export, "backbone")
        points.append((int(folder.name.removeprefix("step-")), folder.stat().st_mtime, export))
    return points


def last_row(out: Path) -> dict[str, float]:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def knn(model: Extractor, data: str, *, k: tuple[int, ...] = EvaluateConfig.k) -> dict[str, list[float]]:
    """k-NN accuracy on a labelled folder as [percent, low, high] by k, with the 95 % bootstrap interval."""
    task = open_labelled(data)
    halves = [task.train] if task.test is None else [task.train, task.test]
    found = [extract(model, half, workers=1) for half in halves]
    correct = knn_correct(
        found[0].values,
        task.train_labels[found[0].rows],
        None if task.test is None else found[-1].values,
        task.test_labels[found[-1].rows],
        k=k,
    )
    return {
        f"k{used}": [round(100 * float(v), 2) for v in (hits.mean(), *bootstrap_interval(hits))]
        for used, hits in correct.items()
    }


def judge(model: Extractor | str | Path, evaluation: list[str]) -> dict[str, dict[str, list[float]]]:
    """`knn` on each evaluation set."""
    extractor = model if isinstance(model, Extractor) else load_model(str(model))
    return {Path(data).name: knn(extractor, data) for data in evaluation}


def baselines(export: Path, *, seeds: int = 3) -> dict[str, Extractor]:
    """What any training has to beat: untrained twins of `export`, and features that nobody trained."""
    size = int(read_export(export)[1]["image_size"])
    twins = {f"random weights, seed {seed}": load_model(f"random:{export}", seed=seed) for seed in range(seeds)}
    return twins | {
        "raw pixels": plain("raw pixels", size, lambda images: (images - images.mean((1, 2, 3), True)).flatten(1)),
        "colour thumbnail": load_model("pixels", size=size),
        "colour histogram": plain("colour histogram", size, histogram),
    }


def plain(name: str, size: int, features: Callable[[Tensor], Tensor]) -> Extractor:
    """Features [B, D] of images [B, 3, size, size] in 0 to 1, cut out as for models."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    device = torch.device("cpu")
    return Extractor(
        name, size, COVERAGE, MEAN, STD, name, device, lambda images: (features(images * std + mean), None)
    )


def histogram(images: Tensor) -> Tensor:
    """Square roots of the joint colour histogram with 8 bins a channel, [B, 512]: a cosine is Bhattacharyya's."""
    bins = (images.clamp(0, 1) * (BINS - 1e-3)).long()  # [B, 3, S, S]
    cells = ((bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]).flatten(1)  # [B, S * S]
    counts = torch.zeros(len(images), BINS**3).scatter_add_(1, cells, torch.ones(cells.shape))
    return (counts / cells.shape[1]).sqrt()


def versions(python: str, names: list[str]) -> dict[str, Any]:
    """Versions of packages in another environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
