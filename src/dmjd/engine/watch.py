"""Watches over the processes of a run that torchrun has started: none trains on, or waits, for one that is gone.

torchrun ends all ranks when one of them ends with an error. It does not see a rank that is stopped, for which the
others wait without end; and nobody sees the end of torchrun itself, which a signal that it does not pass on, such as
SIGUSR1, ends at once. A thread of every rank looks for both. Without torchrun the ranks are whole: they are sent the
SIGTERM that it owes them, and save.
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

EVERY = 2.0  # seconds between two looks
LOOKS = 5  # in a row at which a rank has to be stopped
LEAVING = 20.0  # seconds to save in without torchrun, unless its own setting for that says another number


class RankProcess(NamedTuple):
    """The process of a rank, as others on the same host find it."""

    rank: int
    host: str
    pid: int
    started: str  # in ticks of the system's clock: a later process of the same number has another one

    @property
    def is_stopped(self) -> bool:
        """Whether it is there and stopped by a signal, where the system tells."""
        return look_at(self.pid) == ("T", self.started)

    @property
    def runs(self) -> bool:
        """Whether it is there and neither stopped nor ended."""
        state, started = look_at(self.pid)
        return started == self.started and state not in ("T", "Z", "X")


def this_process(rank: int) -> RankProcess:
    """Describe the process at hand to the others."""
    return RankProcess(rank, socket.gethostname(), os.getpid(), look_at(os.getpid())[1])


def is_from_torchrun() -> bool:
    """Tell whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def watching(rank: int) -> Iterator[list[RankProcess]]:
    """Watch torchrun, and the ranks that the list is filled with, until the context ends.

    Where torchrun has not started this process there is nothing to watch.
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
    """Look around until it is over, or has to be; of the ranks of a host the first that runs acts and says why."""
    looks: dict[int, int] = {}
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LEAVING))
    ended: float | None = None  # when torchrun was seen to have
    while not over.wait(EVERY):
        here = [each for each in ranks if each.host == socket.gethostname()]
        stopped = [each for each in here if each.is_stopped]
        is_first = rank == next(each.rank for each in here if each.rank == rank or each.runs)
        # Looks are counted, not seconds: whoever was stopped together with all others, by Ctrl-Z, goes on with them.
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
        os._exit(1)  # whatever the main thread waits for


def _stop(ranks: Sequence[RankProcess]) -> None:
    """Send the signal that torchrun would have sent, unless it has: a second one would not let them save.

    Hosts may have one name, and numbers of processes are used again: only what is a rank is sent it.
    """
    if not stopping():
        for each in (rank for rank in ranks if rank.runs):
            with suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGTERM)


def _say(line: str) -> None:
    with suppress(OSError):  # torchrun may have taken stderr with it
        print(line, file=sys.__stderr__, flush=True)
