"""The training loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from dmjd.engine.device import deterministic
from dmjd.engine.distributed import ParallelModel, whole
from dmjd.engine.optim import Shape
from dmjd.engine.signals import stopping
from dmjd.random import mix

Objective = Callable[[ParallelModel, Any], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Length of a run, size of its steps, learning rate, and how often it logs, evaluates and saves.

    Attributes:
        steps: Optimizer steps of the whole run.
        batch_size: Images in a step, over all ranks and micro-batches.
        lr: Peak learning rate.
        warmup_epochs: Length of the linear warm-up.
        shape: How the learning rate falls afterwards.
        seed: Seed of the order of images, of samples, and of the network's own randomness.
        accumulation: Micro-batches of a rank in a step, whose gradients are averaged.
        clip_grad: Largest norm of the gradient; 0 turns clipping off.
        workers: Processes that load images; None for as many as fit the machine.
        log_every: Steps between two lines of metrics.jsonl.
        evals: Number of evaluations, besides those before and after the run.
        saves: Number of checkpoints; the last step always has one.
        checkpoint_minutes: Longest time without a checkpoint.
        deterministic: Whether torch uses deterministic algorithms only.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_epochs: float = 0.0
    shape: Shape = "cosine"
    seed: int = 0
    accumulation: int = 1
    clip_grad: float = 0.0
    workers: int | None = None
    log_every: int = 10
    evals: int = 5
    saves: int = 20
    checkpoint_minutes: float = 15.0
    deterministic: bool = False


class Step(NamedTuple):
    """The outcome of one optimizer step. Losses are tensors on the device: reading them synchronises."""

    number: int  # steps done, this one included
    start: int  # steps done before this process, and the time when it began
    began: float
    losses: dict[str, Tensor]  # by name, of this rank's images; `loss` is the one minimised
    grad_norm: Tensor
    finite: Tensor  # whether the gradient was; if not, the step left weights and optimizer unchanged
    lr: float
    skipped: dict[str, str]  # files of this rank that did not decode


def train(
    model: ParallelModel,
    optimizer: Optimizer,
    batches: Iterator[Any],
    objective: Objective,
    plan: Plan,
    *,
    start: int,
    lr: Callable[[int], float],
    autocast: Callable[[], AbstractContextManager[None]],
) -> Iterator[Step]:
    """Run the steps start .. plan.steps - 1 and yield each when it is done, so that the caller can act between two.

    Ends early between two micro-batches of a step if a signal has come.

    Args:
        model: Model to train.
        optimizer: Updates its parameters; a group may have an `lr_scale`.
        batches: `plan.accumulation` micro-batches per step; `skipped` of a batch names files that did not decode.
        objective: From a micro-batch to scalars by name; `loss` is minimised, the others are only reported.
        plan: Plan of the run.
        start: Steps that are already done.
        lr: Learning rate by step.
        autocast: Context of the forward pass.
    """
    began = time.perf_counter()
    for step in range(start, plan.steps):
        sums: dict[str, Tensor] = {}
        skipped: dict[str, str] = {}
        for part in range(plan.accumulation):
            if part and model.ranks.agree(stopping())[0]:
                optimizer.zero_grad(set_to_none=True)
                return
            batch = next(batches)
            # The network's own randomness (drop path) depends on the step and the micro-batch, not on the rank.
            torch.manual_seed(mix(plan.seed, step, model.ranks.number(part)))
            with deterministic(plan.deterministic), model.synchronized(last=part == plan.accumulation - 1):
                with autocast():
                    losses = objective(model, batch)
                (losses["loss"] / plan.accumulation).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / plan.accumulation
            skipped |= batch.skipped
        if plan.clip_grad:
            norm = clip_grad_norm_(model.parameters, plan.clip_grad)
        else:
            norm = get_total_norm([parameter.grad for parameter in model.parameters if parameter.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = lr(step) * group.get("lr_scale", 1.0)
        norm = whole(norm)
        finite = norm.isfinite()
        step_if(finite, optimizer)
        optimizer.zero_grad(set_to_none=True)
        yield Step(step + 1, start, began, sums, norm, finite, lr(step), skipped)


def step_if(finite: Tensor, optimizer: Optimizer) -> None:
    """Step if the gradient is finite. Its norm is over all ranks, so they all do the same.

    A fused optimizer gets the flag as a tensor on its device, as from torch's gradient scaler; for any other optimizer
    the flag is read, which synchronises with a GPU.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        told: Any = optimizer
        told.grad_scale, told.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
