"""Features of a set of images, computed once and kept by the hashes of model and data."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from imaging.decode import Rejected
from runtime.errors import UserError
from runtime.files import replacing
from runtime.progress import Progress, say

from .data import Images, centre_crop, normalise
from .models import Extractor


@dataclass(frozen=True)
class Features:
    """One vector per image that decodes."""

    values: np.ndarray  # [M, D] float32
    rows: np.ndarray  # [M] int64: which image of the set each vector belongs to, ascending
    skipped: tuple[str, ...]  # "name: reason" of the others


def extract(
    extractor: Extractor, images: Images, *, cache: Path | None = None, batch_size: int = 256, workers: int = 2
) -> Features:
    """Features of all images that decode; taken from the folder `cache` when they were computed before.

    workers: threads that decode. Raises UserError when no image decodes.
    """
    path = cache / f"{extractor.hash}-{images.fingerprint}.safetensors" if cache else None
    if path is not None and path.is_file():
        features = _read(path)
    else:
        features = _compute(extractor, images, batch_size, workers)
        if path is not None:
            _write(path, features)
    if features.skipped:
        say(f"skipped {len(features.skipped)} of {len(images)} images; first: {features.skipped[0]}")
    return features


def _compute(extractor: Extractor, images: Images, batch_size: int, workers: int) -> Features:
    values, rows, skipped = [], [], []
    with Progress(f"features {extractor.name}", total=len(images), unit="images") as progress:
        for batch in decoded(extractor, images, batch_size=batch_size, workers=workers):
            good = [(row, view) for row, view in batch if isinstance(view, Tensor)]
            skipped += [view for _, view in batch if isinstance(view, str)]
            if good:
                rows += [row for row, _ in good]
                values.append(extractor(torch.stack([view for _, view in good])).numpy())
            progress.advance(len(batch))
    if not rows:
        raise UserError(f"images: none of {len(images)} decodes; first: {skipped[0] if skipped else 'there is none'}")
    if not all(np.isfinite(batch).all() for batch in values):
        raise RuntimeError(f"{extractor.name}: features are not finite; the model's weights or its training diverged")
    return Features(np.concatenate(values), np.array(rows), tuple(skipped))


def decoded(
    extractor: Extractor, images: Images, *, batch_size: int, workers: int
) -> Iterator[list[tuple[int, Tensor | str]]]:
    """Batches of (index, view [3, H, W] or "name: reason"), in order, decoded one batch ahead of the model.

    This thread reads, because open shards are not shared between threads; the others decode.
    """

    def view(index: int, name: str, data: bytes) -> tuple[int, Tensor | str]:
        try:
            image = centre_crop(data, size=extractor.size, coverage=extractor.coverage)
        except Rejected as error:
            return index, f"{name}: {error}"
        return index, normalise(image, mean=extractor.mean, std=extractor.std)

    ahead: deque[list[Future[tuple[int, Tensor | str]]]] = deque()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, len(images), batch_size):
            ahead.append(
                [pool.submit(view, i, *images.read(i)) for i in range(start, min(start + batch_size, len(images)))]
            )
            if len(ahead) == 2:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]


def _read(path: Path) -> Features:
    with safe_open(path, framework="numpy") as file:
        skipped = tuple(json.loads(file.metadata()["skipped"]))
        return Features(file.get_tensor("values"), file.get_tensor("rows"), skipped)


def _write(path: Path, features: Features) -> None:
    with replacing(path) as temporary:
        tensors = {"values": features.values, "rows": features.rows}
        save_file(tensors, temporary, metadata={"skipped": json.dumps(features.skipped)})
