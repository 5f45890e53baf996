"""Does a run that is killed again and again end where an uninterrupted one ends?

Runs a preset once, then again in a second folder where the whole process group gets SIGKILL at random moments before
it may finish. Compares the curated manifest, every logged loss and the exported weights. CPU, same machine.

    python benchmarks/bench_kill_and_restart.py [--kills 5] [--seed 0] [key=value ...]

Writes benchmarks/results/kill_and_restart.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runtime.environment import describe
from runtime.files import sha256, write_json
from runtime.metrics import read_metrics

CLOCK = {"images_per_second", "wait", "memory_gb"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        seconds = run(whole, args.overrides)
        moments = sorted(draw.uniform(0.05, 0.9) * seconds for _ in range(args.kills))
        kills, done = [], 0.0
        for moment in moments:
            # Work done before a kill is kept but for the unfinished part, so later kills come after shorter waits.
            kills.append(kill_after(killed, args.overrides, moment - done))
            done = moment
        run(killed, args.overrides)
        result = {
            "question": "does a run killed at random moments end where an uninterrupted one ends?",
            "overrides": args.overrides,
            "uninterrupted_seconds": round(seconds, 1),
            "kills": kills,
            "equal": compare(whole, killed),
            "environment": describe(),
        }
    write_json(Path(__file__).parent / "results" / "kill_and_restart.json", result)
    print(json.dumps({key: result[key] for key in ("uninterrupted_seconds", "kills", "equal")}, indent=1))
    sys.exit(0 if all(result["equal"].values()) else 1)


def command(out: Path, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "tools.cli", "run", "quickstart", f"out={out}", "device=cpu", *overrides]


def run(out: Path, overrides: list[str]) -> float:
    """Run to the end; returns the seconds."""
    start = time.monotonic()
    subprocess.run(command(out, overrides), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def kill_after(out: Path, overrides: list[str], seconds: float) -> dict[str, str | float]:
    """Start, kill all processes after some seconds; returns the moment and what stood there."""
    process = subprocess.Popen(
        command(out, overrides), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    lines = (process.communicate()[1] or "").strip().splitlines()
    return {"after_seconds": round(seconds, 1), "last_line": lines[-1] if lines else "", "status": process.returncode}


def compare(whole: Path, killed: Path) -> dict[str, bool]:
    """Which results are the same, byte for byte (metrics: without what the clock says)."""
    equal = {}
    for name in ("curate/manifest.parquet", "curate/shards/manifest.json"):
        equal[name] = sha256(whole / name) == sha256(killed / name)
    runs = sorted(path.parent.relative_to(whole) for path in whole.rglob("metrics.jsonl"))
    assert runs
    for run_folder in runs:
        equal[f"{run_folder}/metrics.jsonl"] = rows(whole / run_folder) == rows(killed / run_folder)
    for path in sorted(whole.rglob("model.safetensors")):
        name = path.relative_to(whole)
        equal[str(name)] = sha256(path) == sha256(killed / name)
    return equal


def rows(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_metrics(folder)]


if __name__ == "__main__":
    main()
