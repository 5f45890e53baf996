"""Does a training that is killed at random points go on as if nothing had happened, to the last bit?

Trains a tiny ViT on the embedded images with everything random switched on (stochastic depth, RoPE jitter, masks,
augmentation, loader processes) and accumulation, once without a break, and once with SIGKILL to the whole process group
as soon as the run has logged a randomly drawn step. Compares `metrics.jsonl` line by line, byte for byte, without the
columns that the clock fills (`runtime.metrics.CLOCK`), and the bytes of the exported weights. CPU, one process.

    python benchmarks/bench_resume.py [--kills 5] [--seed 0]

Writes benchmarks/results/resume.json; exits 1 on any difference.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from runtime.environment import describe
from runtime.files import sha256, write_json
from runtime.metrics import CLOCK

STEPS = 40
CONFIG = {
    "device": "cpu",
    "workers": 1,
    "data": {"shards": ["embedded:pool"]},
    "model": {
        "arch": "vit_nano", "patch_size": 8, "init": "fan_in", "layerscale": 1.0, "num_registers": 2,
        "position": "rope", "rope_jitter": 1.5, "drop_path": 0.3,
    },
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "heads": {"num_prototypes": 64, "hidden": 64, "bottleneck": 32},
    "optim": {"lr": 2.0e-3, "reference_batch": 16},
    "train": {"steps": STEPS, "batch_size": 16, "accumulate": 2, "precision": "float32", "log_every": 1},
    "checkpoint": {"every": 3, "keep": 2},
}  # fmt: skip


# The second: targets with a state of their own, another precision, more workers, a second stage with a Gram teacher.
VARIANTS = {
    "plain": [],
    "bfloat16, centring, two workers, Gram stage": [
        "train.precision=bfloat16", "loss.targets=center", "workers=2", "gram.keep_at=0.2", f"train.steps={STEPS - 15}",
        "stages=[{name: gram, steps: 15, set: {loss.gram: 1.0}}]",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    result = {
        "question": "does a training killed at random points go on as if nothing had happened?",
        "config": CONFIG,
        "left_out": sorted(CLOCK),
        "runs": {name: compare(overrides, args.kills, draw) for name, overrides in VARIANTS.items()},
        "environment": describe(),
    }
    write_json(Path(__file__).parent / "results" / "resume.json", result)
    print(json.dumps(result["runs"], indent=1))
    sys.exit(0 if all(run["equal"] for run in result["runs"].values()) else 1)


def compare(overrides: list[str], num_kills: int, draw: random.Random) -> dict[str, Any]:
    """One run without a break against one with kills."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        run(whole, overrides)
        kills = [
            kill_at(killed, step, delay=draw.random() * 0.3, overrides=overrides)
            for step in sorted(draw.sample(range(1, STEPS), num_kills))
        ]
        run(killed, overrides)
        a, b = steady_lines(whole), steady_lines(killed)
        different = [i + 1 for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]]
        exports = {str(path.relative_to(whole)) for path in whole.rglob("model.safetensors")}
        same = [name for name in sorted(exports) if sha256(whole / name) == sha256(killed / name)]
    return {
        "overrides": overrides,
        "kills": kills,
        "lines": len(a),
        "bytes": sum(map(len, a)),
        "different_lines": different,
        "equal_exports": same,
        "equal": len(a) == STEPS and not different and exports == set(same) != set(),
    }


def command(out: Path, overrides: list[str]) -> list[str]:
    """`troodon pretrain` of the config above into `out`."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(CONFIG))
    return [sys.executable, "-m", "tools.cli", "pretrain", str(config), f"out={out}", *overrides]


def run(out: Path, overrides: list[str]) -> None:
    """Train to the end, or from where `out` stands."""
    subprocess.run(command(out, overrides), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_at(out: Path, step: int, *, delay: float, overrides: list[str]) -> dict[str, float | int | str]:
    """Start, and kill all processes `delay` seconds after the row of `step` is there; returns where that was."""
    step = max(step, len(steady_lines(out)) + 1)  # an earlier kill may have come late; this one comes after new steps
    process = subprocess.Popen(
        command(out, overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(steady_lines(out)) < step:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with status {process.returncode} before step {step}")
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = sorted(path.name for path in (out / "checkpoints").glob("*"))
    return {"asked_step": step, "delay": round(delay, 3), "logged": len(steady_lines(out)), "saved": " ".join(saved)}


def steady_lines(out: Path) -> list[bytes]:
    """The whole lines of `metrics.jsonl` as they are, but for the columns of `CLOCK`."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    clock = re.compile(rb', "(?:%s)": [^,}]+' % "|".join(sorted(CLOCK)).encode())
    return [clock.sub(b"", line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


if __name__ == "__main__":
    main()
