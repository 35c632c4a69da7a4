"""Seeds differ where their numbers do, and the global generators come back to where they were."""

import random

import numpy as np
import pytest
import torch

from dmjd.random import mix, seeded


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


def test_mix__every_number_and_its_place_counts():
    seeds = {mix(*numbers) for numbers in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63,)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mix__stays_what_it_was_in_runs_that_go_on():
    assert (mix(0, 1), mix(1, 2, 3)) == (1534736266818221247, 3851293329796251419)


def test_seeded__draws_depend_on_the_seed_alone_and_later_ones_on_nothing_in_between():
    with seeded(3):
        first = drawn()
    before = random.getstate(), torch.get_rng_state()
    expected = np.random.get_state()[1].tolist()  # noqa: NPY002
    with seeded(3):
        assert drawn() == first
    with seeded(4):
        assert drawn() != first
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == expected  # noqa: NPY002


def test_seeded__generators_come_back_after_an_error_too():
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1):
        _ = drawn() and {}["nothing"]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
