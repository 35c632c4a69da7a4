"""The optimizer and the learning rate of every step."""

import math
import sys
from collections.abc import Callable

import timm.optim
from torch import nn
from torch.optim import Optimizer


def create_optimizer(
    model: nn.Module, *, name: str, lr: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Create an optimizer of timm with two groups: matrices decay, vectors (biases, norms) do not.

    Raises:
        ValueError: If timm has no optimizer of this name, or it takes no betas.
    """
    try:
        return timm.optim.create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, betas=betas)
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"optim.name {name!r}: {error}") from None


def warmup_cosine(lr: float, *, warmup: float, steps: int) -> Callable[[int], float]:
    """Learning rate of step s = 0, 1, ...: linear up to `lr` over `warmup` steps, then a cosine down to zero.

    A function of the step alone, so that a resumed run needs no state.
    """

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / (warmup + 1)
        return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return at


def warmup_steps(epochs: float, count: int, batch_size: int, steps: int) -> float:
    """Turn epochs of warm-up over `count` images into steps, with a warning if that is all of the run."""
    warmup = epochs * count / batch_size
    if warmup >= steps:
        print(
            f"warning: warm-up takes {warmup:.0f} steps, the run has {steps}: see --optim.warmup_epochs",
            file=sys.stderr,
        )
    return warmup
