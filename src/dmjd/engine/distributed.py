"""Ranks: the only file that knows that several processes may train one model.

`torchrun --nproc-per-node N -m dmjd VERB ...` starts N processes, the ranks. Each takes its share of every batch and of
every evaluation; only rank 0 writes files and prints. Without torchrun there is one rank and no process group, and
nothing here changes what that one process does.
"""

import copy
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from dmjd.data.workers import usable_cores
from dmjd.engine.device import Float32Attention, choose_device, memory_errors
from dmjd.engine.watch import this_process, watching
from dmjd.errors import ConfigError, Stopped, one_line

T = TypeVar("T")
Parallel = Literal["ddp", "fsdp"]
Compile = Literal["auto", "on", "off"]
SMALLER = "give a smaller --batch_size, or choose cpu for --device"
REPAID = 2000  # steps after which a minute or two of compiling has paid off on a GPU
# How long ranks wait for one that works alone, such as listing tens of millions of files: torch's 30 minutes are too
# short for that. `watch` finds ranks that have died or are stopped; NCCL keeps its own timeout of 10 minutes.
TIMEOUT = timedelta(hours=2)
# A transformer block, by timm's names: the unit of FSDP's sharding and of activation checkpointing.
BLOCK = re.compile(r"(^|\.)blocks\d*\.\d+$")
# Numbers the process groups of a process: each leaves its addresses in the store, which the next one would take for
# its own.
MEETINGS = count()


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: Device of this rank.
        rank: Its number.
        world_size: Number of ranks.
        talk: Group for short messages between CPUs; it never waits for a GPU.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    talk: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def number(self, part: int) -> int:
        """Compute the number of a micro-batch of this rank among those of all ranks in a step."""
        return part * self.world_size + self.rank

    def micro_batch(self, batch_size: int, accumulation: int = 1) -> int:
        """Compute the images in one micro-batch of a rank.

        Raises:
            ConfigError: If the batch size is not a multiple of the number of micro-batches of all ranks.
        """
        parts = accumulation * self.world_size
        if batch_size % parts:
            of = [f"{self.world_size} processes"] * (self.world_size > 1)
            of += [f"optim.accumulation {accumulation}"] * (accumulation > 1)
            said = f"batch_size {batch_size} is no multiple of {' x '.join(of)}"
            raise ConfigError(f"{said}; choose a multiple of {parts}")
        return batch_size // parts

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of the items of an evaluation: every world_size-th."""
        return items[self.rank :: self.world_size]

    def agree(self, *flags: bool) -> list[bool]:
        """Tell for each flag whether any rank has set it."""
        if self.world_size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.talk)
        return raised.bool().tolist()

    def gather(self, item: T) -> list[T]:
        """Collect an object from every rank, in their order, on all of them."""
        items: list[Any] = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item, group=self.talk)
        return items

    def gather_on_main(self, item: T) -> list[T]:
        """Collect an object from every rank, in their order, on rank 0; other ranks get an empty list."""
        items: list[Any] = [item] * self.world_size if self.is_main else []
        if self.world_size > 1:
            dist.gather_object(item, items or None, group=self.talk)
        return items

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something and send the result, or the error, to all ranks; the others wait for it."""
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:  # it is raised on every rank, so that none waits forever
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.talk)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something, then the others the same with its files on disk; each gets its own result."""
        done: list[T] = []
        self.on_main(lambda: done.append(work()))
        return done[0] if done else work()

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average scalars over the ranks, which all have the same number of images."""
        if self.world_size == 1:
            return dict(values)
        stacked = torch.stack([*values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, stacked / self.world_size, strict=True))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started, if any; ranks other than 0 print nothing meanwhile.

    Args:
        device: As `choose_device` takes it. Of several GPUs, each rank uses that of its local rank.

    Raises:
        ConfigError: If these ranks cannot use the device, or do not meet; if srun has started several processes without
            torchrun; from within, if memory runs out.
        Stopped: If another rank has ended early.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun only; every batch script has the count of its job
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        such = f"srun has started {tasks} processes that are not connected; SLURM_STEP_NUM_TASKS"
        how = "start torchrun in one task a node (see dmjd plan --script slurm), or set WORLD_SIZE=1 for runs apart"
        raise ConfigError(f"{such}; {how}")
    if (cores := usable_cores()) < torch.get_num_threads():  # torch counts those of the whole machine
        torch.set_num_threads(cores)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    chosen = device_of(rank, world_size, device)
    current = torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext()  # for events and pinned memory
    ours = world_size > 1 and not dist.is_initialized()  # a script that runs several verbs may have initialised it
    if ours and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        such = f"WORLD_SIZE is {world_size}, but MASTER_ADDR or MASTER_PORT is not set"
        raise ConfigError(f"{such}; start by torchrun, which sets all three, or set WORLD_SIZE=1")
    with watching(rank) as processes, memory_errors(SMALLER), current, ExitStack() as silence:
        if world_size == 1:
            yield Ranks(chosen)
            return
        if ours:
            meeting = dist.PrefixStore(f"{next(MEETINGS)}", store())
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=meeting, rank=rank, world_size=world_size)
        ranks = Ranks(chosen, rank, world_size, dist.new_group(backend="gloo", timeout=TIMEOUT))
        processes[:] = ranks.gather(this_process(rank))
        if rank:
            nowhere = silence.enter_context(Path(os.devnull).open("w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        with losing_others():
            yield ranks
    if ours:
        dist.destroy_process_group()  # not after an error: this would wait for ranks that still wait for this one


def device_of(rank: int, world_size: int, device: str) -> torch.device:
    """Choose the device of a rank: of several GPUs, that of its local rank.

    Raises:
        ConfigError: If the device is unknown, absent, the same for all ranks, or of a kind on which they cannot
            communicate; if the machine has fewer GPUs than ranks.
    """
    if world_size > 1 and ":" in device:
        raise ConfigError(f"{world_size} processes cannot share a device; --device {device}; leave its number out")
    chosen = choose_device(device)
    if world_size == 1 or chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ConfigError(f"{world_size} processes cannot communicate on {chosen.type}; --device {device}; choose cpu")
    place, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    if place >= gpus:
        such = f"more processes than GPUs on this machine, which has {gpus}"
        raise ConfigError(f"{such}; --device {device}; start one process for each GPU")
    return torch.device("cuda", place)


@cache
def store() -> dist.Store:
    """Connect to the key-value store of the ranks, once per process.

    Raises:
        ConfigError: If that fails.
    """
    try:
        found: dist.Store = next(iter(dist.rendezvous("env://")))[0]
    except (dist.DistError, ValueError) as error:  # a port in use, a rank that never came, RANK is not set
        such = f"the processes do not meet ({one_line(error, 200)}); MASTER_ADDR and MASTER_PORT"
        raise ConfigError(f"{such}; start by torchrun, which sets all that is needed") from None
    return found


@contextmanager
def losing_others() -> Iterator[None]:
    """Turn errors of collective operations into a stop: another rank has ended.

    Raises:
        Stopped: If one failed.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        reason = " ".join(str(error).split("] ", 1)[-1].split())[:80]
        raise Stopped(f"stopped, as another process has ended ({reason})") from None


def cause(error: Exception) -> str:
    """Extract the last error from a compiler's message, which may contain tracebacks of other processes.

    Triton's errors say where in their first line, and what in the last.
    """
    errors = re.findall(r"^[\w.]+(?:Error|Exception): .+(?:\n.+)*", str(error), re.MULTILINE)
    first, *others = (errors or [str(error).strip()])[-1].splitlines()
    return " ".join(f"{first} {others[-1] if others and first.endswith(':') else ''}".split())[:200]


class ParallelModel:
    """A network that all ranks train: as it is (one rank), replicated (DDP), or sharded (FSDP2).

    DDP keeps all weights, gradients and optimizer states on every rank. FSDP keeps a shard of each on a rank, and
    gathers the weights of a block while it computes. Modules that are not part of checkpoints, such as a frozen
    teacher, are not sharded.

    Args:
        module: The network, on this rank's device and the same on all ranks. FSDP changes its parameters, so the
            optimizer has to be made afterwards.
        ranks: Ranks that train.
        parallel: `ddp` or `fsdp`.
        compile: Compile forward and backward pass with torch.compile: always, never, or on GPUs in long runs.
        checkpointing: Keep only the inputs of every block, and recompute the rest in the backward pass.
        all_used: Whether every step uses every weight; if not, DDP has to find out which ones.

    Attributes:
        module: The network itself, whose parameters are trained.
        compiled: Whether its steps are compiled.
    """

    def __init__(
        self,
        module: nn.Module,
        ranks: Ranks,
        *,
        parallel: Parallel = "ddp",
        compile: Compile = "off",
        checkpointing: bool = False,
        all_used: bool = True,
    ):
        self.ranks, self.compile, self.compiled = ranks, compile, False
        if checkpointing:
            recompute(module)
        self._copy: nn.Module | None = None
        if ranks.world_size > 1 and ranks.device.type == "cuda":  # for statistics of the whole batch; GPUs only
            module = convert_sync_batchnorm(module)  # timm's: torch's would drop the activations of BatchNormAct2d
        self.module = module
        if ranks.world_size > 1 and parallel == "fsdp":
            saved = module.state_dict().keys()
            whole = {parameter for name, parameter in module.named_parameters() if name not in saved}
            self._copy = copy.deepcopy(module, {id(parameter): parameter for parameter in whole})
            shard(module, init_device_mesh(ranks.device.type, (ranks.world_size,)), whole)
        self._forward: Any = module
        if ranks.world_size > 1 and parallel == "ddp":
            device_ids = [ranks.device] if ranks.device.type == "cuda" else None
            self._forward = DistributedDataParallel(module, device_ids=device_ids, find_unused_parameters=not all_used)

    def __call__(self, *arguments: Any) -> Any:
        """Run the network's forward pass."""
        if torch.is_autocast_enabled("cpu") and self.ranks.device.type == "cpu":
            with Float32Attention():
                return self._run(*arguments)
        return self._run(*arguments)

    def _run(self, *arguments: Any) -> Any:
        if self.compiled:
            try:
                return self._forward(*arguments)
            except TorchDynamoException as error:
                self.compiled, self.module._compiled_call_impl = False, None
                print(
                    f"warning: torch cannot compile ({cause(error)}); --compile; the run goes on without",
                    file=sys.stderr,
                )
        return self._forward(*arguments)

    def begin(self, steps: int) -> None:
        """Compile the network, if that is asked for or pays off in so many steps; the first step then takes minutes."""
        pays = self.ranks.device.type == "cuda" and steps >= REPAID
        if self.compile == "on" or (self.compile == "auto" and pays):
            # Compile the backward pass with the forward pass: in the first backward pass a failure could not be caught.
            torch._functorch.config.force_non_lazy_backward_lowering = True
            self.module.compile()
            self.compiled = True

    def plainly(self) -> AbstractContextManager[None]:
        """Make a context in which the network runs uncompiled, for batches of other sizes."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def synchronized(self, last: bool) -> AbstractContextManager[None]:
        """Make the context of a forward and a backward pass; only the last one of a step averages over the ranks."""
        if isinstance(self._forward, FSDPModule):
            self._forward.set_requires_gradient_sync(last)
        elif isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return nullcontext()

    def whole(self) -> nn.Module:
        """Return the network with unsharded weights, to evaluate or save: with FSDP, a copy with the current weights.

        All ranks have to call this together.
        """
        if self._copy is None:
            return self.module
        copies = self._copy.state_dict()
        for name, value in self.module.state_dict().items():  # one by one: there is no room for two whole networks
            copies[name].copy_(whole(value))
        return self._copy


def recompute(module: nn.Module) -> None:
    """Make the blocks of a network keep only their inputs; the backward pass recomputes the rest.

    Raises:
        ConfigError: If no block is trained.
    """
    blocks = [
        block
        for name, block in module.named_modules()
        if BLOCK.search(name) and any(parameter.requires_grad for parameter in block.parameters())
    ]
    if not blocks:
        raise ConfigError("no block of the network is trained; --activation_checkpointing; leave it out")
    for block in blocks:
        block.forward = partial(computed_again, block.forward)


def computed_again(forward: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    """Run a forward pass without keeping its intermediate activations."""
    # Torch function modes are off in a backward pass, so the current one is passed on; the compiler does that itself.
    mode = None if torch.compiler.is_compiling() else _get_current_function_mode()
    if mode is not None:
        keywords["context_fn"] = lambda: (nullcontext(), mode)
    return checkpoint(forward, *arguments, use_reentrant=False, **keywords)


def shard(module: nn.Module, mesh: Any, ignored: set[nn.Parameter]) -> None:
    """Shard a network's parameters block by block, and those outside any block together."""
    for name, block in module.named_modules():
        if BLOCK.search(name) and not ignored.intersection(block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=ignored)


def whole(value: Tensor) -> Tensor:
    """Gather a sharded tensor, which all ranks have to do together; return any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shared_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a tensor like a parameter of the same shape; a tensor of another shape, a counter, is not sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
