"""Ranks: the only file that knows that several processes may train one model.

`torchrun --nproc-per-node N -m dmjd VERB ...` starts N processes, the ranks. Each takes its share of every batch and of
every evaluation; rank 0 alone writes files and speaks. Without torchrun there is one rank and no process group, and
everything here is what it would be if the file were not there.
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
from dmjd.errors import ConfigError, Stopped

T = TypeVar("T")
Parallel = Literal["ddp", "fsdp"]
Compile = Literal["auto", "on", "off"]
SMALLER = "give a smaller --batch_size, or choose cpu for --device"
REPAID = 2000  # steps after which a minute or two of compiling have paid on a GPU
# How long ranks wait for one that does something alone, such as listing tens of millions of files: torch's 30 minutes
# are too short for it. Who is dead or stopped is found by `watch`, not by waiting; NCCL keeps its own 10 minutes.
TIMEOUT = timedelta(hours=2)
# A block of a transformer, by timm's names: what FSDP shards, and what is computed again, by itself.
BLOCK = re.compile(r"(^|\.)blocks\d*\.\d+$")
# Numbers the groups that a process has been in, one after the other: each leaves its addresses in the store, and the
# next one would take them for its own.
MEETINGS = count()


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: Where this rank computes.
        rank: Its number.
        world_size: How many there are.
        talk: Group for short messages between the CPUs; it waits for no GPU.
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
        """Number a micro-batch of this rank among those of all ranks in a step."""
        return part * self.world_size + self.rank

    def micro_batch(self, batch_size: int, accumulation: int = 1) -> int:
        """Count the images that a rank sees at a time, of a batch over all ranks and parts.

        Raises:
            ConfigError: If ranks and parts do not divide the batch.
        """
        parts = accumulation * self.world_size
        if batch_size % parts:
            of = [f"{self.world_size} processes"] * (self.world_size > 1)
            of += [f"optim.accumulation {accumulation}"] * (accumulation > 1)
            said = f"batch_size {batch_size} is no multiple of {' x '.join(of)}"
            raise ConfigError(f"{said}; choose a multiple of {parts}")
        return batch_size // parts

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Take this rank's share of what is to be evaluated: every world_size-th item."""
        return items[self.rank :: self.world_size]

    def agree(self, *flags: bool) -> list[bool]:
        """Tell of every flag whether any rank has it set."""
        if self.world_size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.talk)
        return raised.bool().tolist()

    def gather(self, item: T) -> list[T]:
        """Collect an object of every rank, in their order, on all of them."""
        items: list[Any] = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item, group=self.talk)
        return items

    def gather_on_main(self, item: T) -> list[T]:
        """Collect an object of every rank, in their order, on rank 0; the others have none."""
        items: list[Any] = [item] * self.world_size if self.is_main else []
        if self.world_size > 1:
            dist.gather_object(item, items or None, group=self.talk)
        return items

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something and hand the result, or the error, to all ranks; the others wait for it."""
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:  # it is raised on every rank, so that none waits for ever
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.talk)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something, then the others the same, who find what it has left on disk; each has its result."""
        done: list[T] = []
        self.on_main(lambda: done.append(work()))
        return done[0] if done else work()

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average scalars over the ranks, which all have equally many images."""
        if self.world_size == 1:
            return dict(values)
        stacked = torch.stack([*values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, stacked / self.world_size, strict=True))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Meet the other ranks that torchrun has started, if it has; ranks but the first are silent meanwhile.

    Args:
        device: As `choose_device` takes it. Of several GPUs every rank has that of its place on the machine.

    Raises:
        ConfigError: If the device is none for these ranks; if srun has started several processes without torchrun; from
            within, if there is no memory left.
        Stopped: If another rank has ended before its time.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of srun alone; that of a job is in every batch script
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        such = f"srun has started {tasks} processes that do not know of each other; SLURM_STEP_NUM_TASKS"
        how = "start torchrun in one task a node (see dmjd plan --script slurm), or set WORLD_SIZE=1 for runs apart"
        raise ConfigError(f"{such}; {how}")
    if (cores := usable_cores()) < torch.get_num_threads():  # torch counts those of the whole machine
        torch.set_num_threads(cores)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    chosen = device_of(rank, world_size, device)
    current = torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext()  # for events and pinned memory
    ours = world_size > 1 and not dist.is_initialized()  # a script that runs several verbs may have begun, and keeps it
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
        dist.destroy_process_group()  # not after an error: others may still wait for this rank, and would be waited for


def device_of(rank: int, world_size: int, device: str) -> torch.device:
    """Choose where a rank computes: of several GPUs, on that of its place on the machine.

    Raises:
        ConfigError: If the device is unknown, absent, one for all ranks, or of a kind on which they cannot meet; if
            the machine has fewer GPUs than ranks.
    """
    if world_size > 1 and ":" in device:
        raise ConfigError(f"{world_size} processes cannot share a device; --device {device}; leave its number out")
    chosen = choose_device(device)
    if world_size == 1 or chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ConfigError(f"{world_size} processes cannot meet on {chosen.type}; --device {device}; choose cpu")
    place, count = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    if place >= count:
        such = f"more processes than GPUs on this machine, which has {count}"
        raise ConfigError(f"{such}; --device {device}; start one process for each GPU")
    return torch.device("cuda", place)


@cache
def store() -> dist.Store:
    """Connect to where ranks leave word for each other, once in a process."""
    found: dist.Store = next(iter(dist.rendezvous("env://")))[0]
    return found


@contextmanager
def losing_others() -> Iterator[None]:
    """Stop where what is done together fails, as another rank has ended.

    Raises:
        Stopped: If so.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        reason = " ".join(str(error).split("] ", 1)[-1].split())[:80]
        raise Stopped(f"stopped, as another process has ended ({reason})") from None


def cause(error: Exception) -> str:
    """Find what was wrong in what a compiler says, which may hold the tracebacks of other processes: its last error.

    Triton's say where in their first line, and what in the last.
    """
    errors = re.findall(r"^[\w.]+(?:Error|Exception): .+(?:\n.+)*", str(error), re.MULTILINE)
    first, *others = (errors or [str(error).strip()])[-1].splitlines()
    return " ".join(f"{first} {others[-1] if others and first.endswith(':') else ''}".split())[:200]


class ParallelModel:
    """A network that all ranks train: as it is (one rank), copied to each (DDP), or shared out among them (FSDP2).

    DDP keeps whole weights, gradients and optimizer states on every rank. FSDP keeps a share of each on a rank and
    brings the weights of a block together while it computes. What is no part of checkpoints, a frozen teacher, stays
    whole on every rank.

    Args:
        module: The network, on this rank's device and the same on all ranks. FSDP changes its parameters, so the
            optimizer has to be made afterwards.
        ranks: Who trains.
        parallel: `ddp` or `fsdp`.
        compile: Compile forward and backward pass by torch.compile: always, never, or on GPUs in runs that are long.
        checkpointing: Keep of every block only what goes in, and compute the rest again in the backward pass.
        all_used: Whether every step uses every weight; if not, DDP has to look which it used.

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
        if ranks.world_size > 1 and ranks.device.type == "cuda":  # statistics of the whole batch; GPUs only
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
        """Compile the network for so many steps, if that is asked for or pays; the first step then takes minutes."""
        pays = self.ranks.device.type == "cuda" and steps >= REPAID
        if self.compile == "on" or (self.compile == "auto" and pays):
            # With the forward pass, not within the first backward pass: there a failure could not be caught.
            torch._functorch.config.force_non_lazy_backward_lowering = True
            self.module.compile()
            self.compiled = True

    def plainly(self) -> AbstractContextManager[None]:
        """Make the context in which the network runs as it is, compiled or not: for batches of other sizes."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def synchronized(self, last: bool) -> AbstractContextManager[None]:
        """Make the context of a forward and a backward pass: only the last one of a step averages over the ranks."""
        if isinstance(self._forward, FSDPModule):
            self._forward.set_requires_gradient_sync(last)
        elif isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return nullcontext()

    def whole(self) -> nn.Module:
        """Return the network with whole weights, to evaluate or to write: under FSDP a copy, as it is now.

        All ranks have to call this together.
        """
        if self._copy is None:
            return self.module
        copies = self._copy.state_dict()
        for name, value in self.module.state_dict().items():  # one by one: there is no room for two whole networks
            copies[name].copy_(whole(value))
        return self._copy


def recompute(module: nn.Module) -> None:
    """Have the blocks of a network keep what goes into them alone; the backward pass computes the rest again.

    Raises:
        ConfigError: If there are none.
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
    """Run a forward pass whose inside is not kept."""
    # Modes of torch functions are off in a backward pass; the compiler sees through this by itself.
    mode = None if torch.compiler.is_compiling() else _get_current_function_mode()
    if mode is not None:
        keywords["context_fn"] = lambda: (nullcontext(), mode)
    return checkpoint(forward, *arguments, use_reentrant=False, **keywords)


def shard(module: nn.Module, mesh: Any, ignored: set[nn.Parameter]) -> None:
    """Share a network's parameters out, block by block, and those outside of any block together."""
    for name, block in module.named_modules():
        if BLOCK.search(name) and not ignored.intersection(block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=ignored)


def whole(value: Tensor) -> Tensor:
    """Bring a tensor that is shared out together; all ranks have to do it. Any other is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shared_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Share a whole tensor out as a parameter of its shape is; one of another shape, a counter, stays whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
