"""Seeds differ where their numbers do, and the global generators come back to where they were."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from dmjd.masking import seeded_masks
from dmjd.random import mix, mix_all, seeded, uniforms


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
    drawn()
    before = random.getstate(), torch.get_rng_state()
    expected = np.random.get_state()[1].tolist()  # noqa: NPY002
    with seeded(3):
        assert drawn() == first
    with seeded(4):
        assert all(other != one for one, other in zip(first, drawn(), strict=True))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == expected  # noqa: NPY002


def test_seeded__generators_come_back_after_an_error_too():
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1):
        _ = drawn() and {}["nothing"]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_mix_all__is_mix_for_many_seeds_at_once():
    indices = torch.tensor([0, 1, 2, 77, 2**40, 2**62])
    expected = [mix(2**61 + 3, 5, index, 1) for index in indices.tolist()]
    assert mix_all(2**61 + 3, 5, indices, 1).tolist() == expected
    epochs = torch.arange(6)
    assert mix_all(0, epochs, indices).tolist() == [mix(0, *pair) for pair in zip(range(6), indices.tolist())]  # noqa: B905
    assert (mix_all(0, torch.arange(10_000)) >= 0).all()


def test_mix_all__has_the_same_bits_for_any_threads_and_any_batch():
    indices, threads = torch.arange(100_000), torch.get_num_threads()
    alone = uniforms(mix_all(3, 1, indices), 4)
    try:
        torch.set_num_threads(2)
        assert torch.equal(uniforms(mix_all(3, 1, indices), 4), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(uniforms(mix_all(3, 1, indices[777:780]), 4), alone[777:780])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two devices need a GPU")
def test_mix_all__has_the_same_bits_on_a_gpu():
    indices = torch.arange(100_000)
    assert torch.equal(uniforms(mix_all(3, 1, indices.cuda()), 4).cpu(), uniforms(mix_all(3, 1, indices), 4))
    masks = [
        seeded_masks(mix_all(3, where), (14, 14), num_views=2, mask_ratio=0.6).cpu()
        for where in (indices, indices.cuda())
    ]
    assert torch.equal(*masks)


COUNT = 40_000
VARIED = {
    "index": lambda along: mix_all(0, 0, along),
    "epoch": lambda along: mix_all(0, along, 0),
    "seed": lambda along: mix_all(along, 0, 0),
    "far apart": lambda along: mix_all(2**60, 10**6, along * 2**20),
}


@pytest.mark.parametrize("what", VARIED)
def test_uniforms__are_uniform_whatever_varies(what):
    draws = uniforms(VARIED[what](torch.arange(COUNT)), 4)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
        for bits in (8, 16, 32, 53):  # low bits are as good as high ones
            low = (column * 2.0**bits) % 256
            counts = torch.histc(low.floor(), bins=256, min=0, max=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("what", VARIED)
def test_uniforms__are_independent_of_their_neighbours_and_of_each_other(what):
    draws = uniforms(VARIED[what](torch.arange(COUNT)), 4)
    pairs = [(draws[:-lag, 0], draws[lag:, 0]) for lag in (1, 2, 7, 256)]
    pairs += [(draws[:, first], draws[:, second]) for first in range(4) for second in range(first)]
    pairs += [(draws[:-1, first], draws[1:, second]) for first in range(4) for second in range(4) if first != second]
    for some, others in pairs:
        assert abs(np.corrcoef(some, others)[0, 1]) < 5 / COUNT**0.5
        cells = torch.histogramdd(torch.stack([some, others], dim=1), bins=[16, 16], range=[0.0, 1.0, 0.0, 1.0]).hist
        assert stats.chisquare(cells.flatten().numpy()).pvalue > 1e-5


def test_uniforms__of_different_numbers_never_agree():
    drawn = [uniforms(mix_all(seed, epoch, torch.arange(50)), 2) for seed in range(12) for epoch in range(12)]
    flat = torch.cat(drawn).flatten()
    assert len(flat.unique()) == len(flat)
    assert not set(mix_all(0, 1, torch.arange(99)).tolist()) & set(mix_all(1, 0, torch.arange(99)).tolist())
