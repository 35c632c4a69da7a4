"""The optimizer and the learning rate of every step."""

import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import timm.optim
from timm.optim.lars import Lars
from torch import nn
from torch.optim import Optimizer

from dmjd.errors import ConfigError

FUSED = ("adam", "adamw")  # torch's own: on a GPU one kernel steps on many parameters, and nothing waits for it


def create_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    layer_decay: float | None = None,
    heads: nn.Module | None = None,
) -> Optimizer:
    """Create an optimizer of timm: matrices decay, vectors (biases, norms) do not.

    With `layer_decay` every layer has groups of its own, whose `lr_scale` is layer_decay ** (layers above it); the
    layers are those of the model's `group_matcher`. What `heads` hold comes after the model's last block, beside its
    final norm if it has one.

    Raises:
        ConfigError: If timm has no optimizer of this name, or it takes no betas.
    """
    options: dict[str, Any] = {"opt": name, "lr": lr, "weight_decay": weight_decay, "betas": betas}
    if name.lower() in FUSED and next(model.parameters()).is_cuda:
        options["fused"] = True
    try:
        if heads is None:
            return timm.optim.create_optimizer_v2(model, layer_decay=layer_decay, **options)
        decay = layer_decay or 1.0
        kept: set[str] = getattr(model, "no_weight_decay", set)()
        groups = timm.optim.param_groups_layer_decay(model, weight_decay, kept, layer_decay=decay)
        last = [parameter for group in groups if group["lr_scale"] == 1 for parameter in group["params"]]
        if any(parameter.ndim > 1 for parameter in last):  # a block: timm counts from what is last, heads are beyond it
            groups = [group | {"lr_scale": decay * group["lr_scale"]} for group in groups]
        groups += timm.optim.param_groups_weight_decay(heads, weight_decay)
        return timm.optim.create_optimizer_v2(groups, **options)
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"optim.name {name!r}: {error}") from None


Shape = Literal["cosine", "poly"]


def learning_rate(peak: float, *, warmup: float, steps: int, shape: Shape = "cosine") -> Callable[[int], float]:
    """Make the learning rate of step s = 0, 1, ...: linear up to the peak, then down to zero.

    A function of the step alone, so that a resumed run needs no state. A warm-up that takes all of the run is worth a
    warning.

    Args:
        peak: Highest learning rate.
        warmup: Steps of the linear rise.
        steps: Steps of the run.
        shape: `cosine`, or `poly`: a straight line, the polynomial of power 1 that segmentation recipes have.
    """
    if warmup >= steps:
        said = f"warm-up takes {warmup:.0f} steps, the run has {steps}"
        print(f"warning: {said}: see warmup_epochs", file=sys.stderr)
    return (warmup_cosine if shape == "cosine" else warmup_poly)(peak, warmup=warmup, steps=steps)


def warmup_cosine(lr: float, *, warmup: float, steps: int) -> Callable[[int], float]:
    """Rise linearly to `lr` over `warmup` steps, then fall to zero along a cosine."""

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / (warmup + 1)
        return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return at


def warmup_poly(lr: float, *, warmup: float, steps: int) -> Callable[[int], float]:
    """Rise linearly to `lr` over `warmup` steps, then fall linearly to zero."""

    def at(step: int) -> float:
        return lr * min((step + 1) / (warmup + 1), (steps - step) / max(steps - warmup, 1))

    return at


def create_lars(head: nn.Linear, lr: float) -> Optimizer:
    """Create LARS (You et al. 2017) for a linear probe as in MoCo v3 and MAE: momentum 0.9, no weight decay.

    The weight's step has the length 0.001 * lr * |weight|; the bias, a vector, takes plain steps of momentum SGD.
    """
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias], "always_adapt": False}]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001)
