"""How long does the quickstart take here, with how much memory and disk, and what comes out?

Runs `troodon quickstart` in a fresh folder (packages are in already) and reads its files.

    python benchmarks/bench_quickstart.py [--out runs/bench_quickstart]

Writes benchmarks/results/quickstart.json.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from curation_truth import score  # beside this file

from runtime.environment import describe
from runtime.files import locate, read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_quickstart"))
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "tools.cli", "quickstart", "--out", str(out)], check=True)
    seconds = time.monotonic() - start
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "tools.cli", "quickstart", "--out", str(out)], check=True)
    result = {
        "question": "how long does the quickstart take, with how much memory and disk, and what comes out?",
        "seconds": round(seconds, 1),
        "seconds_when_done_already": round(time.monotonic() - start, 1),
        "seconds_of_stages": read_json(out / "times.json"),
        "peak_memory_of_one_process_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
        "run_folder_mb": size_mb(out),
        "environment_mb": size_mb(Path(sys.prefix)),
        "funnel": read_json(out / "curate" / "summary.json")["funnel"],
        "truth": score(locate("embedded:."), out / "curate" / "manifest.parquet"),
        "knn": [
            {"model": row["model"], **{f"k{k['k']}": [k["accuracy"], k["low"], k["high"]] for k in row["knn"]}}
            for row in read_json(out / "evaluate" / "knn.json")
        ],
        "environment": describe(),
    }
    write_json(Path(__file__).parent / "results" / "quickstart.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


def size_mb(folder: Path) -> float:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6, 1)


if __name__ == "__main__":
    main()
