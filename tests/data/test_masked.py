"""Samples of pretraining are a function of seed, epoch and index."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dmjd.data.crops import random_crop
from dmjd.data.folder import folder_images
from dmjd.data.masked import MaskedSamples, collate_masked
from dmjd.data.memory import in_memory
from dmjd.masking import block_masks


def samples_of(folder: Path, *, seed: int = 0, memory: bool = False) -> MaskedSamples:
    images = folder_images(folder, 3)
    return MaskedSamples(
        in_memory(images) if memory else images,
        partial(random_crop, size=(16, 16), scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=True),
        partial(block_masks, 1, (4, 4), block=1, num_views=2, mask_ratio=0.5),
        seed,
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


def test_samples__of_a_bad_file_show_the_next_image_and_say_so(folder: Path) -> None:
    samples = samples_of(folder)
    image, masked, index, skipped = samples[0, 6]
    assert index == 7
    assert list(skipped) == ["006.png"]
    assert skipped["006.png"]
    assert torch.equal(image, samples[0, 6][0])
    assert torch.equal(masked, samples[0, 6][1])
    batch = collate_masked([samples[0, 5], samples[0, 6]])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.masked.shape == (2, 2, 16)
    assert batch.indices.tolist() == [5, 7]
    assert batch.skipped == skipped
