"""Counter-based randomness: every draw is a function of (seed, purpose, counters), never of order.

The same image gets the same crop, mask and noise whichever worker or process handles it, so a run
can be resumed, resharded over another number of processes, or audited sample by sample.
"""

import hashlib
import random

import numpy as np
import torch


def key(seed: int, purpose: str, *counters: int) -> int:
    """63-bit key of (seed, purpose, counters...); purposes are words such as "crop" or "mask"."""
    words = f"{seed}/{purpose}/" + "/".join(str(int(counter)) for counter in counters)
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU torch.Generator of its own for one purpose and one place."""
    return torch.Generator().manual_seed(key(seed, purpose, *counters))


def seed_globals(seed: int, purpose: str, *counters: int) -> None:
    """Point the global generators (torch, numpy, random), which libraries draw from, at one place.

    timm's RandAugment, Mixup and DropPath and torchvision's transforms know only those. Not torch.manual_seed: where no
    GPU is in use, as in a loader's workers, it formats the call stack for each kind of device, 0.4 ms a call.
    """
    number = key(seed, purpose, *counters)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def permutation(n: int, seed: int, purpose: str, *counters: int) -> torch.Tensor:
    """(n,) int64: the order in which an epoch visits its n samples."""
    return torch.randperm(n, generator=generator(seed, purpose, *counters))
