"""What a step sees is a function of the seed and the step, cut among ranks without loss."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd.data.sampler import StepSampler, order

sizes = st.integers(1, 40)


def flat(sampler: StepSampler) -> list[tuple[int, int]]:
    return [key for micro in sampler for key in micro]


@given(count=sizes, batch_size=sizes, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_sampler__every_epoch_shows_every_image_once_in_an_order_of_its_own(
    count: int, batch_size: int, seed: int
) -> None:
    steps = -(-3 * count // batch_size)
    keys = flat(StepSampler(count, batch_size, 0, steps, seed))
    assert len(keys) == steps * batch_size
    for epoch in range(3):
        shown = [index for at, index in keys if at == epoch]
        assert sorted(shown) == list(range(count))
        assert shown == order(seed, epoch, count).tolist()
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)


def test_order__differs_between_epochs_and_seeds() -> None:
    orders = {tuple(order(seed, epoch, 50).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(
    count=sizes,
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    start=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_sampler__ranks_and_accumulation_partition_the_batch_of_one_process(
    count: int, micro: int, accumulation: int, world_size: int, start: int
) -> None:
    batch_size = micro * accumulation * world_size
    (*whole,) = StepSampler(count, batch_size, start, start + 3, seed=5)
    parts = [
        list(StepSampler(count, batch_size, start, start + 3, 5, accumulation, rank, world_size))
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        mine = [each for part in parts for each in part[step * accumulation : (step + 1) * accumulation]]
        assert all(len(each) == micro for each in mine)
        assert Counter(key for each in mine for key in each) == Counter(expected)
        assert {each.epoch for each in mine} == {expected[0][0]}


@pytest.mark.parametrize(("start", "accumulation"), [(0, 1), (2, 1), (6, 1), (1, 3)])
def test_sampler__know_their_number(start: int, accumulation: int) -> None:
    sampler = StepSampler(10, 6, start, 6, 0, accumulation)
    assert len(sampler) == len(list(sampler)) == (6 - start) * accumulation
