"""Real steps of the real network on the device of this machine: their time and memory."""

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

MOST = 2**14  # largest batch to try
APART = 4  # ratio of the two batch sizes that are timed
STEPS = 2  # fewest steps to time, after one to warm up
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


class Timed(NamedTuple):
    """Steps of one size.

    Attributes:
        batch: Images per step.
        seconds: Median time of a step.
        memory: Peak memory in bytes, without what was in use before the network; None where it cannot be measured.
    """

    batch: int
    seconds: float
    memory: float | None


class Trial(NamedTuple):
    """Measurements of real steps.

    Attributes:
        small, large: Steps of two batch sizes, which may be the same.
        largest: Largest batch that fits, of those tried.
    """

    small: Timed
    large: Timed
    largest: int

    @property
    def image(self) -> float:
        """Seconds per additional image."""
        few, many = self.small, self.large
        if few.batch == many.batch:
            return few.seconds / few.batch
        return max(many.seconds - few.seconds, 0.1 * many.seconds) / (many.batch - few.batch)

    @property
    def step(self) -> float:
        """Seconds that a step takes in addition to its images."""
        return max(self.large.seconds - self.large.batch * self.image, 0.0)


@dataclass
class Bench:
    """A network in training on the device of this machine.

    Args:
        parts: Parts of its steps.
        device: Device that computes.
        precision: The setting `precision`.
        clock: Returns seconds.
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
            OutOfMemoryError: If the device runs out of memory.
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
        """Synchronise with a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, batch: int, seconds: float) -> Timed:
        """Time steps of one batch size for `seconds`, at least two."""
        forget_peak(self.device)
        taken: list[float] = []
        while len(taken) < STEPS or sum(taken) < seconds:
            taken.append(self.step(batch))
        return Timed(batch, median(taken), self.peak())

    def peak(self) -> float | None:
        """Return the peak memory in bytes since `forget_peak`, without what was in use before the network."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        most, code = resident("VmHWM"), resident("RssFile")  # RssFile: libraries that were loaded meanwhile
        return None if most is None or code is None else float(most - code - self.before)


def try_steps(bench: Bench, work: Work, *, usable: float, most: int, seconds: float) -> Trial:
    """Double the batch while it fits and there is time; then time steps of two sizes.

    Args:
        bench: Network to time.
        work: Counted work; on a CPU, batches stay within the usable memory by this count.
        usable: Usable memory in bytes.
        most: Largest batch of interest.
        seconds: Time that the measurement should take.

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
        # A batch twice as large is warmed up and timed, and so is a smaller one: at least four times as much work.
        late = not on_gpu and time.perf_counter() + 2 * (STEPS + 1) * took > ended
        if not fits or late or 2 * batch > min(most, MOST):
            break
        batch *= 2
    if on_gpu:
        torch.cuda.empty_cache()
    if not fitting:
        raise ConfigError(f"out of memory with one image; {bench.device}; give --activation_checkpointing or --device")
    rest = max(ended - time.perf_counter(), 0.0) / 2
    small = bench.timed(max(fitting // APART, 1), rest)
    large = bench.timed(fitting, rest) if fitting > 1 else small
    return Trial(small, large, fitting)


def resident(name: str) -> int | None:
    """Read the resident memory of this process in bytes: RssAnon, RssFile, or VmHWM for its peak; Linux only."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def forget_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            RESET.write_text("5")
