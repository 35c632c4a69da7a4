"""Samples of pretraining are a function of seed, epoch and index."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmjd.data.crops import RandomCrop
from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.levels import Levels
from dmjd.data.masked import MaskedBatch, MaskedSamples
from dmjd.data.memory import in_memory, stack_of
from dmjd.data.sampler import StepKeys
from dmjd.errors import DataError

CROP = RandomCrop((16, 16), (0.3, 1.0), (0.75, 1.33), flip=True)
CPU = torch.device("cpu")


def samples_of(folder: Path, *, seed: int = 0, memory: bool = False) -> MaskedSamples:
    images = folder_images(folder, Wanted(3))
    return MaskedSamples(in_memory(images) if memory else images, CROP, seed)


def batch_of(samples: MaskedSamples, keys: list[tuple[int, int]], epoch: int = 0) -> MaskedBatch:
    return samples.__getitems__(StepKeys(keys, epoch))


def one(samples: MaskedSamples, epoch: int, index: int) -> MaskedBatch:
    return batch_of(samples, [(epoch, index)], epoch)


def stacked(samples: MaskedSamples) -> MaskedSamples:
    """The same samples, cropped from one tensor."""
    stack = stack_of(in_memory(samples.images))
    assert stack is not None
    return replace(samples, stack=stack)


def test_samples__with_so_many_variants_crops_come_again_and_masks_do_not(folder: Path) -> None:
    samples = replace(samples_of(folder), variants=2)
    batches = [one(samples, epoch, 3) for epoch in range(4)]
    assert torch.equal(batches[0].images, batches[2].images)
    assert torch.equal(batches[1].images, batches[3].images)
    assert not torch.equal(batches[0].images, batches[1].images)
    assert len({int(batch.seeds) for batch in batches}) == 4


@pytest.mark.parametrize("memory", [False, True])
def test_samples__crops_have_the_size_of_their_epoch(folder: Path, memory: bool) -> None:
    whole = samples_of(folder, memory=memory)
    samples = replace(stacked(whole) if memory else whole, sizes=((0, (8, 8)), (2, (16, 16))))
    assert [one(samples, epoch, 0).images.shape[2:] for epoch in (0, 1, 2, 9)] == [(8, 8), (8, 8), (16, 16), (16, 16)]
    assert torch.equal(one(samples, 2, 0).images, one(replace(samples, sizes=()), 2, 0).images)
    assert batch_of(samples, [(1, 0), (2, 1)], epoch=1).images.shape[2:] == (8, 8), "all have that of their step"
    late = pickle.loads(pickle.dumps(StepKeys([(2, 1)], epoch=1)))  # on its way to a worker
    assert samples.__getitems__(late).images.shape[2:] == (8, 8)


def test_samples__are_a_function_of_seed_epoch_and_index_alone(folder: Path) -> None:
    samples = samples_of(folder)
    first = one(samples, 2, 3)
    torch.rand(5)
    _ = one(samples, 0, 1)
    for again in (one(samples, 2, 3), one(samples_of(folder), 2, 3), one(samples_of(folder, memory=True), 2, 3)):
        assert torch.equal(first.images, again.images)
        assert torch.equal(first.seeds, again.seeds)
    for other in (one(samples, 1, 3), one(samples_of(folder, seed=1), 2, 3), one(samples, 2, 4)):
        assert not torch.equal(first.images, other.images)
        assert not torch.equal(first.seeds, other.seeds)


def test_samples__of_a_batch_are_those_of_its_members(folder: Path) -> None:
    keys = [(0, 5), (2, 3), (1, 0)]
    for samples in (samples_of(folder), stacked(samples_of(folder))):
        batch, alone = batch_of(samples, keys), [one(samples, *key) for key in keys]
        together = torch.cat([each.images for each in alone])
        assert torch.allclose(batch.images.float(), together.float(), atol=1.0)  # the last bit of a sum may round
        assert torch.equal(batch.seeds, torch.cat([each.seeds for each in alone]))
        assert torch.equal(batch.indices, torch.cat([each.indices for each in alone]))


def test_samples__cropped_from_one_tensor_they_are_within_a_level_of_those_cropped_one_by_one(folder: Path) -> None:
    samples = samples_of(folder)
    keys = [(epoch, index) for epoch in range(8) for index in range(11)]
    alone, together = batch_of(samples, keys), batch_of(stacked(samples), keys)
    assert (alone.images.int() - together.images.int()).abs().max() <= 1
    assert torch.equal(alone.indices, together.indices)
    assert torch.equal(alone.seeds, together.seeds)


def test_samples__neither_read_nor_move_the_global_generator(folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for samples in (samples_of(folder), stacked(samples_of(folder))):
        _ = one(samples, 0, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_samples__of_a_bad_file_show_the_next_image_and_say_so(folder: Path) -> None:
    samples = samples_of(folder)
    batch = batch_of(samples, [(0, 5), (0, 6)])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.indices.tolist() == [5, 7]
    assert list(batch.skipped) == ["006.png"]
    assert batch.skipped["006.png"]
    assert torch.equal(batch.images, batch_of(samples, [(0, 5), (0, 6)]).images)


def write_arrays(root: Path, pixels: np.ndarray) -> Path:
    root.mkdir()
    for number, image in enumerate(pixels):
        np.save(root / f"{number}.npy", image)
    return root


def test_samples__two_images_of_the_same_pixels_are_cropped_each_in_its_way(tmp_path: Path) -> None:
    twins = np.random.default_rng(0).integers(0, 256, (1, 12, 14, 3), dtype=np.uint8).repeat(2, axis=0)
    samples = MaskedSamples(folder_images(write_arrays(tmp_path / "twins", twins), Wanted(3)), CROP, 0)
    for first, second in (batch_of(each, [(0, 0), (0, 1)]).images for each in (samples, stacked(samples))):
        assert not torch.equal(first, second)


def test_samples__of_16_bits_are_those_of_8_where_the_values_are_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 14, 5), dtype=np.uint8)
    wide = [pixels.astype(np.uint16) * 257, pixels.astype(np.float32) * 3 - 100]
    ranges = [Levels(0.0, 65535.0), Levels(-100.0, 665.0)]
    wanted, keys = Wanted(5), [(epoch, index) for epoch in range(2) for index in range(6)]
    narrow = stacked(MaskedSamples(folder_images(write_arrays(tmp_path / "8", pixels), wanted), CROP, 0))
    expected = narrow.pixels(batch_of(narrow, keys), CPU).float()
    for number, (values, levels) in enumerate(zip(wide, ranges, strict=True)):
        images = folder_images(write_arrays(tmp_path / str(number), values), wanted)
        samples = stacked(MaskedSamples(images, CROP, 0, levels=levels))
        found = samples.pixels(batch_of(samples, keys), CPU)
        assert (found - expected).abs().max() <= 0.501  # deep images are not rounded
        alone = MaskedSamples(images, CROP, 0, levels=levels)
        batch = batch_of(alone, keys)
        assert batch.images.dtype == (torch.uint16, torch.float32)[number]  # deep until the device
        assert (alone.pixels(batch, CPU) - expected).abs().mean() < 2  # no clipping between rows and columns


def test_samples__of_16_bits_uncropped_are_those_of_8_to_the_last_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 4), dtype=np.uint8)
    whole, keys = RandomCrop((16, 16), (1.0, 1.0), (1.0, 1.0), flip=True), [(0, index) for index in range(6)]
    shown = []
    for name, values in (("8", pixels), ("16", pixels.astype(np.uint16) * 257)):
        images = folder_images(write_arrays(tmp_path / name, values), Wanted(4))
        samples = stacked(MaskedSamples(images, whole, 0, levels=Levels(0.0, 65535.0)))
        shown.append(samples.pixels(batch_of(samples, keys), CPU))
    assert torch.equal(shown[0].float(), shown[1])


def test_samples__of_8_and_of_16_bits_in_one_batch_share_a_range(tmp_path: Path) -> None:
    pixels = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    root = write_arrays(tmp_path / "mixed", pixels)
    np.save(root / "1.npy", pixels[1].astype(np.uint16) * 16)
    narrow = MaskedSamples(folder_images(root, Wanted(3)), CROP, 0)  # as if no deep one had been looked at
    with pytest.raises(DataError, match=r"a value of 1600, where .* 8 bits .*; 1\.npy; .*--data_range"):
        batch_of(narrow, [(0, 1)])
    samples = MaskedSamples(folder_images(root, Wanted(3)), CROP, 0, levels=Levels(0.0, 255.0 * 16))
    shown = samples.pixels(batch_of(samples, [(0, 0), (0, 1)]), CPU)
    assert torch.allclose(shown, torch.full_like(shown, 100.0), atol=1e-3)
