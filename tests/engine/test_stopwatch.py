"""How long parts of a model compute."""

import time

import torch
from torch import nn

from dmjd.engine.stopwatch import Stopwatch


class Sleep(nn.Module):
    def forward(self, seconds):
        time.sleep(seconds)


def test_stopwatch__sums_the_forward_passes_of_its_modules_since_the_last_reading():
    timed, other = Sleep(), Sleep()
    stopwatch = Stopwatch([timed], torch.device("cpu"))
    assert stopwatch.read() == 0
    for _ in range(3):
        timed(0.02)
        other(0.1)
    assert 0.06 <= stopwatch.read() < 0.1
    assert stopwatch.read() == 0
