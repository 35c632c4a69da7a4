"""Watches the processes of a run under torchrun, so that no rank keeps training, or waiting, after another has gone.

torchrun ends all ranks when one of them ends with an error. It does not notice a rank that is stopped, for which the
others wait forever; and nothing notices the end of torchrun itself, which dies at once from a signal that it does not
pass on, such as SIGUSR1. A thread of every rank checks for both. If torchrun has ended, the ranks can still save: they
are sent the SIGTERM that torchrun should have sent.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from dmjd.data.workers import look_at
from dmjd.engine.signals import stopping, what_then

EVERY = 2.0  # seconds between two checks
LOOKS = 5  # checks in a row that have to find a rank stopped
LEAVING = 20.0  # seconds for saving after torchrun has ended, unless its own setting gives another number


class RankProcess(NamedTuple):
    """The process of a rank, as identified by others on the same host."""

    rank: int
    host: str
    pid: int
    started: str  # in ticks of the system's clock, to tell it from a later process with the same pid

    @property
    def is_stopped(self) -> bool:
        """Whether it exists and is stopped by a signal, on systems with /proc."""
        return look_at(self.pid) == ("T", self.started)

    @property
    def runs(self) -> bool:
        """Whether it exists and is neither stopped nor ended."""
        state, started = look_at(self.pid)
        return started == self.started and state not in ("T", "Z", "X")


def this_process(rank: int) -> RankProcess:
    """Describe this process to the others."""
    return RankProcess(rank, socket.gethostname(), os.getpid(), look_at(os.getpid())[1])


def is_from_torchrun() -> bool:
    """Tell whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def watching(rank: int) -> Iterator[list[RankProcess]]:
    """Watch torchrun, and the ranks that the caller puts into the list, until the context ends.

    Without torchrun there is nothing to watch.
    """
    ranks = [this_process(rank)]
    over = threading.Event()
    if is_from_torchrun():
        threading.Thread(target=_watch, args=(rank, os.getppid(), ranks, over), daemon=True, name="watch").start()
    try:
        yield ranks
    finally:
        over.set()


def _watch(rank: int, torchrun: int, ranks: Sequence[RankProcess], over: threading.Event) -> None:
    """Check until the run is over, or has to end; of the ranks of a host, the first that runs acts and says why."""
    looks: dict[int, int] = {}
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LEAVING))
    ended: float | None = None  # when torchrun was found to have ended
    while not over.wait(EVERY):
        here = [each for each in ranks if each.host == socket.gethostname()]
        stopped = [each for each in here if each.is_stopped]
        is_first = rank == next(each.rank for each in here if each.rank == rank or each.runs)
        # Checks are counted, not seconds: a rank that was stopped together with all others, by Ctrl-Z, goes on with
        # them.
        looks = {each.pid: looks.get(each.pid, 0) + 1 for each in stopped}
        too_long = [each for each in stopped if looks[each.pid] >= LOOKS]
        gone = f"torchrun (process {torchrun}) has ended"
        if ended is None and os.getppid() != torchrun:
            ended = time.monotonic()
            if is_first:
                _say(f"warning: {gone}; all processes stop")
                _stop(here)
        if ended is not None and time.monotonic() - ended > patience:
            why = f"{gone}, and rank {rank} did not stop within {patience:.0f} s"
        elif too_long and is_first:
            why = f"rank {too_long[0].rank} (process {too_long[0].pid}) was stopped for {LOOKS * EVERY:.0f} s"
        else:
            continue
        if is_first:
            _say(f"error: {why}; all processes end{what_then()}")
        for each in stopped:  # they cannot end by themselves
            with suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        for child in multiprocessing.active_children():  # they load images
            child.kill()
        os._exit(1)  # whatever the main thread is waiting for


def _stop(ranks: Sequence[RankProcess]) -> None:
    """Send the signal that torchrun would have sent, unless it did: a second one would not let the ranks save.

    Hosts may share a name, and pids are reused: only processes that are ranks are sent it.
    """
    if not stopping():
        for each in (rank for rank in ranks if rank.runs):
            with suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGTERM)


def _say(line: str) -> None:
    with suppress(OSError):  # torchrun may have taken stderr with it
        print(line, file=sys.__stderr__, flush=True)
