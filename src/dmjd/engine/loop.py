"""The training loop, in plain sight."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from dmjd.data.random import mix


class Step(NamedTuple):
    """What one optimizer step came to. Losses are tensors on the device: reading them waits for it."""

    number: int  # steps done, this one included
    start: int  # steps done before this process, and when it began to step
    began: float
    losses: dict[str, Tensor]  # by name; `loss` is what was minimised
    grad_norm: Tensor
    lr: float
    skipped: dict[str, str]
    data_seconds: float  # seconds this process has data_seconds for images so far


def train(
    objective: Callable[[Any], dict[str, Tensor]],
    parameters: Sequence[nn.Parameter],
    batches: Iterator[Any],
    optimizer: Optimizer,
    *,
    start: int,
    steps: int,
    seed: int,
    accumulation: int,
    lr: Callable[[int], float],
    clip_grad: float,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Iterator[Step]:
    """Run the steps start .. steps - 1 and hand out each as it is done; between two of them the caller looks around.

    Args:
        objective: From a micro-batch to scalars by name; `loss` is minimised, the others are only reported.
        parameters: What is trained.
        batches: `accumulation` micro-batches a step; a batch says in `skipped` which files did not decode.
        optimizer: Steps on the parameters; a group may have an `lr_scale`.
        start: Steps done before.
        steps: Steps of the whole run.
        seed: Whatever a model draws itself (drop path) depends on it, the step and the micro-batch alone.
        accumulation: Micro-batches whose gradients are averaged.
        lr: Learning rate by step.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        autocast: Context of the forward pass.
    """
    began, data_seconds = time.perf_counter(), 0.0
    for step in range(start, steps):
        sums: dict[str, Tensor] = {}
        skipped: dict[str, str] = {}
        for part in range(accumulation):
            before = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - before
            torch.manual_seed(mix(seed, step, part))
            with autocast():
                losses = objective(batch)
            (losses["loss"] / accumulation).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / accumulation
            skipped |= batch.skipped
        if clip_grad:
            norm = clip_grad_norm_(parameters, clip_grad)
        else:
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = lr(step) * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(step + 1, start, began, sums, norm, lr(step), skipped, data_seconds)
