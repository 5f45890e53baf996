"""Images of remote shards, read front to back and shuffled in a buffer, with a position from which to go on.

The shards of an epoch are dealt to the processes by a seeded permutation, so that over all of them each image comes
once; which process sees it, and the order, depend on their number. A process reads its shards one after the other.
Its images pass through windows of `data.shuffle_buffer`: a window is read whole and given out in a seeded order, while
the next one is read, image by image, into the place of what was given out. So the whole state is where the window
began and how much of it was taken: a resumed run reads one window again, and goes on with the same images.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import fsspec
from braceexpand import braceexpand

from imaging.decode import IMAGE_EXTENSIONS
from runtime.errors import UserError
from runtime.progress import say
from runtime.seeding import generator
from runtime.tars import DamagedTar, stream_tar

TRIES = 5  # at a shard without getting any further
WAIT = 1.0  # seconds before the second try, doubled before each other
READ_TIMEOUT = 60  # seconds without a byte


class Position(NamedTuple):
    """Where a process stands in its stream; a tuple of integers, to be kept in a checkpoint."""

    epoch: int
    shard: int  # of this process, in the order of the epoch, where the window begins
    row: int  # image of that shard
    window: int  # number of the window in the epoch
    taken: int  # images of the window that were given out
    world_size: int  # processes that the shards were dealt to


@dataclass(frozen=True)
class Item:
    """One encoded image of a stream."""

    key: str
    data: bytes
    epoch: int
    sample: int  # shard * 2**32 + number of the image in the shard
    shard: int  # as in Position
    row: int


@dataclass(frozen=True)
class Job:
    """The images of a step of this process."""

    step: int
    items: list[Item]  # [B]
    spares: list[Item]  # of the next batch, in place of those that cannot be decoded
    position: Position  # after the items


@dataclass(frozen=True)
class Stream:
    """Remote shards."""

    urls: tuple[str, ...]
    buffer: int  # images
    num_images: None = None  # nobody knows

    @classmethod
    def open(cls, texts: Sequence[str], *, buffer: int) -> "Stream":
        """The shards behind URLs of tars, folders, globs and braces. Raises UserError, naming what cannot be had."""
        if buffer < 1:
            raise UserError(f"data.shuffle_buffer: found {buffer}; expected at least 1 image")
        return cls(tuple(url for text in texts for url in _find_tars(text)), buffer)

    @property
    def fingerprint(self) -> str:
        """Hash of the names of the shards; what they hold is not read for it."""
        return hashlib.blake2b("\0".join(self.urls).encode(), digest_size=16).hexdigest()

    def jobs(
        self, steps: Iterable[int], *, size: int, seed: int, rank: int, world_size: int, position: Sequence[int] | None
    ) -> Iterator[Job]:
        """What each step of a process takes, from `position` on; `size` images a step."""
        images = self.images(seed=seed, rank=rank, world_size=world_size, position=position)
        spares = size // 4 + 4
        ahead: deque[tuple[Item, Position]] = deque()
        for step in steps:
            ahead.extend(islice(images, size + spares - len(ahead)))
            taken = [ahead.popleft() for _ in range(size)]
            yield Job(step, [item for item, _ in taken], [item for item, _ in ahead], taken[-1][1])

    def images(
        self, *, seed: int, rank: int, world_size: int, position: Sequence[int] | None
    ) -> Iterator[tuple[Item, Position]]:
        """The endless stream of a process from `position` on: each image, and the position after it."""
        if len(self.urls) < world_size:
            raise UserError(
                f"data.shards: {len(self.urls)} remote shards for {world_size} processes; expected one for each or more"
            )
        start = Position(*(position or (0, 0, 0, 0, 0, world_size)))
        if start.world_size != world_size:
            say(f"data.shards: dealt to {world_size} processes now; epoch {start.epoch} of the stream begins again")
            start = Position(start.epoch, 0, 0, 0, 0, world_size)
        following = self._read(start, seed=seed, rank=rank, world_size=world_size)
        head = next(following)

        def fill(window: list[Item], limit: int) -> None:
            """Read on into a window, which ends with its epoch."""
            nonlocal head
            while len(window) < limit and (not window or head.epoch == window[0].epoch):
                window.append(head)
                head = next(following)

        window: list[Item] = []
        number, taken = start.window, start.taken
        while True:
            fill(window, self.buffer)
            first, waiting, window = window[0], dict(enumerate(window)), []
            order = generator(seed, "window", first.epoch, rank, number).permutation(len(waiting)).tolist()
            for given, place in enumerate(order, 1):
                item = waiting.pop(place)  # makes room for the one that is read below
                if given > taken:
                    yield item, Position(first.epoch, first.shard, first.row, number, given, world_size)
                    fill(window, given - taken)
            fill(window, 1)
            number, taken = (number + 1 if window[0].epoch == first.epoch else 0), 0

    def _read(self, start: Position, *, seed: int, rank: int, world_size: int) -> Iterator[Item]:
        """The images of a process in the order in which they lie, epoch after epoch."""
        shard, row = start.shard, start.row
        for epoch in count(start.epoch):
            found = bool(shard or row)
            dealt = generator(seed, "shards", epoch).permutation(len(self.urls))[rank::world_size].tolist()
            for place in range(shard, len(dealt)):
                for number, key, data in images_of(self.urls[dealt[place]], start=row):
                    found = True
                    yield Item(key, data, epoch, (dealt[place] << 32) + number, place, number)
                row = 0
            if not found:
                raise UserError(f"data.shards: no image in {', '.join(self.urls[i] for i in dealt[:3])}")
            shard = 0


def images_of(url: str, *, start: int = 0) -> Iterator[tuple[int, str, bytes]]:
    """Number, key and bytes of the images of a remote tar from number `start` on.

    A connection that breaks is taken up again; after TRIES without an image, UserError.
    """
    tries = 0
    while True:
        try:
            with fsspec.open(url, "rb", **_options(url)) as file:
                for number, (key, data) in enumerate(_first_images(file)):
                    if number >= start:
                        yield number, key, data
                        start, tries = number + 1, 0
            return
        except (OSError, DamagedTar, *_network_errors()) as error:
            cause = error
            if isinstance(error, FileNotFoundError):  # so fsspec says too when a server is down
                cause = error.__cause__ or error
                if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
                    raise UserError(f"data.shards: no {url}") from error
            tries += 1
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            if tries == TRIES:
                raise UserError(
                    f"data.shards: {url} ends after {start} images: {reason}\n"
                    f"  tried {TRIES} times; is the shard whole, and the server up?"
                ) from error
            say(f"{url}: {reason}; trying again from image {start}")
            time.sleep(WAIT * 2 ** (tries - 1))


def _first_images(file) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of the first image of each sample."""
    last = None
    for member, data in stream_tar(file):
        if member.key != last and member.extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            last = member.key
            yield member.key, data


def is_url(text: str) -> bool:
    return "://" in text


def _find_tars(text: str) -> list[str]:
    """The URLs that a URL with braces or globs, or of a folder, stands for."""
    scheme = text.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UserError(f"data.shards: {text}: nobody knows how to read {scheme}://; try https:// or s3://") from error
    except ImportError as error:
        extra = f"pip install 'troodon[{scheme}]'" if scheme == "s3" else str(error)
        raise UserError(f"data.shards: {text} needs a package for {scheme}://\n  {extra}") from error
    found = []
    for url in braceexpand(text):
        if url.endswith(".tar") and not set(url) & set("*?["):
            found.append(url)
            continue
        try:
            files, path = fsspec.core.url_to_fs(url, **_options(url))
            listed = files.glob(path if url.endswith(".tar") else f"{path.rstrip('/')}/*.tar")
        except (OSError, *_network_errors()) as error:
            raise UserError(f"data.shards: {url} cannot be listed: {str(error) or type(error).__name__}") from error
        if not listed:
            raise UserError(f"data.shards: no .tar in {url}")
        found += sorted(files.unstrip_protocol(name) for name in listed)
    return found


def _options(url: str) -> dict:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)
    return {"block_size": 0, "client_kwargs": {"timeout": timeout}}  # one request, read as it comes


def _network_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    return (aiohttp.ClientError,)
