"""The training pictures of a copy network: decoded once, held in memory, copies left out; and the views of one step.

N pictures, B of them in a step, M and S pixels per side of what edits start from and of the network's input.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imaging.decode import Rejected, decode
from runtime.errors import UserError
from runtime.progress import Progress, say
from runtime.seeding import generator

from ..config import CurateConfig, SourceConfig
from ..hashes import as_codes, content_id, perceptual_hashes
from ..items import list_items, read_bytes
from .config import CopyTrainConfig
from .edits import MILD, STRONG, edit, render_overlays

MARGIN = 1.5  # M / S: a crop of two thirds of the side still fills the input
PLAIN = 0.35  # share of pairs "picture and edit"; the others are "edit and edit"


@dataclass(frozen=True)
class Pictures:
    """Pictures without copies, in the order of their content ids."""

    large: Tensor  # uint8 [N, 3, M, M], what edits start from
    plain: Tensor  # uint8 [N, 3, S, S], as the embedder sees the unedited picture
    ids: tuple[str, ...]  # content ids
    sources: dict[str, int]  # pictures by name of their tar or folder

    @property
    def fingerprint(self) -> str:
        """Changes with the set of pictures."""
        return hashlib.sha256("".join(self.ids).encode()).hexdigest()[:16]

    def split(self, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows to train on, rows held out), int64."""
        order = generator(seed, "held out").permutation(len(self.ids))
        return np.sort(order[held_out:]), np.sort(order[:held_out])


class _Decoded(Dataset):
    """Item i: content id, hashes and both sizes of the i-th place; None where it cannot be decoded."""

    def __init__(self, places: list[tuple[str, int, int]], sizes: tuple[int, int], max_pixels: int):
        self.places, self.sizes, self.max_pixels = places, sizes, max_pixels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, tuple[int, int], np.ndarray, np.ndarray] | None:
        try:
            data = read_bytes(*self.places[index])
            image, _ = decode(data, max_pixels=self.max_pixels, min_side=max(self.sizes))
        except (OSError, Rejected):
            return None
        large, plain = (np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for side in self.sizes)
        return content_id(data), perceptual_hashes(image), large, plain


def load_pictures(config: CopyTrainConfig) -> Pictures:
    """Decode the pictures of `source.paths`. Raises UserError when too few are left for one step."""
    source = config.source
    items, problems = list_items(CurateConfig(source=SourceConfig(paths=source.paths)))
    places = list(zip(*(items[name].to_pylist() for name in ("source", "offset", "length")), strict=True))
    small = config.network.size
    data = _Decoded(places, (round(MARGIN * small), small), source.max_pixels)
    found: dict[str, tuple] = {}
    rejected = 0
    loader = DataLoader(data, batch_size=None, num_workers=config.workers, collate_fn=lambda row: row)
    with Progress("decode", total=len(places), unit="images") as progress:
        for place, row in zip(places, loader, strict=True):
            progress.advance(1)
            if row is None:
                rejected += 1
            elif row[0] not in found:
                found[row[0]] = (*row[1:], Path(place[0]))
    ids = sorted(found)
    rows = [found[item_id] for item_id in ids]
    keep = distinct(np.array([row[0] for row in rows], dtype=np.uint64).reshape(-1, 2), source.phash_distance)
    equal, alike = len(places) - rejected - len(ids), len(ids) - len(keep)
    say(
        f"pictures: {len(keep)} of {len(places)}; {rejected} rejected, {equal} of equal bytes, {alike} within "
        f"{source.phash_distance} bits of another, {len(problems)} problems in the listing"
    )
    if len(keep) < config.optim.batch_size + source.held_out:
        raise UserError(
            f"source.paths: {len(keep)} distinct images; expected at least optim.batch_size="
            f"{config.optim.batch_size} + source.held_out={source.held_out}"
        )
    names = Counter(_name(rows[i][3]) for i in keep)
    large, plain = (torch.from_numpy(np.stack([rows[i][column] for i in keep])) for column in (1, 2))
    return Pictures(
        large.permute(0, 3, 1, 2).contiguous(),
        plain.permute(0, 3, 1, 2).contiguous(),
        tuple(ids[i] for i in keep),
        dict(sorted(names.items())),
    )


def _name(source: Path) -> str:
    """What the card calls the place of a picture: its archive, or its folder."""
    return source.name if source.suffix in (".tar", ".parquet") else source.parent.name


def distinct(hashes: np.ndarray, distance: int) -> list[int]:
    """Rows of which no earlier one is within `distance` bits, mirrored or not.

    hashes: uint64 [N, 2], of the picture and of its mirror image.
    """
    if not len(hashes):
        return []
    index = faiss.IndexBinaryFlat(64)
    index.add(as_codes(hashes[:, 0]))  # pyright: ignore[reportCallIssue]
    again = np.zeros(len(hashes), dtype=bool)
    for column in (0, 1):
        # The radius of a binary range search is exclusive.
        limits, _, near = index.range_search(as_codes(hashes[:, column]), distance + 1)  # pyright: ignore
        rows = np.repeat(np.arange(len(hashes)), np.diff(limits.astype(np.int64)))
        again[rows[near < rows]] = True
    return np.flatnonzero(~again).tolist()


class Views(Dataset):
    """Item `step`: the two views of each picture of that step, uint8 [2, B, 3, S, S]. The same at any time."""

    def __init__(self, pictures: Pictures, rows: np.ndarray, config: CopyTrainConfig):
        self.pictures, self.rows = pictures, rows
        self.seed, self.batch = config.seed, config.optim.batch_size
        self.overlays = render_overlays(config.seed, config.network.size)

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, step: int) -> Tensor:
        rows, others = self.draw(step)
        large, others = self.pictures.large[rows], self.pictures.plain[others]
        first = self.pictures.plain[rows]
        edited = torch.from_numpy(generator(self.seed, "plain", step).random(self.batch) >= PLAIN)
        first[edited] = edit(
            large[edited], others[edited], self.overlays, MILD, seed=self.seed, purpose="mild", step=step
        )
        others = others.roll(1, 0)
        second = edit(large, others, self.overlays, STRONG, seed=self.seed, purpose="strong", step=step)
        return torch.stack([first, second])

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the pictures of a step, and of those pasted into them; no picture twice where there are enough."""
        per_epoch = len(self.rows) // self.batch
        epoch, place = divmod(step, per_epoch)
        order = generator(self.seed, "order", epoch).permutation(self.rows)
        start = place * self.batch
        elsewhere = np.roll(order, -start - self.batch)[: self.batch]
        return order[start : start + self.batch], elsewhere
