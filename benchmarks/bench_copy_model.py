"""How many of the planted copies does an embedder put among the closest pairs, and at what cost? With a pack of truth.

    python benchmarks/bench_copy_model.py PACK [--models builtin:copy torchscript:FILE ...] [--result copy_model]

All pairs of the pool are ranked by cosine. A threshold that leaves P pairs per image above it costs P comparisons of
pixels per image; the recall of planted pairs (by level of the harder copy) and of planted leaks at that threshold is
what verification can find at most. The baseline ranks by perceptual hash. Pairs of pictures that the shipped network
was trained on (the pack's open shards) and others are given apart.
"""

import argparse
import csv
import datetime
import io
import itertools
import json
import tarfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curation.backbone import load_embedder
from curation.hashes import perceptual_hashes
from runtime.environment import describe

PAIRS_PER_IMAGE = (0.3, 1, 3, 5, 10, 20)
BITS = (4, 8, 12, 16, 18, 20)
BINS = 4000  # of the histogram of cosines, from -1 to 1
CPU = torch.device("cpu")


def read_pool(pack: Path) -> tuple[dict[str, Image.Image], set[str]]:
    """Pictures of the pool by key, and the keys of those in shards whose name does not say that they are open."""
    pictures, closed = {}, set()
    for shard in sorted((pack / "pool").glob("*.tar*")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    key = member.name.removesuffix(".jpg")
                    pictures[key] = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # pyright: ignore
                    if shard.name.startswith("unstated"):
                        closed.add(key)
    return pictures, closed


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def embed(model: str, size: int | None, pictures: list[Image.Image]) -> tuple[np.ndarray, float]:
    """Unit vectors [N, D], and images per second of core time in the network alone."""
    embedder = load_embedder(model, size, Path(), CPU, key="--models")
    side, vectors, seconds = embedder.size, [], 0.0
    for start in range(0, len(pictures), 64):
        batch = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures[start : start + 64]]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in batch])).permute(0, 3, 1, 2)
        before = time.process_time()
        vectors.append(embedder(pixels.contiguous()).numpy())
        seconds += time.process_time() - before
    return np.concatenate(vectors), len(pictures) / seconds


def thresholds(vectors: np.ndarray) -> list[float]:
    """For each of PAIRS_PER_IMAGE the cosine above which so many pairs per image lie, to 1/2000."""
    values, counts = torch.from_numpy(vectors), torch.zeros(BINS)
    for start in range(0, len(values), 1000):
        cosine = (values[start : start + 1000] @ values.T).clamp(-1, 1)
        counts += torch.histc(cosine, BINS, -1, 1)
    above = counts.double().flip(0).cumsum(0).flip(0).numpy()
    pairs = (above / len(vectors) - 1) / 2  # each pair comes twice, each image once with itself
    return [float(np.argmax(pairs <= wanted)) * 2 / BINS - 1 for wanted in PAIRS_PER_IMAGE]


def recalls(hit: np.ndarray, level: np.ndarray, closed: np.ndarray) -> dict[str, float]:
    """Shares of pairs found: all, by level, and of pictures in and not in the open shards."""
    groups = {f"level {value}": level == value for value in np.unique(level)}
    groups |= {"open": ~closed, "not open": closed}
    found = {name: float(hit[group].mean()) for name, group in groups.items() if group.any()}
    return {name: round(share, 4) for name, share in ({"all": float(hit.mean())} | found).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--models", nargs="+", default=["builtin:copy"], help="as embed.copy.model")
    parser.add_argument("--size", type=int, help="as embed.copy.size (the model's own)")
    parser.add_argument("--result", metavar="NAME", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures, closed_keys = read_pool(args.pack)
    row = {key: index for index, key in enumerate(pictures)}
    groups = defaultdict(list)
    for entry in read_csv(args.pack / "truth" / "duplicates.csv"):
        groups[entry["group"]].append(entry)
    planted = [two for members in groups.values() for two in itertools.combinations(members, 2)]
    a, b = (np.array([row[two[side]["key"]] for two in planted]) for side in (0, 1))
    level = np.array([max(int(entry["level"] or 0) for entry in two) for two in planted])
    closed = np.array([two[0]["key"] in closed_keys for two in planted])
    leaks = [entry for entry in read_csv(args.pack / "truth" / "leaks.csv") if entry["key"] in row]
    leaked = [Image.open(args.pack / entry["eval_file"]).convert("RGB") for entry in leaks]
    leak_rows = np.array([row[entry["key"]] for entry in leaks])

    result: dict[str, Any] = {
        "question": "how many of the planted copies lie among the closest pairs",
        "date": datetime.date.today().isoformat(),
        "pack": args.pack.name,
        "images": len(pictures),
        "planted_pairs": len(planted),
        "models": {},
    }
    for model in args.models:
        vectors, speed = embed(model, args.size, list(pictures.values()))
        of_leaked, _ = embed(model, args.size, leaked)
        cosine, leak_cosine = (vectors[a] * vectors[b]).sum(1), (vectors[leak_rows] * of_leaked).sum(1)
        result["models"][model] = {"dim": vectors.shape[1], "images_per_core_second": round(speed)} | {
            f"{wanted} pairs per image": {"cosine": round(threshold, 4)}
            | recalls(cosine >= threshold, level, closed)
            | {"leaks": round(float((leak_cosine >= threshold).mean()), 4)}
            for wanted, threshold in zip(PAIRS_PER_IMAGE, thresholds(vectors), strict=True)
        }
    hashes = np.array([perceptual_hashes(picture) for picture in pictures.values()], dtype=np.uint64)
    counts = np.zeros(65, dtype=np.int64)
    for start in range(0, len(hashes), 500):
        counts += np.bincount(_bits(hashes[start : start + 500, None], hashes[None, :, 0]).ravel(), minlength=65)
    distance = _bits(hashes[a], hashes[b, 0])
    result["perceptual hash"] = {
        f"{bits} bits": {"pairs_per_image": round(float(counts[: bits + 1].sum() / len(hashes) - 1) / 2, 3)}
        | recalls(distance <= bits, level, closed)
        for bits in BITS
    }
    result["hardware"] = describe()
    print(json.dumps(result, indent=1))
    if args.result:
        path = Path(__file__).parent / "results" / f"{args.result}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def _bits(both: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Bits between hashes, the smaller of plain and mirrored; uint64 [..., 2] and [...]."""
    return np.minimum(*(np.bitwise_count(both[..., column] ^ plain) for column in (0, 1)))


if __name__ == "__main__":
    main()
