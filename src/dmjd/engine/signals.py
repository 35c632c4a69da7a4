"""Signals end a run where it loses nothing: SIGTERM, Ctrl-C, and SIGUSR1 and SIGHUP, which clusters send.

While images are looked for and while results are written, a signal acts at once. Where a stop has to wait for the end
of something, between two parts of a step or two batches of an evaluation, `patiently` has it noted, and `stopping`
tells. A second signal acts as if nobody listened.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dmjd.errors import Stopped

T = TypeVar("T")
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # some systems lack the last two


class _State:
    received: str | None = None
    patient = 0  # how many `patiently` are open
    advice: Callable[[], str] | None = None


@contextmanager
def stop_signals(advice: Callable[[], str]) -> Iterator[None]:
    """Listen to the signals that stop a run. One that is ignored, as SIGHUP is below nohup, stays ignored.

    Args:
        advice: Says, whenever it is asked, what can be done when the run has stopped.

    Raises:
        Stopped: When one comes and nothing is being done `patiently`.
    """

    def receive(number: int, frame: Any) -> None:
        _State.received = signal.Signals(number).name
        restore()
        if not _State.patient:
            raise stopped()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # others cannot listen
        known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        listened = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, receive) for number in listened}
    _State.advice = advice
    try:
        yield
    finally:
        restore()
        _State.received = _State.advice = None


@contextmanager
def patiently() -> Iterator[None]:
    """Note a signal, and leave it to the code within to look for it."""
    _State.patient += 1
    try:
        yield
    finally:
        _State.patient -= 1


def stopping() -> bool:
    """Tell whether a signal has come."""
    return _State.received is not None


def stopped() -> Stopped:
    """Make what ends the run; on a rank that has no signal of its own, another one has."""
    return Stopped(f"stopped by {_State.received or 'a signal'}", _State.received)


def what_then() -> str:
    """Say what can be done after a stop, as the end of a line; nothing where there is no run to go on with."""
    advice = _State.advice
    return f"; {advice()}" if advice else ""


def stoppable(items: Iterable[T], agree: Callable[[bool], list[bool]]) -> Iterator[T]:
    """Hand out items until a signal comes; then, when all ranks have left the loop, stop all of them.

    Args:
        items: Of this rank; others may have more or fewer.
        agree: Of the ranks.

    Raises:
        Stopped: If any rank has received a signal.
    """
    for item in items:
        if stopping():
            break
        yield item
    if agree(stopping())[0]:
        raise stopped()
