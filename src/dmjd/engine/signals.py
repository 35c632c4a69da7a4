"""Signals stop a run where nothing is lost: SIGTERM, Ctrl-C, and SIGUSR1 and SIGHUP, which clusters send.

While images are listed and while results are written, a signal acts at once. Where a stop has to wait, for the end of a
micro-batch or of a batch of an evaluation, `patiently` defers it, and `stopping` tells that it has come. A second
signal has its default effect.
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
    patient = 0  # number of open `patiently` contexts
    advice: Callable[[], str] | None = None


@contextmanager
def stop_signals(advice: Callable[[], str]) -> Iterator[None]:
    """Handle the signals that stop a run. A signal that is ignored, such as SIGHUP under nohup, stays ignored.

    Args:
        advice: Returns what can be done when the run has stopped.

    Raises:
        Stopped: When a signal comes and no `patiently` is open.
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
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
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
    """Defer signals; the code inside has to check `stopping`."""
    _State.patient += 1
    try:
        yield
    finally:
        _State.patient -= 1


def stopping() -> bool:
    """Tell whether a signal has come."""
    return _State.received is not None


def stopped() -> Stopped:
    """Make the exception that ends the run; on a rank without a signal, another rank has received one."""
    return Stopped(f"stopped by {_State.received or 'a signal'}", _State.received)


def what_then() -> str:
    """Return what can be done after a stop, as the end of a line; empty if there is no run to resume."""
    advice = _State.advice
    return f"; {advice()}" if advice else ""


def stoppable(items: Iterable[T], agree: Callable[[bool], list[bool]]) -> Iterator[T]:
    """Yield items until a signal comes; then, when all ranks have left the loop, stop all of them.

    Args:
        items: Items of this rank; others may have more or fewer.
        agree: `Ranks.agree`.

    Raises:
        Stopped: If any rank has received a signal.
    """
    for item in items:
        if stopping():
            break
        yield item
    if agree(stopping())[0]:
        raise stopped()
