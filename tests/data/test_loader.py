"""Batches are a function of the seed and the step alone."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.data.crops import random_crop
from dmjd.data.loader import Batch, Samples, StepSampler, collate, order, read_or_substitute, train_batches
from dmjd.data.source import folder_images, in_memory
from dmjd.errors import DataError
from dmjd.masking import block_masks

COUNT = 11
BAD = "006.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    (root / BAD).write_bytes((root / BAD).read_bytes()[:200])
    return root


def samples_of(folder: Path, *, seed: int = 0, memory: bool = False) -> Samples:
    images = folder_images(folder, 3)
    return Samples(
        in_memory(images) if memory else images,
        partial(random_crop, size=(16, 16), scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=True),
        partial(block_masks, 1, (4, 4), block=1, num_views=2, mask_ratio=0.5),
        seed,
    )


def batches_of(samples: Samples, *, workers: int = 0, **where: int) -> list[Batch]:
    where = {"count": COUNT, "batch_size": 4, "start": 0, "steps": 6, "seed": samples.seed} | where
    return list(train_batches(samples, StepSampler(**where), collate, workers=workers, pin_memory=False))


def equal(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.masked, b.masked)
        and torch.equal(a.indices, b.indices)
        and a.skipped == b.skipped
        for a, b in zip(some, others, strict=True)
    )


def test_samples__with_so_many_variants_crops_come_again_and_masks_do_not(folder: Path) -> None:
    samples = replace(samples_of(folder), variants=2)
    crops, masks = zip(*(samples[epoch, 3][:2] for epoch in range(4)), strict=True)
    assert torch.equal(crops[0], crops[2])
    assert torch.equal(crops[1], crops[3])
    assert not torch.equal(crops[0], crops[1])
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


def test_samples__are_a_function_of_seed_epoch_and_index_alone(folder: Path) -> None:
    samples = samples_of(folder)
    first = samples[2, 3]
    torch.rand(5)
    _ = samples[0, 1]
    for again in (samples[2, 3], samples_of(folder)[2, 3], samples_of(folder, memory=True)[2, 3]):
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    for other in (samples[1, 3], samples_of(folder, seed=1)[2, 3]):
        assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], samples[2, 4][0])
    masks = torch.stack([samples[epoch, 3][1] for epoch in range(20)])
    assert len(masks.flatten(1).unique(dim=0)) > 15


def test_samples__neither_read_nor_move_the_global_generator(folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _ = samples_of(folder)[0, 0]
    assert torch.equal(state, torch.get_rng_state())


def test_train_batches__two_workers_load_what_none_does(folder: Path) -> None:
    samples = samples_of(folder)
    alone = batches_of(samples)
    assert equal(alone, batches_of(samples, workers=2))


def test_train_batches__from_memory_they_are_those_from_the_disk(folder: Path) -> None:
    assert equal(batches_of(samples_of(folder)), batches_of(samples_of(folder, memory=True)))


@pytest.mark.parametrize("start", [1, 3, 6])
def test_train_batches__started_in_the_middle_they_are_the_tail(folder: Path, start: int) -> None:
    samples = samples_of(folder)
    assert equal(batches_of(samples)[start:], batches_of(samples, start=start))


def test_train_batches__have_the_shapes_asked_for(folder: Path) -> None:
    for batch in batches_of(samples_of(folder)):
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.masked.shape == (4, 2, 16)
        assert batch.masked.dtype == torch.bool


def test_train_batches__a_bad_file_is_recorded_and_the_next_one_stands_in(folder: Path) -> None:
    samples = samples_of(folder)
    image, masked, index, skipped = samples[0, 6]
    assert index == 7
    assert list(skipped) == [BAD]
    assert skipped[BAD]
    assert torch.equal(image, samples[0, 6][0])
    assert torch.equal(masked, samples[0, 6][1])
    batches = batches_of(samples)
    assert {name for batch in batches for name in batch.skipped} == {BAD}
    assert not any((batch.indices == 6).any() for batch in batches)


def test_read_or_substitute__the_last_image_is_followed_by_the_first(tmp_path: Path, folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes((folder / "000.png").read_bytes() if name == "a.png" else b"")
    image, index, skipped = read_or_substitute(folder_images(tmp_path, 3), 1)
    assert (index, list(skipped)) == (0, ["b.png", "c.png"])
    assert image.shape == (3, 20, 24)


def test_read_or_substitute__a_set_without_a_good_image_is_a_data_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 images in a row do not decode; b\.png"):
        read_or_substitute(folder_images(tmp_path, 3), 1)


# -- positions ---------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 40)


def flat(positions: StepSampler) -> list[tuple[int, int]]:
    return [key for micro in positions for key in micro]


@given(count=sizes, batch_size=sizes, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_positions__every_epoch_shows_every_image_once_in_an_order_of_its_own(
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
def test_positions__ranks_and_accumulation_partition_the_batch_of_one_process(
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


@pytest.mark.parametrize(("start", "accumulation"), [(0, 1), (2, 1), (6, 1), (1, 3)])
def test_positions__know_their_number(start: int, accumulation: int) -> None:
    positions = StepSampler(10, 6, start, 6, 0, accumulation)
    assert len(positions) == len(list(positions)) == (6 - start) * accumulation


def test_train_batches__larger_than_the_set_they_show_images_of_several_epochs(folder: Path) -> None:
    (batch,) = batches_of(samples_of(folder, memory=True), batch_size=3 * COUNT, steps=1)
    shown = Counter(batch.indices.tolist())
    assert shown == {index: 6 if index == 7 else 3 for index in range(COUNT) if index != 6}
    assert len(batch.images.flatten(1).unique(dim=0)) == 3 * COUNT
