"""The training loop, in plain sight."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from dmjd.data.loader import Batch
from dmjd.method import DMJD


class Step(NamedTuple):
    """What one optimizer step came to. Losses are tensors on the device: reading them waits for it."""

    number: int  # steps done, this one included
    start: int  # steps done before this process, and when it began to step
    began: float
    loss: Tensor
    loss_masked: Tensor
    loss_visible: Tensor
    grad_norm: Tensor
    lr: float
    skipped: dict[str, str]
    waited: float  # seconds this process has waited for images so far


def train(
    model: DMJD,
    batches: Iterator[Batch],
    optimizer: Optimizer,
    *,
    start: int,
    steps: int,
    accumulation: int,
    lr: Callable[[int], float],
    clip_grad: float,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Iterator[Step]:
    """Run the steps start .. steps - 1 and hand out each as it is done; between two of them the caller looks around.

    Args:
        model: In training mode, on the device.
        batches: `accumulation` micro-batches a step.
        optimizer: Steps on the model's parameters.
        start: Steps done before.
        steps: Steps of the whole run.
        accumulation: Micro-batches whose gradients are averaged.
        lr: Learning rate by step.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        device: Where the model is.
        autocast: Context of the forward pass.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    began, waited = time.perf_counter(), 0.0
    for step in range(start, steps):
        sums = torch.zeros(3, device=device)
        skipped: dict[str, str] = {}
        for _ in range(accumulation):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            with autocast():  # masks stay on the CPU, see `masking.split`
                losses = model(batch.images.to(device, non_blocking=True), batch.masked)
            (losses.total / accumulation).backward()
            sums += torch.stack(losses).detach() / accumulation
            skipped |= batch.skipped
        if clip_grad:
            norm = clip_grad_norm_(parameters, clip_grad)
        else:
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, masked, visible = sums
        yield Step(step + 1, start, began, loss, masked, visible, norm, lr(step), skipped, waited)
