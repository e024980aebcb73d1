"""Counter-based randomness: every draw is a function of (seed, purpose, counters), never of order.

An image gets the same crop, mask and noise in any worker or process. So a run can be resumed, spread over another number of
processes, or checked sample by sample.
"""

import hashlib
import random

import numpy as np
import torch


def key(seed: int, purpose: str, *counters: int) -> int:
    """Return the 63-bit key of (seed, purpose, counters...). Purposes are words such as "crop" or "mask"."""
    words = f"{seed}/{purpose}/" + "/".join(str(int(counter)) for counter in counters)
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Return a new CPU generator, seeded with the key of (seed, purpose, counters...)."""
    return torch.Generator().manual_seed(key(seed, purpose, *counters))


def seed_globals(seed: int, purpose: str, *counters: int) -> None:
    """Seed the global generators of torch, numpy and random with the key of (seed, purpose, counters...).

    timm's RandAugment, Mixup and DropPath and torchvision's transforms draw from these alone. torch.manual_seed is avoided:
    without a GPU in use, as in a loader's workers, it formats the call stack for each kind of device, 0.4 ms a call."""
    number = key(seed, purpose, *counters)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def permutation(count: int, seed: int, purpose: str, *counters: int) -> torch.Tensor:
    """Return a random order of `count` samples: (count,) int64."""
    return torch.randperm(count, generator=generator(seed, purpose, *counters))
