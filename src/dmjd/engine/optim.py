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

FUSED = ("adam", "adamw")  # torch's own: on a GPU, one kernel updates many parameters without synchronising
UNFIT = ("adahessian", "kron")  # the former needs second derivatives, the latter has state outside of its `state`


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
    """Create a timm optimizer with weight decay for matrices but not for vectors (biases, norms).

    With `layer_decay` every layer has its own groups, whose `lr_scale` is layer_decay ** (layers above it); the layers
    are those of the model's `group_matcher`. The parameters of `heads` count as above the model's last block, in one
    layer with its final norm if it has one.

    Raises:
        ConfigError: If timm has no optimizer of this name, or it cannot be used here.
    """
    if any(each in name.lower() for each in UNFIT):
        raise ConfigError(f"optim.name {name!r} cannot be trained with or resumed here; choose another, such as adamw")
    options: dict[str, Any] = {"opt": name, "lr": lr, "weight_decay": weight_decay, "betas": betas}
    if name.lower() in FUSED and next(model.parameters()).is_cuda:
        options["fused"] = True
    try:
        if heads is None:
            return with_state(timm.optim.create_optimizer_v2(model, layer_decay=layer_decay, **options))
        decay = layer_decay or 1.0
        kept: set[str] = getattr(model, "no_weight_decay", set)()
        groups = timm.optim.param_groups_layer_decay(model, weight_decay, kept, layer_decay=decay)
        last = [parameter for group in groups if group["lr_scale"] == 1 for parameter in group["params"]]
        if any(parameter.ndim > 1 for parameter in last):  # a block: timm counts from the last layer, heads lie above
            groups = [group | {"lr_scale": decay * group["lr_scale"]} for group in groups]
        groups += timm.optim.param_groups_weight_decay(heads, weight_decay)
        return with_state(timm.optim.create_optimizer_v2(groups, **options))
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"optim.name {name!r}: {error}") from None


def with_state(optimizer: Optimizer) -> Optimizer:
    """Give timm's Lookahead, whose own state is always empty, that of the optimizer inside it, for checkpoints."""
    optimizer.state = getattr(optimizer, "_base_optimizer", optimizer).state
    return optimizer


Shape = Literal["cosine", "poly"]


def learning_rate(peak: float, *, warmup: float, steps: int, shape: Shape = "cosine") -> Callable[[int], float]:
    """Make the learning rate of step s = 0, 1, ...: linear warm-up to the peak, then down to zero.

    It is a function of the step alone, so that a resumed run needs no state. If the warm-up takes the whole run, a
    warning is printed.

    Args:
        peak: Highest learning rate.
        warmup: Steps of the linear warm-up.
        steps: Steps of the run.
        shape: `cosine`, or `poly`, which is linear: the polynomial of power 1 of segmentation recipes.
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

    The weight's update has norm 0.001 * lr * |weight|; the bias, a vector, is updated by plain SGD with momentum.
    """
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias], "always_adapt": False}]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001)
