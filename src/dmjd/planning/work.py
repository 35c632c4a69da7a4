"""Arithmetic and memory of a training step, counted on the real network without computing it.

The network has tensors without memory (torch's fake tensors): they know shape and type, and every operation makes the
outputs that it would make. So torch's counter sees all products, and a ledger all memory, of any batch in seconds.
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

FEW, MANY = 8, 32  # images of the two batches that memory is counted for; it is linear between them and beyond


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _convolution_backward(gradient: Any, images: Any, weight: Any, *others: Any, **_: Any) -> int:
    wanted = others[-1]  # gradients of images, weights and biases
    return 2 * int(gradient[0]) * math.prod(gradient[2:]) * math.prod(weight) * sum(wanted[:2])


# For torch's counter, which leaves out the attention of CPUs before 2.15, and takes the gradient of a depthwise
# convolution's weights for that of a dense one.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


@dataclass(frozen=True)
class StepParts:
    """What a training step is made of.

    Attributes:
        create: Makes the untrained network, where torch's default device is.
        optimizer: Makes the optimizer of its weights.
        image: Channels, height and width of an image.
        masks: Draws the masks (B, V, L) of samples by their seeds, True = hidden.
        hidden: Tokens that a view hides.
        reads_files: Whether the network is made of files, which needs memory.
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
        image: What an image keeps for the backward pass, all its views.
        fixed: What is kept whatever the batch: copies of weights in bf16.
        passing: What an image needs on top for a moment where most is needed.
    """

    image: float
    fixed: float
    passing: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step takes, a device with the whole network.

    Attributes:
        parameters: Trained numbers by part: encoder, decoder, projector.
        teachers: Bytes of targets that are networks: a moving average, or frozen ones.
        forward: FLOP of an image forward, all views, targets included.
        flops: FLOP of an image forward and backward.
        weights: Bytes of the network without teachers, buffers included.
        gradients: Bytes of gradients.
        states: Bytes that the optimizer remembers.
        stepping: Bytes that the optimizer needs for a moment.
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
        """Numbers that are trained."""
        return sum(self.parameters.values())

    def kept(self, *, devices: int = 1, accumulation: int = 1, parallel: str = "ddp") -> float:
        """Count the bytes of a device that do not depend on its batch.

        DDP keeps a copy of the gradients to send; FSDP a share of weights, gradients and states, a whole copy of the
        weights for evaluations, and for a moment the whole of one block, which is not counted. From the second part of
        a step on, whole gradients are there while activations are.
        """
        share = devices if parallel == "fsdp" else 1
        sent = self.gradients if parallel == "ddp" and devices > 1 else 0
        copy = self.weights if share > 1 else 0
        summed = self.gradients if accumulation > 1 else 0
        return (self.weights + self.states) / share + copy + self.teachers + sent + summed

    def memory(self, batch: int, **how: Any) -> float:
        """Count the bytes of a device where most is needed; `how` as in `kept`."""
        share = how.get("devices", 1) if how.get("parallel") == "fsdp" else 1
        stepping = (self.gradients + self.stepping) / share
        each = self.footprint.image + self.footprint.passing
        return self.kept(**how) + max(self.footprint.fixed + batch * each, stepping)

    def largest(self, usable: float, **how: Any) -> int:
        """Find how many images at a time so many bytes have room for; 0 if none."""
        if self.memory(1, **how) > usable:
            return 0
        each = self.footprint.image + self.footprint.passing
        return int((usable - self.kept(**how) - self.footprint.fixed) / each)


class Ledger(TorchDispatchMode):
    """Adds up the memory of all tensors that are made while it is there, until they are gone.

    Attributes:
        now: Bytes.
        most: Largest number of bytes there was; may be set back.
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
    """Makes autocast on a CPU keep what it keeps on a GPU, where LayerNorm takes and gives float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def count(parts: StepParts, *, precision: str, on_gpu: bool) -> Work:
    """Count a step.

    Args:
        parts: What it is made of.
        precision: Of products: fp32 or bf16.
        on_gpu: Whether it will run on a GPU, whose autocast and optimizers need other memory than those of a CPU.
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
            if "foreach" in group:  # all weights at once, which is quick to count, and what GPUs do without a kernel
                group["foreach"] = True
        ledger.most = ledger.now
        optimizer.step()
        fused = not on_gpu or "fused" in optimizer.defaults
        stepping = 0 if fused else ledger.most - ledger.now  # what the optimizer remembers is there at the end
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
    """Count the same step in another precision, where only activations differ; arguments as of `count`."""
    with without_memory(parts) as (network, ledger), products(precision, on_gpu):
        small, large = (_forward(network, parts, batch, ledger)[1] for batch in (FEW, MANY))
    return replace(work, footprint=_footprint(small, large, work.footprint.passing))


@contextmanager
def without_memory(parts: StepParts) -> Iterator[tuple[DMJD, Ledger]]:
    """Make the network of tensors without memory, and count that of all that is made meanwhile."""
    with torch.device("cpu" if parts.reads_files else "meta"):
        shapes = parts.create()
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        yield shapes.to_empty(device="cpu").train(), ledger


@contextmanager
def products(precision: str, on_gpu: bool) -> Iterator[None]:
    """Compute products on a CPU in a precision, with what a GPU would keep if so asked."""
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            stack.enter_context(GpuAutocast() if on_gpu else Float32Attention())
        yield


def _forward(network: DMJD, parts: StepParts, batch: int, ledger: Ledger) -> tuple[Losses, int]:
    """Run the forward pass; also count the bytes that are there after it and were not before."""
    before = ledger.now
    losses = network(*parts.inputs(batch, torch.device("cpu")))
    return losses, ledger.now - before


def _footprint(small: int, large: int, passing: float) -> Footprint:
    """Split the bytes after the forward pass of a small and of a large batch."""
    image = (large - small) / (MANY - FEW)
    return Footprint(image=image, fixed=large - MANY * image, passing=passing)


def _targets(network: DMJD) -> list[nn.Module]:
    """List the targets that are modules."""
    candidates: list[Any] = [network.target, network.visible_target]
    return [each for each in candidates if isinstance(each, nn.Module)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _parameters(network: DMJD) -> dict[str, int]:
    """Count trained numbers by part."""
    parts: dict[str, Any] = {"encoder": network.encoder, "decoder": network.decoder, "projector": network.projector}
    return {
        name: sum(each.numel() for each in part.parameters() if each.requires_grad)
        for name, part in parts.items()
        if part is not None
    }
