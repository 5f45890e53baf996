"""How many images a second does one core write into shards?

Copies images of 4 KB and of 30 KB from two warm tars into shards, in shuffled order: as `troodon curate` does it
(planning, content ids checked again, check sums, index, manifest) and with webdataset's TarWriter, which gets the same
bytes from the same offsets and does none of that. Rates are per second of processor time of one process, user and
system; in memory (tmpfs), and on the disk of the temporary folder, where the file system's own work comes on top.

    python benchmarks/bench_shards.py [--images 10000] [--repeats 7]

Writes benchmarks/results/shards.json.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset

from curation.config import CurateConfig, ShardsConfig, SourceConfig
from curation.hashes import content_id
from curation.items import SCHEMA
from curation.rows import Rows
from curation.shards import write_shards
from curation.stage import WHOLE
from runtime.environment import describe
from runtime.files import write_json
from runtime.tars import TarWriter, group_samples, scan_tar

SIZES = {"4KB": 4096, "30KB": 30_000}  # bytes of an image
PLACES = {"memory": "/dev/shm", "disk": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    results: dict[str, dict] = {}
    for place, above in PLACES.items():
        for name, size in SIZES.items():
            with tempfile.TemporaryDirectory(dir=above) as folder:
                rates = measure(Path(folder), size, args.images, args.repeats)
            results.setdefault(place, {})[name] = rates
            print(place, name, rates, flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe(),
        "unit": "images per second of processor time of one process, median of interleaved repeats",
        "images": args.images,
        "repeats": args.repeats,
        "results": results,
    }
    write_json(Path(__file__).parent / "results" / "shards.json", report)


def measure(folder: Path, size: int, images: int, repeats: int) -> dict[str, float]:
    """Images per core-second of either writer, interleaved."""
    rows = source(folder, size, images)
    config = replace(CurateConfig(workers=0), source=SourceConfig(paths=(str(folder),)),
                     shards=ShardsConfig(max_samples=10_000))  # fmt: skip
    order = np.random.default_rng(0).permutation(images)
    writers: dict[str, Callable[[Path], object]] = {
        "troodon": lambda out: write_shards(config, rows, np.arange(images), out, share=WHOLE, stop=None),
        "webdataset": lambda out: write_with_webdataset(rows, order, out, config.shards.max_samples),
    }
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for repeat in range(repeats):
        for name, write in writers.items():
            out = folder / f"{name}-{repeat}"
            out.mkdir()
            start = time.process_time()
            write(out)
            seconds[name].append(time.process_time() - start)
            assert sum(len(scan_tar(tar)[0]) for tar in out.glob("*.tar")) == images
            for path in out.iterdir():
                path.unlink()
    rates = {name: round(images / statistics.median(times), 1) for name, times in seconds.items()}
    return rates | {"factor": round(rates["troodon"] / rates["webdataset"], 2)}


def source(folder: Path, size: int, images: int) -> Rows:
    """Two tars of random bytes, read once so that they are warm, and their rows as decoding leaves them."""
    table = []
    for number in range(2):
        path = folder / f"{number}.tar"
        with path.open("wb", buffering=0) as file:
            tar = TarWriter(file.fileno())
            for index in range(images // 2):
                _, place = tar.add(f"{number}{index:08d}.jpg", size)
                place[:] = os.urandom(size)
            tar.finish()
        data = path.read_bytes()
        for (image,) in group_samples(scan_tar(path)[0])[0]:
            item = {"role": "pool", "set": "", "source": str(path), "key": image.key, "extension": "jpg",
                    "sidecars": [], "offset": image.offset, "length": image.length, "source_name": str(number),
                    "id": content_id(data[image.offset : image.offset + image.length])}  # fmt: skip
            table.append(item)
    items = pa.Table.from_pylist(table, schema=SCHEMA)
    ids = [row["id"] for row in table]
    items = items.append_column("item_id", pa.array(ids)).append_column("format", pa.array(["JPEG"] * images))
    return Rows(
        table=items,
        role=np.array(["pool"] * images),
        good=np.ones(images, bool),
        ids=np.array(ids),
        area=np.ones(images, np.int64),
        num_bytes=np.full(images, size),
        phash=np.zeros((images, 2), np.uint64),
    )


def write_with_webdataset(rows: Rows, order: np.ndarray, out: Path, max_samples: int) -> None:
    """The same samples in the same kind of shards: read by offset from open files, given to TarWriter."""
    places = rows.table.select(["source", "offset", "length", "item_id"]).take(pa.array(order)).to_pylist()
    files = {}
    for start in range(0, len(places), max_samples):
        with webdataset.TarWriter(str(out / f"train-{start // max_samples:06d}.tar")) as tar:
            for place in places[start : start + max_samples]:
                if place["source"] not in files:
                    files[place["source"]] = open(place["source"], "rb", buffering=0)  # noqa: SIM115  closed below
                data = os.pread(files[place["source"]].fileno(), place["length"], place["offset"])
                tar.write({"__key__": place["item_id"], "jpg": data})
    for file in files.values():
        file.close()


if __name__ == "__main__":
    main()
