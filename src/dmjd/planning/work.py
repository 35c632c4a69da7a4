"""Arithmetic and memory of a training step, counted on the real network without computing it.

The network has tensors without memory (torch's fake tensors), which have a shape and a type, and on which every
operation makes the outputs that it would make. So in seconds, and for any batch, torch's counter sees all products, and
a ledger sees all memory.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dmjd.engine.device import Float32Attention
from dmjd.masking import TokenIds, token_ids
from dmjd.method import DMJD, Losses

FEW, MANY = 8, 32  # images of the two batches for which memory is counted; it is linear in the batch size


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _convolution_backward(gradient: Any, images: Any, weight: Any, *others: Any, **_: Any) -> int:
    wanted = others[-1]  # gradients of images, weights and biases
    return 2 * int(gradient[0]) * math.prod(gradient[2:]) * math.prod(weight) * sum(wanted[:2])


# For torch's counter, which before 2.15 leaves out attention on CPUs, and counts the weight gradient of a depthwise
# convolution as that of a dense one.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


@dataclass(frozen=True)
class StepParts:
    """Parts of a training step.

    Attributes:
        create: Makes the untrained network, on torch's default device.
        optimizer: Makes the optimizer of its weights.
        image: Channels, height and width of an image.
        masks: Draws the masks (B, V, L) of samples from their seeds, True = hidden.
        hidden: Number of tokens hidden in a view.
        reads_files: Whether making the network reads files, which needs real memory.
    """

    create: Callable[[], DMJD]
    optimizer: Callable[[nn.Module], Optimizer]
    image: tuple[int, int, int]
    masks: Callable[[Tensor], Tensor]
    hidden: int
    reads_files: bool = False

    def inputs(self, batch: int, device: torch.device) -> tuple[Tensor, TokenIds]:
        """Make `batch` images of noise, and the tokens of their views."""
        images = torch.randint(0, 256, (batch, *self.image), dtype=torch.uint8)
        return images.to(device), token_ids(self.masks(torch.arange(batch)).to(device), self.hidden)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of the activations of a step, in bytes.

    Attributes:
        image: Bytes kept per image for the backward pass, over all views.
        fixed: Bytes kept for any batch: copies of weights in bf16.
        passing: Bytes per image that are needed temporarily on top, at the peak.
    """

    image: float
    fixed: float
    passing: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a step on a device with the whole network.

    Attributes:
        parameters: Trained parameters by part: encoder, decoder, projector.
        teachers: Bytes of targets that are networks: a moving average, or frozen ones.
        forward: FLOP of the forward pass of an image, all views, targets included.
        flops: FLOP of the forward and backward pass of an image.
        weights: Bytes of the network without teachers, buffers included.
        gradients: Bytes of gradients.
        states: Bytes of optimizer states.
        stepping: Bytes that the optimizer needs temporarily.
        footprint: Memory of activations.
    """

    parameters: dict[str, int]
    teachers: int
    forward: float
    flops: float
    weights: int
    gradients: int
    states: int
    stepping: int
    footprint: Footprint

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.parameters.values())

    def kept(self, *, devices: int = 1, accumulation: int = 1, parallel: str = "ddp") -> float:
        """Count the bytes of a device that do not depend on its batch.

        DDP keeps a copy of the gradients to send; FSDP keeps a share of weights, gradients and states, a whole copy of
        the weights for evaluations, and temporarily one whole block, which is not counted. From the second micro-batch
        of a step on, all gradients are in memory together with the activations.
        """
        share = devices if parallel == "fsdp" else 1
        sent = self.gradients if parallel == "ddp" and devices > 1 else 0
        copy = self.weights if share > 1 else 0
        summed = self.gradients if accumulation > 1 else 0
        return (self.weights + self.states) / share + copy + self.teachers + sent + summed

    def memory(self, batch: int, **how: Any) -> float:
        """Count the bytes of a device at the peak; `how` as in `kept`."""
        share = how.get("devices", 1) if how.get("parallel") == "fsdp" else 1
        stepping = (self.gradients + self.stepping) / share
        each = self.footprint.image + self.footprint.passing
        return self.kept(**how) + max(self.footprint.fixed + batch * each, stepping)

    def largest(self, usable: float, **how: Any) -> int:
        """Find the largest micro-batch that fits into `usable` bytes; 0 if none does."""
        if self.memory(1, **how) > usable:
            return 0
        each = self.footprint.image + self.footprint.passing
        return int((usable - self.kept(**how) - self.footprint.fixed) / each)


class Ledger(TorchDispatchMode):
    """Adds up the memory of all tensors that are made in its context, until they are freed.

    Attributes:
        now: Bytes in use.
        most: Largest number of bytes in use; may be reset.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._enter(each.untyped_storage())
        return made

    def _enter(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._leave, place, size).atexit = False

    def _leave(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


class GpuAutocast(TorchFunctionMode):
    """Makes autocast on a CPU keep the same tensors as on a GPU, where LayerNorm takes and returns float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def count(parts: StepParts, *, precision: str, on_gpu: bool) -> Work:
    """Count a step.

    Args:
        parts: Parts of the step.
        precision: Precision of products: fp32 or bf16.
        on_gpu: Whether it will run on a GPU, whose autocast and optimizers use memory differently from those of a CPU.
    """
    with without_memory(parts) as (network, ledger):
        optimizer = parts.optimizer(network)
        made = ledger.now
        with products(precision, on_gpu):
            small = _forward(network, parts, FEW, ledger)[1]
        began = ledger.most = ledger.now
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            with products(precision, on_gpu):
                losses, large = _forward(network, parts, MANY, ledger)
            forward = counter.get_total_flops()
            losses.total.backward()
        del losses
        passing = ledger.most - began - large
        for group in optimizer.param_groups:
            if "foreach" in group:  # all weights at once: quick to count, and what GPUs do without a fused kernel
                group["foreach"] = True
        ledger.most = ledger.now
        optimizer.step()
        fused = not on_gpu or "fused" in optimizer.defaults
        stepping = 0 if fused else ledger.most - ledger.now  # its states stay in memory
        optimizer.zero_grad()
        states = ledger.now - made
    teachers = {id(each): each.nbytes for target in _targets(network) for each in _tensors(target)}
    return Work(
        parameters=_parameters(network),
        teachers=sum(teachers.values()),
        forward=forward / MANY,
        flops=counter.get_total_flops() / MANY,
        weights=sum(each.nbytes for each in _tensors(network) if id(each) not in teachers),
        gradients=sum(each.nbytes for each in network.parameters() if each.requires_grad),
        states=states,
        stepping=stepping,
        footprint=_footprint(small, large, passing / MANY),
    )


def recount(work: Work, parts: StepParts, *, precision: str, on_gpu: bool) -> Work:
    """Count the same step in another precision, where only activations differ; arguments as in `count`."""
    with without_memory(parts) as (network, ledger), products(precision, on_gpu):
        small, large = (_forward(network, parts, batch, ledger)[1] for batch in (FEW, MANY))
    return replace(work, footprint=_footprint(small, large, work.footprint.passing))


@contextmanager
def without_memory(parts: StepParts) -> Iterator[tuple[DMJD, Ledger]]:
    """Make the network with tensors without memory, and count the memory of all tensors made meanwhile."""
    with torch.device("cpu" if parts.reads_files else "meta"):
        shapes = parts.create()
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        yield shapes.to_empty(device="cpu").train(), ledger


@contextmanager
def products(precision: str, on_gpu: bool) -> Iterator[None]:
    """Compute products on a CPU in a precision, keeping the tensors that a GPU would keep if `on_gpu`."""
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            stack.enter_context(GpuAutocast() if on_gpu else Float32Attention())
        yield


def _forward(network: DMJD, parts: StepParts, batch: int, ledger: Ledger) -> tuple[Losses, int]:
    """Run the forward pass, and count the bytes that it leaves in use."""
    before = ledger.now
    losses = network(*parts.inputs(batch, torch.device("cpu")))
    return losses, ledger.now - before


def _footprint(small: int, large: int, passing: float) -> Footprint:
    """Split the bytes in use after the forward pass of a small and of a large batch."""
    image = (large - small) / (MANY - FEW)
    return Footprint(image=image, fixed=large - MANY * image, passing=passing)


def _targets(network: DMJD) -> list[nn.Module]:
    """List the targets that are modules."""
    candidates: list[Any] = [network.target, network.visible_target]
    return [each for each in candidates if isinstance(each, nn.Module)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _parameters(network: DMJD) -> dict[str, int]:
    """Count trained parameters by part."""
    parts: dict[str, Any] = {"encoder": network.encoder, "decoder": network.decoder, "projector": network.projector}
    return {
        name: sum(each.numel() for each in part.parameters() if each.requires_grad)
        for name, part in parts.items()
        if part is not None
    }
