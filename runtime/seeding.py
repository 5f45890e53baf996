"""Randomness without state: every draw is named by (seed, purpose, counters) and can be made at any time.

The same sample gets the same crops whatever the number of workers or ranks, and a resumed run needs no saved
generator. Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

import hashlib

import numpy as np
import torch


def key(seed: int, purpose: str, *counters: int | str) -> int:
    """A 128-bit key that depends on every argument."""
    text = "\0".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose, for example `generator(seed, "crops", epoch, sample)`."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))


def torch_generator(seed: int, purpose: str, *counters: int | str) -> torch.Generator:
    """A CPU torch generator for one purpose."""
    return torch.Generator().manual_seed(key(seed, purpose, *counters) % 2**63)
