"""Is the curated set worth it? Pretraining on it against pretraining on as many images drawn from the raw pool.

The same model, steps and seeds for both; judged by k-NN accuracy on labelled evaluation sets. The random sets are drawn
anew for each seed from every image of the pool that decodes, duplicates and copies of evaluation images included, as
they lie in the heap. Runs alternate, so that both meet the same machine.

    python benchmarks/bench_curated_vs_random.py                                  the embedded image set
    python benchmarks/bench_curated_vs_random.py --curated runs/pack/curate --eval PACK/eval/objects80
    python benchmarks/bench_curated_vs_random.py --pool PACK/pool --seeds PACK/seeds --eval PACK/eval/objects80

Writes benchmarks/results/curated_vs_random.json. A run that was interrupted goes on when it is started again.
"""

import argparse
import dataclasses
import gzip
import io
import json
import os
import shutil
import statistics
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.items import read_bytes
from curation.manifest import read_manifest
from curation.shards import EXTENSIONS
from evaluation.run import evaluate_knn
from pretrain.config import PretrainConfig
from pretrain.data.shards import ShardSet
from pretrain.train import pretrain
from runtime.config import load
from runtime.environment import describe
from runtime.errors import UserError
from runtime.files import read_json, replacing, write_json
from runtime.progress import say
from runtime.seeding import generator
from tools.pipeline import CurateRunConfig, RunConfig, curate, resolve

EMBEDDED = {"pool": ["embedded:pool", "embedded:corrupt/files"], "seeds": ["embedded:seeds"], "eval": ["embedded:eval"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curated", type=Path, help="the folder of a finished `troodon curate`; else one is made")
    parser.add_argument("--pool", nargs="+", default=EMBEDDED["pool"], help="raw images; .tar.gz are unpacked first")
    parser.add_argument("--seeds", nargs="+", default=EMBEDDED["seeds"], help="curated examples to retrieve around")
    parser.add_argument(
        "--eval", nargs="+", default=EMBEDDED["eval"], help="labelled sets; also held apart from the pool"
    )
    parser.add_argument("--set", nargs="*", default=[], help="key=value of the curation, as in retrieval.k=16")
    parser.add_argument("--runs", type=int, default=3, help="seeds, from 0")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_curated_vs_random"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "curated_vs_random.json")
    args = parser.parse_args()
    start = time.monotonic()
    load_before = os.getloadavg()[0]
    folder = args.curated or make_curated(args.out, args.pool, args.seeds, args.eval, args.set)
    training = load(RunConfig, "quickstart").pretrain
    training = dataclasses.replace(training, train=dataclasses.replace(training.train, steps=args.steps))
    work = args.out / read_json(folder / "summary.json")["manifest_sha256"][:8]  # of this curated set and no other
    measured = compare(folder, training, args.eval, runs=args.runs, out=work)
    result = {
        "question": "pretraining on the curated shards or on as many images drawn at random from the raw pool: which "
        "model has the higher k-NN accuracy? Same model, steps and seeds.",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - start, 1),
        "load_average_before": load_before,
        **measured,
        "environment": describe(),
    }
    write_json(args.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


def make_curated(out: Path, pool: list[str], seeds: list[str], evaluation: list[str], settings: list[str]) -> Path:
    """Curate with the quickstart's settings and those given; returns the folder."""
    paths = {"source": [unpacked(path, out / "pool") for path in pool], "seeds": seeds, "guard": evaluation}
    given = [f"{group}.paths={json.dumps(entries)}" for group, entries in paths.items()]
    config = resolve(load(RunConfig, "quickstart", [*given, f"out={out}/curate", *settings]))
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(CurateRunConfig)}
    return curate(CurateRunConfig(**own))


def unpacked(path: str, folder: Path) -> str:
    """A path to curate: of a folder of .tar.gz the folder with the same tars unpacked, once."""
    packed = sorted(Path(path).glob("*.tar.gz")) if not path.startswith("embedded:") else []
    for source in packed:
        target = folder / source.name.removesuffix(".gz")
        if not target.is_file():
            with replacing(target) as temporary, gzip.open(source) as data, temporary.open("wb") as file:
                shutil.copyfileobj(data, file)
    return str(folder) if packed else path


def compare(folder: Path, training: PretrainConfig, evaluation: list[str], *, runs: int, out: Path) -> dict[str, Any]:
    """Train and judge all models; everything that the result says of them."""
    curated = folder / "shards"
    num_images = len(ShardSet.open([str(curated)]))
    models: dict[str, str] = {}
    drawn = []
    for seed in range(runs):
        random = out / f"random-{seed}"
        drawn.append(write_random(folder, num_images, seed, random / "train.tar"))
        for name, shards in (("curated", curated), ("random", random)):
            say(f"== {name}, seed {seed}")
            config = dataclasses.replace(
                training,
                out=str(out / f"{name}-{seed}-{training.train.steps}"),
                seed=seed,
                workers=min(training.workers, 2),
                data=dataclasses.replace(training.data, shards=(str(shards),)),
            )
            models[f"{name}-{seed}"] = str(pretrain(config))
    first = models["curated-0"]
    accuracy = {}
    for number, data in enumerate(evaluation):
        rows = evaluate_knn(models | {"random weights": f"random:{first}"}, data, out / f"eval-{number}" / "knn.json")
        accuracy[label(data)] = summary(rows, runs)
    manifest = read_manifest(folder)["fate"].to_pylist()
    return {
        "curated": {
            "images": num_images,
            "of": len(manifest),
            "fates": dict(sorted(Counter(manifest).items())),
            "retrieval": read_json(folder / "summary.json")["thresholds"]["retrieval"],
        },
        "random": [
            {"seed": seed, "images": num_images, "whose fate in curation is": d} for seed, d in enumerate(drawn)
        ],
        "training": {
            "arch": training.model.arch,
            "patch_size": training.model.patch_size,
            "image_size": training.crops.global_size,
            "steps": training.train.steps,
            "batch_size": training.train.batch_size,
            "times_each_image_is_seen": round(training.train.steps * training.train.batch_size / num_images, 1),
        },
        "knn": accuracy,
    }


def write_random(folder: Path, count: int, seed: int, path: Path) -> dict[str, int]:
    """Draw `count` decodable pool images of a curation as a WebDataset tar; how many of them had which fate.

    Numbered keys, because several may have the same bytes.
    """
    stages = folder / "stages"
    items, decoded = (
        pa.concat_tables([pq.read_table(part) for part in sorted((stages / name).glob("part-*.parquet"))])
        for name in ("items", "decode")
    )
    role = np.array(items["role"].to_pylist())
    there = np.flatnonzero((role == "pool") & np.array([reason is None for reason in decoded["reason"].to_pylist()]))
    if len(there) < count:
        raise UserError(f"random set: {count} images wanted, {len(there)} of the pool decode")
    rows = np.sort(generator(seed, "random set").choice(there, count, replace=False))
    columns = ["source", "key", "offset", "length"]
    places = items.select(columns).append_column("format", decoded["format"]).take(pa.array(rows)).to_pylist()
    manifest = read_manifest(folder).select(["source", "key", "fate"]).to_pylist()
    fates = {(row["source"], row["key"]): row["fate"] for row in manifest}
    if not path.is_file():
        with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
            for number, place in enumerate(places):
                data = read_bytes(place["source"], place["offset"], place["length"])
                extension = EXTENSIONS.get(place["format"], place["format"].lower())
                entry = tarfile.TarInfo(f"{number:08d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return dict(sorted(Counter(fates[place["source"], place["key"]] for place in places).items()))


def summary(rows: list[dict[str, Any]], runs: int) -> dict[str, Any]:
    """k-NN accuracies in percent by k: each seed, mean and standard deviation, and the difference seed by seed."""
    found = {row["model"]: {entry["k"]: 100 * entry["accuracy"] for entry in row["knn"]} for row in rows}
    result: dict[str, Any] = {"test_images": rows[0]["num_test"], "classes": rows[0]["num_classes"]}
    for k in found["curated-0"]:
        values = {name: [found[f"{name}-{seed}"][k] for seed in range(runs)] for name in ("curated", "random")}
        values["curated minus random"] = [a - b for a, b in zip(values["curated"], values["random"], strict=True)]
        result[f"k{k}"] = {name: spread(numbers) for name, numbers in values.items()}
        result[f"k{k}"]["random weights"] = round(found["random weights"][k], 2)
    return result


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.mean(values), 2),
        "standard_deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "each": [round(value, 2) for value in values],
    }


def label(data: str) -> str:
    """A set's name without its place."""
    return data if data.startswith("embedded:") else Path(data).name


if __name__ == "__main__":
    main()
