"""Real steps of the real network on the device of this machine: their time, and the memory that they need."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dmjd.engine.device import choose_precision, is_memory_error
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.errors import ConfigError
from dmjd.method import DMJD
from dmjd.planning.work import StepParts, Work

MOST = 2**14  # images at a time that are tried
APART = 4  # the larger of the two batches that are timed, over the smaller
STEPS = 2  # that are timed at least, after one to warm up
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


class Timed(NamedTuple):
    """Steps of one size.

    Attributes:
        batch: Images in one.
        seconds: Their median.
        memory: Bytes that were taken at most, beside what was there before the network; None where nobody counts.
    """

    batch: int
    seconds: float
    memory: float | None


class Trial(NamedTuple):
    """What real steps took.

    Attributes:
        small, large: Steps of two sizes; the second may be the first.
        largest: Images at a time that fit, as far as it was tried.
    """

    small: Timed
    large: Timed
    largest: int

    @property
    def image(self) -> float:
        """Seconds that another image takes."""
        few, many = self.small, self.large
        if few.batch == many.batch:
            return few.seconds / few.batch
        return max(many.seconds - few.seconds, 0.1 * many.seconds) / (many.batch - few.batch)

    @property
    def step(self) -> float:
        """Seconds that a step takes beside its images."""
        return max(self.large.seconds - self.large.batch * self.image, 0.0)


@dataclass
class Bench:
    """A network in training on the device of this machine.

    Args:
        parts: What its steps are made of.
        device: Where.
        precision: As settings have it.
        clock: Tells seconds.
    """

    parts: StepParts
    device: torch.device
    precision: str
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.before = resident("RssAnon") or 0
        self.network: DMJD = self.parts.create().to(self.device).train()
        self.model = ParallelModel(self.network, Ranks(self.device))
        self.optimizer: Optimizer = self.parts.optimizer(self.network)
        self.autocast = choose_precision(self.precision, self.device, self.network)

    def step(self, batch: int) -> float:
        """Train on `batch` images of noise once; returns the seconds.

        Raises:
            OutOfMemoryError: If the device has not the memory.
        """
        images, tokens = self.parts.inputs(batch, self.device)
        self.wait()
        began = self.clock()
        with self.autocast():
            loss = self.model(images, tokens).total
        loss.backward()
        get_total_norm([each.grad for each in self.model.parameters if each.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.network.update_targets(0.5)
        self.wait()
        return self.clock() - began

    def wait(self) -> None:
        """Wait for the queue of a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, batch: int, seconds: float) -> Timed:
        """Time steps of one size for so long, two at least."""
        forget_peak(self.device)
        taken: list[float] = []
        while len(taken) < STEPS or sum(taken) < seconds:
            taken.append(self.step(batch))
        return Timed(batch, median(taken), self.peak())

    def peak(self) -> float | None:
        """Count the bytes taken at most since `forget_peak`, beside what was there before the network."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        most, code = resident("VmHWM"), resident("RssFile")  # libraries that were used for the first time
        return None if most is None or code is None else float(most - code - self.before)


def try_steps(bench: Bench, work: Work, *, usable: float, most: int, seconds: float) -> Trial:
    """Double the batch while it fits and there is time; then time steps of two sizes.

    Args:
        bench: What is timed.
        work: What was counted: a CPU is not asked for more memory than is usable by that.
        usable: Bytes.
        most: Images at a time beyond which nobody wants to know.
        seconds: What the timing should take.

    Raises:
        ConfigError: If not even one image fits.
    """
    batch, on_gpu = 1, bench.device.type == "cuda"
    fitting, ended = 0, time.perf_counter() + seconds
    while True:
        try:
            began = time.perf_counter()
            bench.step(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            break
        took, fitting = time.perf_counter() - began, batch
        fits = on_gpu or work.memory(2 * batch) <= usable
        # The larger batch warms up and is timed, and so is a smaller one: that is four times as much and more.
        late = not on_gpu and time.perf_counter() + 2 * (STEPS + 1) * took > ended
        if not fits or late or 2 * batch > min(most, MOST):
            break
        batch *= 2
    if on_gpu:
        torch.cuda.empty_cache()
    if not fitting:
        raise ConfigError(f"out of memory by one image; {bench.device}; give --activation_checkpointing or --device")
    rest = max(ended - time.perf_counter(), 0.0) / 2
    small = bench.timed(max(fitting // APART, 1), rest)
    large = bench.timed(fitting, rest) if fitting > 1 else small
    return Trial(small, large, fitting)


def resident(name: str) -> int | None:
    """Read bytes of this process that are in memory: RssAnon, RssFile, or VmHWM for the most there were; only Linux."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            RESET.write_text("5")
