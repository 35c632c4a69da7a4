"""Watches over the processes of a run that torchrun has started: none trains on, or waits, for one that is gone.

torchrun ends all ranks when one of them ends with an error. It does not see a rank that is stopped, for which the
others wait without end; and nobody sees the end of torchrun itself. A thread of every rank looks for both.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

EVERY = 2.0  # seconds between two looks
LOOKS = 5  # in a row at which a rank has to be stopped


class RankProcess(NamedTuple):
    """The process of a rank, as others on the same host find it."""

    rank: int
    host: str
    pid: int
    started: str  # in ticks of the system's clock: a later process of the same number has another one

    @property
    def is_stopped(self) -> bool:
        """Whether it is there and stopped by a signal, where the system tells."""
        return _look(self.pid) == ("T", self.started)


def this_process(rank: int) -> RankProcess:
    """Describe the process at hand to the others."""
    return RankProcess(rank, socket.gethostname(), os.getpid(), _look(os.getpid())[1])


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
    """Look around until it is over, or has to be; of the ranks of a host the first that runs acts and says why.

    The others leave it the time to do so: if they ended before, it would know no more than that they did.
    """
    looks: dict[int, int] = {}
    orphaned = 0  # looks
    while not over.wait(EVERY):
        here = [each for each in ranks if each.host == socket.gethostname()]
        stopped = [each for each in here if each.is_stopped]
        first = next(each.rank for each in here if each not in stopped)
        # Looks are counted, not seconds: whoever was stopped together with all others, by Ctrl-Z, goes on with them.
        looks = {each.pid: looks.get(each.pid, 0) + 1 for each in stopped}
        too_long = [each for each in stopped if looks[each.pid] >= LOOKS]
        orphaned += os.getppid() != torchrun
        if orphaned and (rank == first or orphaned > 2):
            why = f"torchrun (process {torchrun}) has ended"
        elif too_long and rank == first:
            why = f"rank {too_long[0].rank} (process {too_long[0].pid}) was stopped for {LOOKS * EVERY:.0f} s"
        else:
            continue
        if rank == first:
            with suppress(OSError):  # torchrun may have taken stderr with it
                print(f"error: {why}; all processes end; go on with --resume", file=sys.__stderr__, flush=True)
        for each in stopped:  # they cannot end by themselves
            with suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        for child in multiprocessing.active_children():  # they load images
            child.kill()
        os._exit(1)  # whatever the main thread waits for


def _look(pid: int) -> tuple[str, str]:
    """Read the state of a process, such as R, S, T, and when it started; nothing where there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    except OSError:
        return "", ""
    return fields[0], fields[19]
