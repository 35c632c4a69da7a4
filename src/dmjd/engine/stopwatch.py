"""Times how long parts of a model compute, and how long a run waits for batches."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Sums the seconds that a device spends in the forward passes of modules, or waits for the items of an iterator.

    On a GPU the marks are CUDA events: nothing synchronises until `read`, and an item that arrives while there is still
    work in the queue takes no time. Modules that are compiled as part of a larger graph are not timed.

    Args:
        device: Device that computes, or waits.
        modules: Modules to time, none inside another.
    """

    def __init__(self, device: torch.device, modules: Iterable[nn.Module] = ()):
        self.on_gpu = device.type == "cuda"
        self.start: Any = None  # of the current span; if that raises, it stays until the next one
        self.spans: list[tuple[Any, Any]] = []  # start and end: events, or seconds
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self._begin())
            module.register_forward_hook(lambda *_: self._end())

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self) -> None:
        if not torch.compiler.is_compiling():
            self.start = self._mark()

    def _end(self) -> None:
        if not torch.compiler.is_compiling():
            self.spans.append((self.start, self._mark()))

    def timed(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield items, and time how long each takes to arrive."""
        end = object()
        while True:
            self._begin()
            item = next(items, end)
            self._end()
            if item is end:
                return
            yield item

    def read(self) -> float:
        """Return the seconds since the last reading; synchronises with a GPU."""
        if self.on_gpu and self.spans:
            torch.cuda.synchronize()
        spans, self.spans = self.spans, []
        if self.on_gpu:
            return sum((start.elapsed_time(end) / 1000 for start, end in spans), 0.0)  # events measure milliseconds
        return sum((end - start for start, end in spans), 0.0)
