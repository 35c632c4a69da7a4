"""Batches are a function of the seed and the step alone, whatever the number of workers."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from dmjd.data.crops import RandomCrop, center_crop
from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.loader import read_batches, train_batches
from dmjd.data.masked import MaskedBatch, MaskedSamples
from dmjd.data.memory import in_memory
from dmjd.data.sampler import StepSampler
from dmjd.data.source import Source, Subset
from dmjd.data.workers import usable_cores
from dmjd.engine.distributed import join_ranks

COUNT = 11
BAD = "006.png"


def samples_of(folder: Path, *, seed: int = 0, memory: bool = False) -> MaskedSamples:
    images = folder_images(folder, Wanted(3))
    crop = RandomCrop((16, 16), (0.3, 1.0), (0.75, 1.33), flip=True)
    return MaskedSamples(in_memory(images) if memory else images, crop, seed)


def batches_of(samples: MaskedSamples, *, workers: int = 0, **where: int) -> list[MaskedBatch]:
    where = {"count": COUNT, "batch_size": 4, "start": 0, "steps": 6, "seed": samples.seed} | where
    return list(train_batches(samples, StepSampler(**where), None, workers=workers, pin_memory=False))


def equal(some: list[MaskedBatch], others: list[MaskedBatch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.seeds, b.seeds)
        and torch.equal(a.indices, b.indices)
        and a.skipped == b.skipped
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.long
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
        assert batch.seeds.shape == (4,)


def test_train_batches__a_bad_file_is_recorded_and_the_next_one_stands_in(folder: Path) -> None:
    samples = samples_of(folder)
    batches = batches_of(samples)
    assert {name for batch in batches for name in batch.skipped} == {BAD}
    assert not any((batch.indices == 6).any() for batch in batches)


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(3, None, 2), (20, "8", 1), (2, "8", 1)])
def test_train_batches__workers_have_the_cores_of_their_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str | None, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    sampler = StepSampler(COUNT, 4, 0, 6, 0)
    batches = train_batches(samples_of(folder), sampler, None, workers=None, pin_memory=False)
    assert batches.loader.num_workers == workers


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
    ids=str,
)
def test_usable_cores__are_those_that_a_container_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("dmjd.data.workers.QUOTA", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        with join_ranks("cpu"):
            assert torch.get_num_threads() == usable_cores() == cores
    finally:
        torch.set_num_threads(threads)


def test_train_batches__larger_than_the_set_they_show_images_of_several_epochs(folder: Path) -> None:
    (batch,) = batches_of(samples_of(folder, memory=True), batch_size=3 * COUNT, steps=1)
    shown = Counter(batch.indices.tolist())
    assert shown == {index: 6 if index == 7 else 3 for index in range(COUNT) if index != 6}
    assert len(batch.images.flatten(1).unique(dim=0)) == 3 * COUNT


# -- evaluations -------------------------------------------------------------------------------------------------------

small = partial(center_crop, size=(8, 8))


def read(source: Source, indices: Sequence[int], **options: object) -> list[tuple[torch.Tensor, list[int]]]:
    chosen = {"batch_size": 4, "workers": 0, "pin_memory": False} | options
    return list(read_batches(source, indices, small, **chosen))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_read_batches__are_in_order_without_what_does_not_decode(folder: Path, workers: int) -> None:
    images = folder_images(folder, Wanted(3))
    indices = [10, 6, 2, 3, 6, 6, 6, 6, 7]
    batches = read(Subset(images, range(COUNT)), indices, workers=workers)
    assert [kept for _, kept in batches] == [[10, 2, 3], [], [7]]
    assert batches[1][0].shape[0] == 0
    for pixels, kept in batches:
        assert pixels.dtype == torch.uint8
        for image, index in zip(pixels, kept, strict=True):
            assert torch.equal(image, small(images.read(index)))


@pytest.mark.parametrize(("count", "batches"), [(0, 0), (1, 1), (4, 1), (5, 2), (11, 3)])
def test_read_batches__are_as_many_as_the_indices_say(folder: Path, count: int, batches: int) -> None:
    assert len(read(folder_images(folder, Wanted(3)), range(count))) == batches
    assert len(read(folder_images(folder, Wanted(3)), [6] * count)) == batches


def test_read_batches__take_no_memory_that_grows_with_the_set(folder: Path, peak: Callable[..., int]) -> None:
    images, indices = folder_images(folder, Wanted(3)), range(100_000)
    options = {"batch_size": 4, "workers": 0, "pin_memory": False}
    assert peak(lambda: read_batches(images, indices, small, **options)) < len(indices)


def test_read_batches__from_memory_they_are_those_from_the_disk(folder: Path) -> None:
    images = folder_images(folder, Wanted(3))
    for (pixels, kept), (others, too) in zip(
        read(images, range(COUNT)), read(in_memory(images), range(COUNT), workers=None), strict=True
    ):
        assert kept == too
        assert torch.equal(pixels, others)


def test_read_batches__do_not_move_the_global_generator(folder: Path) -> None:
    before = torch.get_rng_state()
    read(folder_images(folder, Wanted(3)), range(COUNT))
    assert torch.equal(torch.get_rng_state(), before)
