"""Progress of a run: a bar on a terminal and in a notebook, a line a minute elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm as plain
from tqdm.auto import tqdm

EVERY = 60.0  # seconds between two lines


class Progress:
    """Shows the steps of a run and their latest measurements.

    Args:
        total: Steps of the whole run.
        silent: Show nothing, as on all ranks but the first.
    """

    def __init__(self, total: int, *, silent: bool):
        self.total, self.silent = total, silent
        self.has_bar = not silent and (sys.stderr.isatty() or (tqdm is not plain and "ipykernel" in sys.modules))
        self.bar: Any = None
        self.measured: dict[str, str] = {}
        self.start = self.done = 0
        self.began = self.told = 0.0

    @contextmanager
    def shown(self, done: int) -> Iterator[None]:
        """Show progress, from `done` steps on, until the context ends."""
        self.start = self.done = done
        self.began = self.told = time.perf_counter()
        with tqdm(total=self.total, initial=done, desc="training", unit="step", disable=not self.has_bar) as self.bar:
            yield

    def measure(self, measured: Mapping[str, str]) -> None:
        """Set the measurements of the latest steps, by name."""
        self.measured = dict(measured)
        self.bar.set_postfix(self.measured, refresh=False)

    def move(self, done: int) -> None:
        """Set the number of steps done; a minute after the last line, print another."""
        self.done = done
        self.bar.update(done - self.bar.n)
        if time.perf_counter() - self.told > EVERY:
            self.tell()

    def tell(self, *more: str) -> None:
        """Print a line, unless there is a bar."""
        now = time.perf_counter()
        self.told = now
        if self.silent or self.has_bar:
            return
        steps = self.done - self.start
        left = (now - self.began) / steps * (self.total - self.done) if steps > 0 else None
        parts = [f"{name} {value}" for name, value in self.measured.items()]
        parts += [] if left is None else [f"{plain.format_interval(left)} left"]
        said = ", ".join([*parts, *more])
        print(f"step {self.done}/{self.total}: {said}", file=sys.stderr, flush=True)


def two_digits(number: float) -> str:
    """Write a number with two digits, or all that it has in front of the point."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
