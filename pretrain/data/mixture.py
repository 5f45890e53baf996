"""Several sets of images mixed by weight, and whole batches of one set at a given rate (DINOv3 sec. 3.1).

Which set a place belongs to is dealt in exact shares, spread evenly; each set then runs through its own images, once
per epoch of its own, in the order of order.py. Everything is computed from the number of the step, as for one set.

P places of a step.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from runtime.errors import UserError
from runtime.seeding import key

from .order import samples_at
from .shards import ShardSet

PERIOD = 25_200  # places in which shares are exact: every multiple of 1 %, and of a tenth, ninth, eighth to a half


@dataclass(frozen=True)
class Part:
    """One set of a mixture."""

    name: str
    shards: ShardSet
    weight: float = 1.0  # share of the images of mixed batches, relative to the other parts
    batches: float = 0.0  # share of the steps whose whole batch is of this part


@dataclass(frozen=True)
class Deal:
    """Places 0, 1, 2, ... dealt in turn to some numbers by their shares, over and over in periods."""

    turns: np.ndarray  # int64 [PERIOD], whose place it is
    counts: np.ndarray  # int64 [numbers, PERIOD + 1], places of each before

    @classmethod
    def by(cls, shares: list[float]) -> "Deal":
        """Each share, relative to their sum, to within one place of a period; the places of each are evenly spaced."""
        exact = np.array(shares) / sum(shares) * PERIOD
        counts = np.floor(exact + 1e-6).astype(np.int64)
        largest = np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]
        counts[largest] += 1
        times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        turns = np.repeat(np.arange(len(shares)), counts)[np.argsort(times, kind="stable")]
        before = np.cumsum(turns == np.arange(len(shares))[:, None], axis=1)
        return cls(turns, np.pad(before, ((0, 0), (1, 0))))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Whose each place is (int64 [P])."""
        return self.turns[places % PERIOD]

    def before(self, numbers: np.ndarray | int, places: np.ndarray | int) -> np.ndarray:
        """How many of the places before each of `places` are of `numbers` (int64 [P] both, or one)."""
        periods, rest = np.divmod(places, PERIOD)
        return periods * self.counts[numbers, PERIOD] + self.counts[numbers, rest]


@dataclass(frozen=True)
class Mixture:
    """Sets of images, numbered one after the other, and what a step takes of each."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: tuple[Part, ...]) -> "Mixture":
        """A mixture of parts that fit together. Raises UserError, naming the part."""
        names = [part.name for part in parts]
        for number, part in enumerate(parts):
            if not part.name or names.count(part.name) > 1:
                raise UserError(f"data.sets[{number}].name: found '{part.name}'; expected a name that no other set has")
            if part.weight < 0 or not 0 <= part.batches <= 1:
                raise UserError(
                    f"data.sets: {part.name} has weight {part.weight} and batches {part.batches}\n"
                    f"  expected a weight of 0 or more, and batches between 0 and 1"
                )
            if not part.weight and not part.batches:
                raise UserError(f"data.sets: {part.name} has weight 0 and no batches of its own; leave it out")
        own, weight = sum(part.batches for part in parts), sum(part.weight for part in parts)
        for part in parts:
            if 0 < part.weight < weight / PERIOD or 0 < part.batches < 1 / PERIOD:
                raise UserError(f"data.sets: {part.name} has a share below 1 in {PERIOD}; it would never have its turn")
        if own > 1 + 1e-9:
            raise UserError(f"data.sets: batches of single sets make {own:g} of the steps; expected at most 1")
        if own < 1 - 1e-9 and not weight:
            raise UserError(
                f"data.sets: all weights are 0, and {1 - own:.0%} of the steps have no batch of a single set\n"
                f"  give a set a weight, or batches that sum to 1"
            )
        return cls(parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def num_images(self) -> int:
        return len(self)

    @cached_property
    def ends(self) -> np.ndarray:
        """Number of images up to and with each part."""
        return np.cumsum([len(part.shards) for part in self.parts])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the sets, their names and shares."""
        parts = [(part.name, part.shards.fingerprint, part.weight, part.batches) for part in self.parts]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    @cached_property
    def steps(self) -> Deal:
        """Steps to parts, for batches of their own; the last number stands for mixed batches."""
        own = [part.batches for part in self.parts]
        return Deal.by([*own, max(0.0, 1 - sum(own))])

    @cached_property
    def images(self) -> Deal:
        """Places of mixed batches to parts."""
        weights = [part.weight for part in self.parts]
        return Deal.by(weights if any(weights) else [1.0] * len(weights))

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded bytes of an image."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        shards = self.parts[number].shards
        return shards.read(index - int(self.ends[number]) + len(shards))

    def places(self, step: int, slots: np.ndarray, *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Part and place in the endless sequence of that part (int64 [P] both) of slots of the batch of `step`."""
        number, mixed = int(self.steps.at(np.array(step))), len(self.parts)
        before = batch_size * int(self.steps.before(mixed, step))  # places of mixed batches
        own = batch_size * self.steps.before(np.arange(len(self.parts)), step)  # [parts], of own batches
        if number < mixed:
            parts = np.full(len(slots), number)
            return parts, self.images.before(number, before) + own[number] + slots
        parts = self.images.at(before + slots)
        return parts, self.images.before(parts, before + slots) + own[parts]

    def at(self, parts: np.ndarray, places: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """At places of the sequences of parts (int64 [P] both): the epoch of the part, and the index of the image."""
        epochs, samples = np.empty_like(places), np.empty_like(places)
        for number in sorted(set(parts.tolist())):
            part, here = self.parts[number], parts == number
            size = len(part.shards)
            # Sets of one size must not run in step, or images of the same number would always meet.
            order = key(seed, "set", part.name) if len(self.ends) > 1 else seed
            epochs[here] = places[here] // size
            samples[here] = samples_at(order, places[here], size) + (int(self.ends[number]) - size)
        return epochs, samples
