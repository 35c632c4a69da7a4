"""How long parts of a model compute."""

import time

import pytest
import torch
from torch import nn

from dmjd.engine.stopwatch import Stopwatch


class Sleep(nn.Module):
    def forward(self, seconds):
        time.sleep(seconds)


def test_stopwatch__sums_the_forward_passes_of_its_modules_since_the_last_reading():
    timed, other = Sleep(), Sleep()
    stopwatch = Stopwatch(torch.device("cpu"), [timed])
    assert stopwatch.read() == 0
    for _ in range(3):
        timed(0.02)
        other(0.1)
    assert 0.06 <= stopwatch.read() < 0.3
    assert stopwatch.read() == 0


def test_stopwatch__counts_the_time_until_items_are_there_and_none_in_between():
    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    stopwatch = Stopwatch(torch.device("cpu"))
    for place, item in enumerate(stopwatch.timed(slow())):
        assert item == place
        time.sleep(0.1)
    assert 0.06 <= stopwatch.read() < 0.3


def test_stopwatch__a_pass_that_raised_is_left_out():
    timed = Sleep()
    stopwatch = Stopwatch(torch.device("cpu"), [timed])
    with pytest.raises(ValueError, match="non-negative"):
        timed(-1)
    time.sleep(0.1)
    timed(0.02)
    assert 0.02 <= stopwatch.read() < 0.12
