"""How many images a second does one core read, decode and embed?

The embedding pass of `troodon curate` (bytes read by offset and checked against the content id, decoded once with the
JPEG's own reduction where the model's input is small, resized for every model, embedded) next to the loop that one
writes with Pillow and timm: open, convert, timm's own transform, batch, model. On the images of the embedded pool and
on photographs of 1024 x 768 made from them; the timm model has random weights, which cost as much as trained ones. In
the rows "copy + ..." our pass feeds two models from one decoding and the plain loop runs once for each. "stage decode"
is the pass before: content id, verdict, hash of all pixels, perceptual hashes, thumbnail.

    python benchmarks/bench_embed.py [--small 96] [--large 32] [--repeats 3]

Rates are per second of processor time of one process on one thread, medians of interleaved repeats. Writes
benchmarks/results/embed.json.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from curation.backbone import Embedder, load_embedder
from curation.config import DecodeConfig
from curation.decoding import THUMB
from curation.decoding import describe as decode_one
from curation.hashes import content_id
from curation.pixels import PixelUnit, load_pixels
from runtime.environment import describe
from runtime.files import locate, write_json
from runtime.tars import scan_tar

MODELS = ("vit_tiny_patch16_224",)  # of timm, at its own 224 pixels
BATCH = 32
LARGE = (1024, 768)


@dataclass(frozen=True)
class Contestant:
    """One way through all images."""

    name: str
    ours: Callable[[], np.ndarray]
    plain: Callable[[], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=96, help="images of the pool")
    parser.add_argument("--large", type=int, default=32, help="images of 1024 x 768")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        embedders = {"builtin:copy": embedder("builtin:copy", Path(folder))}
        for name in MODELS:
            path = Path(folder) / f"{name}.pth"
            torch.save(timm.create_model(name, num_classes=0).state_dict(), path)
            embedders[name] = embedder(f"timm:{name}@{path}", Path(folder))
        for kind, files in {
            "pool": pool_images(Path(folder) / "small", args.small),
            "1024x768": large_images(Path(folder) / "large", args.large),
        }.items():
            results[kind] = {"images": len(files), "bytes": sum(file.stat().st_size for file in files)}
            results[kind]["rates"] = measure(files, embedders, args.repeats)
            results[kind]["stage decode"] = measure_stage(files, args.repeats)
            print(kind, results[kind], flush=True)
    report = {
        "question": "images per second of one core through the embedding pass, beside a plain timm and Pillow loop",
        "date": time.strftime("%Y-%m-%d"),
        "unit": "images per second of processor time of one process on one thread, median of interleaved repeats",
        "repeats": args.repeats,
        "batch": BATCH,
        "load_average_before": load,
        "results": results,
        "environment": describe(),
    }
    write_json(Path(__file__).parent / "results" / "embed.json", report)


def embedder(model: str, out: Path) -> Embedder:
    return load_embedder(model, None, out, torch.device("cpu"), key="embed.copy.model")


def pool_images(folder: Path, number: int) -> list[Path]:
    """Images of the embedded pool as files."""
    folder.mkdir()
    files = []
    for tar in sorted(locate("embedded:pool").glob("*.tar")):
        data = tar.read_bytes()
        for member in scan_tar(tar)[0]:
            if member.extension == "jpg" and len(files) < number:
                files.append(folder / f"{member.key}.jpg")
                files[-1].write_bytes(data[member.offset : member.offset + member.length])
    return files


def large_images(folder: Path, number: int) -> list[Path]:
    """The first images of the pool at 1024 x 768, as JPEG of quality 85."""
    files = pool_images(folder, number)
    for file in files:
        buffer = io.BytesIO()
        with Image.open(file) as image:
            image.convert("RGB").resize(LARGE, Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=85)
        file.write_bytes(buffer.getvalue())
    return files


def measure(files: Sequence[Path], embedders: dict[str, Embedder], repeats: int) -> dict[str, Any]:
    """Rates of both ways for every model, and for the copy model with another."""
    groups = [("decode alone", []), *((name, [model]) for name, model in embedders.items())]
    groups.append((f"copy + {MODELS[-1]}", [embedders["builtin:copy"], embedders[MODELS[-1]]]))
    contestants = [
        Contestant(
            name,
            lambda models=models: ours(files, models, embedders["builtin:copy"].size),
            lambda models=models: plain(files, models, embedders["builtin:copy"].size),
        )
        for name, models in groups
    ]
    seconds: dict[tuple[str, str], list[float]] = {}
    for contestant in contestants:  # once unmeasured: allocations, file cache
        contestant.ours()
    for _ in range(repeats):
        for contestant in contestants:
            for way in ("ours", "plain"):
                start = time.process_time()
                getattr(contestant, way)()
                seconds.setdefault((contestant.name, way), []).append(time.process_time() - start)
    rates = {}
    for name, _ in groups:
        own, other = (len(files) / statistics.median(seconds[name, way]) for way in ("ours", "plain"))
        rates[name] = {"troodon": round(own, 1), "plain": round(other, 1), "factor": round(own / other, 2)}
    return rates


def measure_stage(files: Sequence[Path], repeats: int) -> float:
    """Images per second of the decode stage."""
    thumb = np.empty((THUMB, THUMB), dtype=np.uint8)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for file in files:
            decode_one({"source": str(file), "offset": 0, "length": file.stat().st_size}, DecodeConfig(), thumb)
        seconds.append(time.process_time() - start)
    return round(len(files) / statistics.median(seconds), 1)


def ours(files: Sequence[Path], models: Sequence[Embedder], size: int) -> np.ndarray:
    """What stage embed does with its images; without models they are decoded to `size` alone."""
    sizes = tuple(sorted({model.size for model in models})) or (size,)
    vectors = []
    for batch in batches(files):
        pixels = load_pixels(unit(batch, sizes))
        vectors += [model(torch.from_numpy(pixels[model.size])).numpy().astype(np.float16) for model in models]
    return np.concatenate([v.ravel() for v in vectors]) if vectors else np.empty(0)


def unit(batch: Sequence[Path], sizes: tuple[int, ...]) -> PixelUnit:
    return PixelUnit(
        part=0,
        start=0,
        places=tuple((str(file), 0, file.stat().st_size) for file in batch),
        ids=tuple(content(file) for file in batch),
        sizes=sizes,
        max_pixels=100_000_000,
    )


IDS: dict[Path, str] = {}  # found by the stage before, so not counted here


def content(file: Path) -> str:
    if file not in IDS:
        IDS[file] = content_id(file.read_bytes())
    return IDS[file]


def plain(files: Sequence[Path], models: Sequence[Embedder], size: int) -> np.ndarray:
    """Pillow and timm, once for each model."""
    vectors = []
    for model in models or [None]:
        transform: Any = None
        if model is not None and model.size != size:
            transform = create_transform(**resolve_model_data_config(model.model), is_training=False)
        for batch in batches(files):
            images = []
            for file in batch:
                with Image.open(file) as opened:
                    image = opened.convert("RGB")
                if transform is not None:
                    images.append(transform(image))
                else:  # the copy network has no timm config: resize and scale, as small as it can be
                    small = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
                    images.append(torch.from_numpy(small).permute(2, 0, 1).float() / 255)
            if model is not None:
                pixels = torch.stack(images)
                if transform is None:
                    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
                    pixels = (pixels - mean) / std
                with torch.inference_mode():
                    vectors.append(torch.nn.functional.normalize(model.model(pixels), dim=1).numpy())
    return np.concatenate([v.ravel() for v in vectors]) if vectors else np.empty(0)


def batches(files: Sequence[Path]) -> list[Sequence[Path]]:
    return [files[start : start + BATCH] for start in range(0, len(files), BATCH)]


if __name__ == "__main__":
    main()
