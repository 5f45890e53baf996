"""What do other ways find of the duplicates planted in a pack with truth files, next to a finished curation of it?

    python benchmarks/bench_curation_baselines.py PACK RUN [--result NAME]

PACK is a folder with `truth/*.csv` and `pool/index.parquet`, RUN the output of `troodon curate` on its pool. The ways:

- pHash alone, at several distances (the hashes of RUN's decode stage);
- idealo/imagededup's hashes at its default distance, where it is installed (its CNN needs weights from the network);
- SemDeDup (Abbas et al. 2023, arXiv 2303.09540): k-means cells, cosine within a cell, on RUN's copy vectors;
- the cosine alone on RUN's copy vectors, connected components, as DINOv2 A.3 does with SSCD's;
- RUN itself.

Pairs of every way are joined by connected components and scored alike. Nothing here reads the truth but the score.
"""

import argparse
import datetime
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from curation_truth import score

from curation.groups import components
from curation.hashes import as_codes
from curation.items import read_bytes
from imaging.decode import decode
from runtime.environment import describe

CELL_SIZE = 300  # images in a k-means cell on average; SemDeDup's 50,000 cells of 440 M images hold 8,800 each


@dataclass(frozen=True)
class Pool:
    """The decodable pool images of a run."""

    keys: list[str]
    phash: np.ndarray  # uint64 [N]
    vectors: np.ndarray  # float32 [N, D]
    places: list[tuple[str, int, int]]


def read_pool(run: Path) -> Pool:
    def table(stage: str) -> pa.Table:
        parts = sorted((run / "stages" / stage).glob("part-*.parquet"))
        return pa.concat_tables([pq.read_table(part) for part in parts])

    items, decoded, embedded = table("items"), table("decode"), table("embed")
    good = np.array([reason is None for reason in decoded["reason"].to_pylist()])
    rows = np.flatnonzero(good & (np.array(items["role"].to_pylist()) == "pool"))
    parts = sorted((run / "stages" / "embed").glob("part-*-copy.npy"))
    values = np.concatenate([np.load(part).astype(np.float32) for part in parts])
    vectors = np.zeros((len(items), values.shape[1]), dtype=np.float32)
    vectors[embedded["row"].to_numpy()] = values
    copies = pq.read_table(run / "stages" / "exact" / "duplicates.parquet")
    for row, of in reversed(list(zip(copies["row"].to_pylist(), copies["of"].to_pylist(), strict=True))):
        vectors[row] = vectors[of]  # a copy was never embedded: it has the vector of the one that stands for it
    places = items.select(["source", "offset", "length"]).take(pa.array(rows)).to_pylist()
    return Pool(
        keys=items["key"].take(pa.array(rows)).to_pylist(),
        phash=decoded["phash"].fill_null(0).to_numpy()[rows],
        vectors=vectors[rows],
        places=[(place["source"], place["offset"], place["length"]) for place in places],
    )


def by_phash(pool: Pool, distance: int) -> np.ndarray:
    index = faiss.IndexBinaryFlat(64)
    codes = as_codes(pool.phash)
    index.add(codes)
    lims, _, found = index.range_search(codes, distance + 1)
    return np.stack([np.repeat(np.arange(len(codes)), np.diff(lims.astype(np.int64))), found], axis=1)


def by_imagededup(pool: Pool, method: str) -> np.ndarray:
    from imagededup import methods  # pyright: ignore[reportMissingImports]

    hasher = getattr(methods, method)(verbose=False)
    pixels = (np.asarray(decode(read_bytes(*place))[0]) for place in pool.places)
    encodings = {str(i): hasher.encode_image(image_array=image) for i, image in enumerate(pixels)}
    found = hasher.find_duplicates(encoding_map=encodings)  # its default distance: 10 bits of 64
    return np.array([(int(a), int(b)) for a, others in found.items() for b in others], dtype=np.int64).reshape(-1, 2)


def by_cosine(pool: Pool, threshold: float) -> np.ndarray:
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(pool.vectors), 1024):
        a, b = np.nonzero(pool.vectors[start : start + 1024] @ pool.vectors.T >= threshold)
        found.append(np.stack([a + start, b], axis=1))
    return np.concatenate(found)


def by_cells(pool: Pool, threshold: float) -> np.ndarray:
    cells = max(1, len(pool.vectors) // CELL_SIZE)
    kmeans = faiss.Kmeans(pool.vectors.shape[1], cells, niter=20, spherical=True, seed=0)
    kmeans.train(pool.vectors)
    cell = kmeans.assign(pool.vectors)[1]
    found = [np.empty((0, 2), dtype=np.int64)]
    for number in range(cells):
        members = np.flatnonzero(cell == number)
        a, b = np.nonzero(pool.vectors[members] @ pool.vectors[members].T >= threshold)
        found.append(np.stack([members[a], members[b]], axis=1))
    return np.concatenate(found)


def judge(pack: Path, pool: Pool, pairs: np.ndarray) -> dict[str, Any]:
    """The score of the groups that pairs form."""
    label = components(len(pool.keys), pairs)
    size = np.bincount(label, minlength=len(label))
    first = np.unique(label, return_index=True)[1]
    fate = np.full(len(label), "duplicate", dtype=object)
    fate[first] = "kept"
    group = [str(g) if size[g] > 1 else None for g in label]
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.parquet"
        table = pa.table({"key": pool.keys, "fate": fate.tolist(), "group_id": pa.array(group, pa.string())})
        pq.write_table(table, manifest)
        return score(pack, manifest)


def line(result: dict[str, Any]) -> dict[str, Any]:
    recall = {name: entry["share"] for name, entry in result["pair_recall_by_level"].items()}
    by_edit = {name: entry["share"] for name, entry in result["pair_recall_by_edit"].items()}
    return {
        "recall": recall,
        "precision_photos": result["pair_precision_photos"]["share"],
        "kept_apart": result["kept_apart"]["all"]["share"],
        "recall_by_edit": by_edit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--result", metavar="NAME", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    pool = read_pool(args.run)
    ways: dict[str, Callable[[], np.ndarray]] = {}
    for distance in (0, 4, 8, 12):
        ways[f"pHash, {distance} bits"] = lambda distance=distance: by_phash(pool, distance)
    if importlib.util.find_spec("imagededup"):
        import imagededup  # pyright: ignore[reportMissingImports]

        for method in ("PHash", "DHash"):
            ways[f"imagededup {imagededup.__version__} {method}, its default"] = lambda method=method: by_imagededup(
                pool, method
            )
    for threshold in (0.6, 0.7, 0.8, 0.9):
        ways[f"SemDeDup-style cells, cosine {threshold}"] = lambda threshold=threshold: by_cells(pool, threshold)
        ways[f"cosine {threshold}, components"] = lambda threshold=threshold: by_cosine(pool, threshold)
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        start = time.perf_counter()
        pairs = way()
        rows[name] = line(judge(args.pack, pool, pairs)) | {"seconds": round(time.perf_counter() - start, 1)}
        show(name, rows[name])
    rows["troodon curate"] = line(score(args.pack, args.run / "manifest.parquet"))
    show("troodon curate", rows["troodon curate"])
    if args.result:
        about = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "hardware": describe()}
        about["imagededup CNN"] = "not measured: its weights come from the network"
        path = Path(__file__).parent / "results" / f"{args.result}.json"
        path.write_text(json.dumps(about | {"ways": rows}, indent=1) + "\n")


def show(name: str, row: dict[str, Any]) -> None:
    recall = " ".join(f"{level.removeprefix('level ')} {share:.3f}" for level, share in row["recall"].items())
    precision = row["precision_photos"]
    print(f"{name:45} recall {recall}  precision {precision if precision is None else f'{precision:.3f}'}"
          f"  apart {row['kept_apart']:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
