"""How many images a second does one core read, decode and turn into the crops of a batch?

Compares the loader's own path with the same recipe as torchvision v2 transforms, image by image, on the embedded
images (64 and 32 pixel crops) and on the same enlarged to 500x375 JPEGs (224 and 96 pixels). Rates are per second of
processor time on one thread, so that other work on the machine hardly moves them; with workers, per wall second.
Beside it: what a loader does that leaves the crops to a GPU, what a GPU then makes a second, where there is one, and
the time of a mask.

    python benchmarks/bench_augment.py [--repeats 5]

Writes benchmarks/results/augment.json.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from imaging.decode import decode
from pretrain.data.augment import MEAN, STD, views
from pretrain.data.batch import Batch
from pretrain.data.config import CropsConfig, MaskConfig
from pretrain.data.device import RawBatch, finish
from pretrain.data.loader import Steps, batches
from pretrain.data.masks import draw_masks
from pretrain.data.mixture import Mixture, Part
from pretrain.data.recipe import Recipe
from pretrain.data.shards import ShardSet
from runtime.environment import describe
from runtime.files import write_json

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    result = {
        "question": "images per second and core through the multi-crop augmentation, beside torchvision v2",
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": os.getloadavg()[0],  # the wall rates mean little on a busy machine
        "small_64_32": measure(ShardSet.open(["embedded:pool"]), CropsConfig(64, 32), 8, repeats),
        "environment": describe(),
    }
    with tempfile.TemporaryDirectory() as folder:
        enlarged = enlarge(ShardSet.open(["embedded:pool"]), Path(folder) / "large.tar", count=2 * BATCH)
        result["large_224_96"] = measure(enlarged, CropsConfig(), 16, repeats)
    write_json(Path(__file__).parent / "results" / "augment.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


def measure(shards: ShardSet, crops: CropsConfig, patch_size: int, repeats: int) -> dict[str, float]:
    """Images per second of both paths."""
    recipe = Recipe(crops, MaskConfig(), 0, BATCH, 0, 1, patch_size)
    data = Mixture((Part("", shards),))
    steps, raw = Steps(data, recipe), Steps(data, replace(recipe, on_device=True))
    transform = torchvision_recipe(crops)

    def theirs(step: int) -> None:
        for sample in range(BATCH):
            transform(decode(shards.read((step * BATCH + sample) % len(shards))[1])[0])

    rates = {"ours": rate(steps.batch, repeats), "torchvision_v2": rate(theirs, repeats)}
    rates["factor"] = round(rates["ours"] / rates["torchvision_v2"], 2)
    rates["ours_left_to_the_device"] = rate(raw.batch, repeats)
    if torch.cuda.is_available():
        rates["finished_on_cuda_per_wall_second"] = finish_rate(raw.batch(0), repeats)
    side = crops.global_size // patch_size
    count = 2 * BATCH
    per_second = rate(
        lambda step: draw_masks(
            0, step, num_crops=count, crops=np.arange(count), grid=(side, side), config=MaskConfig(1.0)
        ),
        repeats,
    )
    rates["microseconds_a_mask"] = round(1e6 / (2 * per_second), 1)
    for num_workers in (1, 2):
        loader = batches(shards, crops=crops, mask=MaskConfig(), seed=0, batch_size=BATCH, start_step=0,
                         num_steps=3 * repeats, num_workers=num_workers, patch_size=patch_size)  # fmt: skip
        next(loader)
        start = time.perf_counter()
        count = sum(len(batch.samples) for batch in loader)
        rates[f"loader_{num_workers}_workers_per_wall_second"] = round(count / (time.perf_counter() - start), 1)
    return rates


def rate(make_batch: Callable[[int], object], repeats: int) -> float:
    """Images per second of processor time, median over `repeats` batches after one to warm up."""
    make_batch(0)
    seconds = []
    for step in range(1, repeats + 1):
        start = time.process_time()
        make_batch(step)
        seconds.append(time.process_time() - start)
    return round(BATCH / statistics.median(seconds), 1)


def finish_rate(batch: Batch | RawBatch, repeats: int) -> float:
    """Images per wall second that a GPU cuts and colors, transfer included."""
    device = torch.device("cuda")
    seconds = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        finish(batch, device)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return round(BATCH / statistics.median(seconds[2:]), 1)


def torchvision_recipe(crops: CropsConfig) -> Callable[[Image.Image], list[torch.Tensor]]:
    """The same views, each a chain of torchvision's v2 transforms on a Pillow image."""
    chains = [
        v2.Compose(
            [
                v2.RandomResizedCrop(view.size, scale=view.scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=view.blur),
                v2.RandomSolarize(128, p=view.solarize),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        for view in views(crops)
    ]
    return lambda image: [chain(image) for chain in chains]


def enlarge(shards: ShardSet, path: Path, *, count: int) -> ShardSet:
    """The first images at 500x375 pixels, JPEG of quality 92, in a tar."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            key, data = shards.read(i)
            buffer = io.BytesIO()
            decode(data)[0].resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            entry = tarfile.TarInfo(f"{key}.jpg")
            entry.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(entry, buffer)
    return ShardSet.open([str(path)])


if __name__ == "__main__":
    main()
