"""The images that a config asks for."""

from pathlib import Path

from runtime.errors import UserError

from .config import DataConfig
from .mixture import Mixture, Part
from .shards import ShardSet
from .stream import Stream, is_url

Data = ShardSet | Mixture | Stream
"""All have `fingerprint` and `num_images` (None where nobody knows); `loader.batches` takes any."""


def open_data(data: DataConfig, *, index: Path | None = None) -> Data:
    """The data of a training. Raises UserError, naming what is missing or does not fit.

    `index` is a folder for what scans of tars without an index found, where nothing can be written beside them.
    """
    if data.sets and data.shards:
        raise UserError("data: found both data.shards and data.sets; give one, or make the shards a set of their own")
    remote = [text for text in (*data.shards, *(text for part in data.sets for text in part.shards)) if is_url(text)]
    if data.sets:
        if remote:
            raise UserError(
                f"data.sets: {remote[0]} is remote, and remote shards cannot be mixed by weight\n"
                f"  copy them to a disk, or list all remote shards in data.shards"
            )
        for part in data.sets:
            if not part.shards:
                raise UserError(f"data.sets: {part.name or 'a set without a name'} has no shards; give folders or tars")
        parts = [
            Part(part.name, ShardSet.open(part.shards, index=index), part.weight, part.batches) for part in data.sets
        ]
        return Mixture.of(tuple(parts))
    if not remote:
        return ShardSet.open(data.shards, index=index)
    if len(remote) < len(data.shards):
        local = next(text for text in data.shards if not is_url(text))
        raise UserError(
            f"data.shards: {local} is local and {remote[0]} is remote; they are read in different ways\n"
            f"  give only one kind; file://... makes a local one be read as if it were remote"
        )
    return Stream.open(remote, buffer=data.shuffle_buffer)
