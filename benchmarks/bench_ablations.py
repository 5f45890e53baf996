"""What does each part of the objective do at this scale? The same short training without KoLeo, iBOT, Sinkhorn.

Same steps, images, crops and start weights for all; each run is one thread on a core of its own, as many at a time as
cores are given. Judged as in bench_learning.py, with the signs of health of the last step beside it.

    python benchmarks/bench_ablations.py --shards runs/curated/shards --eval EVAL/a EVAL/b

Writes benchmarks/results/ablations.json. Runs that are done already are not repeated.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from learning_runs import baselines, judge, last_row, our_curve, ours, together  # beside this file

from pretrain.data.shards import ShardSet
from runtime.environment import describe
from runtime.files import write_json

ARMS = {
    "full": [],
    "without KoLeo": ["loss.koleo=0"],
    "without iBOT": ["loss.ibot=0"],
    "softmax centring instead of Sinkhorn": ["loss.targets=center"],
}
HEALTH = (
    "dino",
    "ibot",
    "koleo",
    "teacher_entropy/cls",
    "kl/cls",
    "kl/patches",
    "usage/cls",
    "rank",
    "cls_patch_cosine",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="images to train on, of `troodon curate`")
    parser.add_argument("--eval", nargs="+", required=True, help="labelled folders")
    parser.add_argument("--config", default="tiny", help="preset or YAML")
    parser.add_argument("--set", nargs="*", default=[], help="key=value of every run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_ablations"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "ablations.json")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    jobs = [(name, seed) for seed in range(args.seeds) for name in ARMS]
    for start in range(0, len(jobs), len(args.cores)):
        commands = []
        for core, (name, seed) in zip(args.cores, jobs[start : start + len(args.cores)], strict=False):
            settings = [*args.set, *ARMS[name], f"data.shards=[{args.shards}]", f"seed={seed}"]
            out = folder(args.out, name, seed)
            if not list((out / "exports").glob("*/card.json")):
                commands.append(ours(name, args.config, settings, out=out, steps=args.steps, points=1, core=core))
        together(commands)
    exports = {job: our_curve(folder(args.out, *job))[-1][2] for job in jobs}
    result = {
        "question": "what do KoLeo, iBOT and Sinkhorn do to a short training? Same steps, images and start.",
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": load_before,
        "config": [args.config, *args.set],
        "steps": args.steps,
        "images": len(ShardSet.open([str(args.shards)])),
        "knn": "percent, with the 95 % bootstrap interval over test images",
        "random weights": judge(next(iter(baselines(exports[jobs[0]], seeds=1).values())), args.eval),
        "runs": [row(name, seed, folder(args.out, name, seed), exports[name, seed], args.eval) for name, seed in jobs],
        "environment": describe(),
    }
    write_json(args.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(' ', '-')}-{seed}"


def row(name: str, seed: int, out: Path, export: Path, evaluation: list[str]) -> dict[str, Any]:
    last = last_row(out)
    return {
        "arm": name,
        "settings": ARMS[name],
        "seed": seed,
        "knn": judge(export, evaluation),
        "last step": {key: round(last[key], 3) for key in HEALTH if key in last},
    }


if __name__ == "__main__":
    main()
