"""Which sample comes at which place: a shuffle without a table.

The endless sequence of samples runs through the whole set once per epoch, each time in another order. The order is a
keyed permutation of 0..n-1: a Feistel network over the next power of four (Luby and Rackoff 1988), walked until it
lands inside (cycle walking, Black and Rogaway 2002). Any place is computed from its number alone, so that any number
of ranks and workers sees the same sequence and a resumed run seeks at no cost.
"""

import numpy as np

from runtime.seeding import generator

ROUNDS = 8
SMALLEST_HALF = 3  # bits; with less, a round can do too little and small sets repeat their orders


def samples_at(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """Samples (int64 [P], each below `num_samples`) at `positions` (integers [P], 0 or more) of the endless sequence.

    Position p is place p % num_samples of epoch p // num_samples.
    """
    epochs, places = np.divmod(np.asarray(positions, np.int64), num_samples)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = _permute(places[here], seed=seed, epoch=int(epoch), num_samples=num_samples)
    return samples


def _permute(places: np.ndarray, *, seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The images of `places` under the permutation of this epoch."""
    half = max(SMALLEST_HALF, ((num_samples - 1).bit_length() + 1) // 2)
    keys = generator(seed, "order", epoch).integers(2**64, size=ROUNDS, dtype=np.uint64)
    values = _feistel(places.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(values >= num_samples)):
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0..4**half - 1, applied to each of `values` (uint64)."""
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """A hash of 64-bit words: the finaliser of SplitMix64 (Steele, Lea and Flood 2014). Products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
