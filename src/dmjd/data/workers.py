"""Worker processes that load batches: watched while they run, and ended with the process that started them."""

import atexit
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from dmjd.errors import ConfigError, UserError

LOOK = 5  # seconds between two checks of the workers
# Control group of a container, and its files with quota and period of CPU time, in versions 2 and 1.
QUOTA = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
# Signals that schedulers and terminals send to all processes of a run: the main process handles them, and needs its
# workers to the end.
TO_THE_GROUP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def usable_cores() -> int:
    """Count the cores for this process: its share of those of the machine or container, next to other ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in QUOTAS:
        with suppress(OSError, ValueError):  # no such files, or no limit: max
            quota, period = map(int, " ".join((QUOTA / name).read_text() for name in files).split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def load_batches(
    samples: Any,
    keys: Iterable[list[Any]],
    collate: Callable[[list[Any]], Any],
    *,
    workers: int,
    pin_memory: bool,
    generator: Generator | None = None,
) -> Iterable[Any]:
    """Load batches by their keys, in order, in worker processes or in this one.

    Args:
        samples: Samples by key: one by one, or those of a batch by `__getitems__`.
        keys: Keys of every batch.
        collate: Makes a batch from samples.
        workers: Number of worker processes; 0 for none.
        pin_memory: Make copies to a GPU asynchronous.
        generator: Seeds the workers. Default: torch's global generator.

    Raises:
        ConfigError: On iteration, if a worker was killed, failed, or was stopped and not continued.
    """
    loader = DataLoader(
        cast("Dataset[Any]", _Excused(samples) if workers else samples),
        batch_sampler=keys,
        collate_fn=partial(_collate_excused, collate) if workers else collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=generator,
        multiprocessing_context=_Context() if workers else None,
        worker_init_fn=partial(_set_up_worker, parent=os.getpid()) if workers else None,
    )
    return _Watched(loader) if workers else loader


class _Worker(SpawnProcess):
    """A process that only SIGKILL ends: SIGTERM is sent to the whole group, and is blocked here."""

    def terminate(self) -> None:
        """Kill it; torch calls this for a worker that does not exit by itself."""
        self.kill()


@atexit.register
def _end_workers() -> None:
    """End those that an error on its way out still holds, before Python sends them SIGTERM and waits for ever."""
    for process in multiprocessing.active_children():
        if isinstance(process, _Worker):
            process.kill()


class _Context(SpawnContext):
    """Spawns workers as new processes: fork with threads deadlocks (CPython gh-112275)."""

    Process = _Worker


@contextmanager
def _blocked() -> Iterator[None]:
    """Block signals to the whole group for processes started inside; those for this one arrive afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up_worker(worker: int, parent: int) -> None:
    """Keep a worker from competing for others' cores, and from outliving the process `parent`."""
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process soon after its parent: torch's own watchdog misses one that ends while workers start."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@dataclass(frozen=True)
class _Excused:
    """Samples of a worker that return a `UserError` instead of raising it, since torch would add a traceback."""

    samples: Any

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.samples[key]
        except UserError as error:
            return error

    def __getitems__(self, keys: list[Any]) -> Any:
        if not hasattr(self.samples, "__getitems__"):
            return [self[key] for key in keys]
        try:
            return self.samples.__getitems__(keys)
        except UserError as error:
            return [error]


def _collate_excused(collate: Callable[[list[Any]], Any], samples: Any) -> Any:
    error = next((each for each in samples if isinstance(each, UserError)), None)
    return collate(samples) if error is None else error


@dataclass(frozen=True)
class _Watched:
    """Batches of workers that are checked every few seconds."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        # torch's SIGCHLD handler would raise an error about a worker at whatever point the main process is.
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        with _blocked():  # else signals would end Python's resource tracker, which would say so at length
            resource_tracker.ensure_running()
        with _blocked():
            try:
                batches: Any = iter(self.loader)
            except RuntimeError as error:
                raise _of_sharing(error) from None
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        stopped, over = set[int](), threading.Event()
        threading.Thread(target=_watch, args=(batches._workers, stopped, over), daemon=True).start()
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:  # a dead worker's batch cannot be received
                    raise _reason(batches._workers, stopped, error) from None
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            over.set()


def _watch(workers: Sequence[SpawnProcess], stopped: set[int], over: threading.Event) -> None:
    """Kill workers that are stopped at two checks in a row, and note their pids.

    The main process may wait for one in a system call without a timeout, for a batch or for the memory that it is in. A
    worker that waits for slow storage is not in the stopped state.
    """
    before: set[int] = set()
    while not over.wait(LOOK):
        now = {worker.pid for worker in workers if worker.pid and look_at(worker.pid)[0] == "T"}
        stopped |= now & before
        for worker in workers:
            if worker.pid in stopped:
                worker.kill()
        before = now


def _reason(workers: Sequence[SpawnProcess], stopped: set[int], error: Exception) -> Exception:
    """Find out why no batch came: a worker was stopped and then killed, was killed or failed; else return `error`."""
    # The batch that cannot be received is that of a worker about to end, which takes a while if it has much memory.
    ended = connection.wait([worker.sentinel for worker in workers], timeout=10)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(10)  # the sentinel is ready before the exit code is
        if not worker.exitcode:
            continue
        if worker.pid in stopped:
            how, todo = "was stopped by a signal, and is now killed", "let it run, or give --workers 0"
        elif worker.exitcode < 0:
            why = ", perhaps out of memory" if worker.exitcode == -9 else ""
            how, todo = f"was killed by signal {-worker.exitcode}{why}", "give fewer --workers"
        else:
            how, todo = f"ended with exit code {worker.exitcode}", "give fewer --workers"
        return ConfigError(f"a process that loads images {how}; process {worker.pid}, {worker.name}; {todo}")
    return _of_sharing(error)


def _of_sharing(error: Exception) -> Exception:
    """Put in a line what torch says where processes have no memory to share; containers have 64 MB of it by default."""
    if "</torch_" not in str(error):  # the name of such memory
        return error
    return ConfigError("too little memory to share with --workers; /dev/shm; give 0, or docker run --ipc host")


def look_at(pid: int) -> tuple[str, str]:
    """Read the state of a process, such as R, S, T (stopped by a signal, not by a debugger), and its start time.

    Returns:
        Both, the start in ticks of the system's clock; empty strings if there is no such process, or no /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may contain )
    except OSError:
        return "", ""
    return fields[0], fields[19]
