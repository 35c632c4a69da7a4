"""Randomness as a hash of numbers, for one tuple of them or a whole batch.

What is drawn for a sample depends only on (seed, epoch, index): not on the device, the rank, the worker or earlier
draws. The hash uses the increment and the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_STIRS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def mix(*numbers: int) -> int:
    """Mix non-negative integers into a seed of 63 bits (SplitMix64's finaliser over each).

    Python's own `hash` will not do: it is salted per process for strings and nearly linear for integers.
    """
    state = 0
    for number in numbers:
        state = (state + number + _STEP) & _MASK
        for shift, factor in _STIRS:
            state = ((state ^ (state >> shift)) * factor) & _MASK
        state ^= state >> 31
    return state >> 1


def mix_all(*numbers: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Vectorised `mix`, with the same result on any device; at least one of the numbers must be a tensor."""
    state: Tensor | int = 0
    for number in numbers:
        state = state + (number + _signed(_STEP))  # integers of 64 bits wrap around, as they should
        if isinstance(state, int):
            state = torch.tensor(_signed(state & _MASK))
        for shift, factor in _STIRS:
            state = _shifted(state, shift).bitwise_xor_(state).mul_(_signed(factor))
        state = _shifted(state, 31).bitwise_xor_(state)
    assert isinstance(state, Tensor)
    return _shifted(state, 1)


def uniforms(seeds: Int[Tensor, " B"], count: int) -> Float64[Tensor, "B count"]:
    """Draw `count` numbers in [0, 1) from every seed; the n-th is a hash of the seed and n, not of earlier draws."""
    draws = mix_all(seeds[:, None], torch.arange(count, device=seeds.device))
    return _shifted(draws, 10).double() * 2.0**-53


def _signed(number: int) -> int:
    """Reinterpret 64 bits as a signed integer, as in torch."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift right logically, filling with zeros; torch's shift fills with the sign."""
    return (numbers >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (on the CPU), and restore their states on exit.

    The augmentations of timm and torchvision draw from these and accept no other generator.
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
