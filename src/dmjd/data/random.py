"""Randomness as a function of numbers: the seed of whatever belongs to exactly these, and generators set to one."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Mix non-negative integers into a seed of 63 bits (SplitMix64's finaliser over each).

    Python's own `hash` will not do: it is salted per process for strings and nearly linear for integers.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the global generators of Python, NumPy and torch (on the CPU) to a seed, and back to where they were.

    The augmentations of timm and torchvision draw from these, and take no generator of ours.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm draws there)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.random.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
