"""Batches of images as arrays for the embedding model; runs in worker processes, so it imports no torch."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from imaging.decode import decode
from runtime.errors import UserError

from .hashes import content_id
from .items import read_bytes


@dataclass(frozen=True)
class PixelUnit:
    """One batch of images to decode for the model."""

    part: int
    start: int  # of the batch within the part
    places: tuple[tuple[str, int, int], ...]  # source, offset, length
    ids: tuple[str, ...]
    sizes: tuple[int, ...]  # pixels, of the models' inputs
    max_pixels: int


def load_pixels(unit: PixelUnit) -> dict[int, np.ndarray]:
    """Images of a unit, decoded once and resized to each size, aspect ignored; uint8 [n, 3, size, size] by size.

    Raises UserError when a file has changed since it was decoded.
    """
    pixels = {size: np.empty((len(unit.places), size, size, 3), dtype=np.uint8) for size in unit.sizes}
    for index, (place, item_id) in enumerate(zip(unit.places, unit.ids, strict=True)):
        image, _ = decode(read_again(*place, item_id=item_id), max_pixels=unit.max_pixels, min_side=max(unit.sizes))
        for size, batch in pixels.items():
            batch[index] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return {size: np.ascontiguousarray(batch.transpose(0, 3, 1, 2)) for size, batch in pixels.items()}


def read_again(source: str, offset: int, length: int, *, item_id: str) -> bytes:
    """The bytes of an image that was read before. Raises UserError when they are not the same any more."""
    try:
        data = read_bytes(source, offset, length)
    except OSError as error:
        raise UserError(f"source: {source} was readable before and is not now ({error})") from None
    if content_id(data) != item_id:
        raise UserError(f"source: {source} has changed since it was decoded\n  give another out=... to start afresh")
    return data
