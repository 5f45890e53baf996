"""Batches by step number: the same ones for any number of workers, and whichever step comes first.

Step s of a run takes places s * batch_size and following of the endless sequence (order.py); a rank takes its
contiguous part. Nothing here has a state, so a resumed run asks for its next step and is there.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imaging.decode import Rejected, decode
from runtime.errors import UserError
from runtime.signals import SIGNALS

from .augment import BOX_NUMBERS, cut, draw, min_side, recolor, sizes_of_step, views
from .batch import Batch
from .config import CropsConfig, MaskConfig, check
from .masks import draw_masks
from .order import samples_at
from .shards import ShardSet

ATTEMPTS = 1000  # corrupt images in a row before the run gives up


def batches(
    shards: ShardSet,
    *,
    crops: CropsConfig,
    mask: MaskConfig,
    seed: int,
    batch_size: int,
    world_rank: int = 0,
    world_size: int = 1,
    start_step: int,
    num_steps: int,
    num_workers: int,
    patch_size: int,
) -> Iterator[Batch]:
    """The batches of steps start_step .. start_step + num_steps - 1 for one rank.

    `batch_size` counts the images of all ranks. The crops of an image depend on seed, epoch and sample only; masks on
    seed and step. Raises UserError for values that do not fit each other, at once, and for shards of which nothing can
    be decoded, at the step that meets them.
    """
    check(crops, mask, patch_size=patch_size)
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"train.batch_size: {batch_size} is not a multiple of the {world_size} processes")
    steps = Steps(shards, crops, mask, seed, batch_size, world_rank, world_size, patch_size)
    num_workers = min(num_workers, num_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")  # on a shared machine
        loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start_step, start_step + num_steps),
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            # A forked worker starts at once and shares the index. It is safe here: workers compute on one thread, so
            # they never wait for threads that stayed in the parent, and they leave the device alone.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # or the loader would draw from the global one, by which drop path is seeded
        )
        results = iter(loader)  # starts the workers
    return _raise_or_yield(results)


@dataclass(frozen=True)
class Steps(Dataset):
    """The batch of each step, computed from its number."""

    shards: ShardSet
    crops: CropsConfig
    mask: MaskConfig
    seed: int
    batch_size: int  # over all ranks
    rank: int
    world_size: int
    patch_size: int

    def __getitem__(self, step: int) -> Batch | UserError | OSError:
        """The batch of `step`, or what went wrong: an exception that crosses a process as a value stays one line."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # crops are small; and the training process may have this many threads busy already
        try:
            return self.batch(step)
        except (UserError, OSError) as error:
            return error
        finally:
            torch.set_num_threads(threads)

    def batch(self, step: int) -> Batch:
        """The batch of `step` for this rank."""
        crops = sizes_of_step(self.crops, seed=self.seed, step=step)
        size = self.batch_size // self.world_size
        slots = np.arange(size) + self.rank * size  # [B] of the global batch
        places = step * self.batch_size + slots
        recipe, shortest = views(crops), min_side(crops)
        skipped: list[str] = []
        samples, pixels, numbers = [], [], []
        for place, sample in zip(places.tolist(), self.samples_at(places), strict=True):
            image, place, sample = self.decodable(place, sample, skipped, shortest)
            drawn = draw(self.seed, place // len(self.shards), sample, crops=crops)
            pixels.append(cut(image, drawn[:, :BOX_NUMBERS], recipe))
            numbers.append(drawn[:, BOX_NUMBERS:])
            samples.append(sample)

        def finished(kinds: range) -> Tensor:
            """The crops [kinds * B, 3, S, S] of some views of one size."""
            sizes = {recipe[i].size for i in kinds} or {crops.local_size}
            (side,) = sizes
            out = torch.empty(len(kinds) * size, 3, side, side)
            for number, i in enumerate(kinds):
                part = out[number * size : (number + 1) * size]
                recolor(
                    torch.stack([row[i] for row in pixels]), np.stack([row[i] for row in numbers]), recipe[i], out=part
                )
            return out

        num_local = self.crops.num_local
        return Batch(
            global_crops=finished(range(2)),
            local_crops=finished(range(2, 2 + num_local)),
            masks=self.masks(step, slots, side=crops.global_size // self.patch_size),
            samples=torch.tensor(samples),
            skipped=tuple(skipped),
            gram_crops=finished(range(2 + num_local, 4 + num_local)) if crops.gram_size else None,
        )

    def samples_at(self, places: np.ndarray) -> list[int]:
        return samples_at(self.seed, places, len(self.shards)).tolist()

    def decodable(self, place: int, sample: int, skipped: list[str], shortest: int) -> tuple[Image.Image, int, int]:
        """The image `sample` at `place` of the endless sequence, with its place and number.

        One that cannot be decoded is named in `skipped` and replaced by the one that has its slot in the next batch,
        and so on: so no image comes twice into one batch.
        """
        for _ in range(ATTEMPTS):
            key, data = self.shards.read(sample)
            try:
                image, _ = decode(data, min_side=shortest)
                return image, place, sample
            except Rejected as error:
                skipped.append(f"{key}: {error.reason}")
            place += self.batch_size
            (sample,) = self.samples_at(np.array([place]))
        raise UserError(f"data.shards: {ATTEMPTS} images in a row cannot be decoded, first {skipped[-ATTEMPTS]}")

    def masks(self, step: int, slots: np.ndarray, *, side: int) -> Tensor:
        """Masks [2 * B, N] of this rank's global crops; those of all ranks are numbered first crops, then second."""
        numbers = np.concatenate([slots, self.batch_size + slots])
        return draw_masks(
            self.seed, step, num_crops=2 * self.batch_size, crops=numbers, grid=(side, side), config=self.mask
        )


def _raise_or_yield(results: Iterator[Batch | Exception]) -> Iterator[Batch]:
    try:
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        del results  # the workers end now, and not when a traceback that holds this frame is forgotten


def _start_worker(_: int) -> None:
    """Signals are the parent's affair: it saves, then ends the workers. Ctrl-C and clusters signal all processes."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # The parent ends its workers with SIGTERM too: that one must be followed, or both wait for ever at exit.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()


def _follow_parent(parent: int) -> None:
    """End this process when `parent` sends SIGTERM; take no notice when someone else does."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
