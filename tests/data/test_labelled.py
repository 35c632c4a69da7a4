"""Which labels are used, and that an augmented sample is a function of seed, epoch and index."""

import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.labelled import (
    LabelledSamples,
    collate_labelled,
    label_subset,
    labelled_parts,
    training_transform,
)
from dmjd.data.loader import train_batches
from dmjd.data.sampler import StepSampler
from dmjd.data.source import Parts, labels_of, open_source
from dmjd.errors import DataError
from dmjd.random import seeded

AUGMENT = {"mean": [0.5] * 3, "std": [0.2] * 3, "scale": (0.3, 1.0), "flip": True, "random_erasing": 0.5}


def transform(policy: str = "rand-m9-mstd0.5-inc1"):
    return training_transform((3, 16, 20), **AUGMENT, auto_augment=policy)


@pytest.fixture
def pets(tmp_path, write):
    counts = {"train/cat": 10, "train/dog": 4, "val/cat": 2, "val/dog": 2}
    return write(
        tmp_path, *(f"{place}/{n}.png" for place, count in counts.items() for n in range(count)), size=(20, 24)
    )


def test_label_subset__keeps_one_of_each_class_and_is_nested():
    labels = [0] * 40 + [1] * 20 + [2]
    hundredth, tenth, half = (set(label_subset(labels, 3, fraction=share)) for share in (0.01, 0.1, 0.5))
    assert len(hundredth) == 3
    assert {labels[index] for index in hundredth} == {0, 1, 2}
    assert hundredth < tenth < half
    assert set(label_subset(labels, 4, fraction=0.1)) != tenth
    assert len(label_subset(labels, 3, shots=4)) == 4 + 4 + 1
    assert label_subset(labels, 3) == list(range(61))


def test_labelled_parts__keep_a_share_of_the_training_labels_and_all_held_out_ones(pets):
    parts = open_source(str(pets))
    train, held_out = labelled_parts(parts, address="pets", seed=1, fraction=0.5)
    assert labels_of(train, range(len(train))).tolist() == [0] * 5 + [1] * 2
    assert len(held_out) == 4
    train, _ = labelled_parts(parts, address="pets", seed=1, shots=1)
    assert labels_of(train, range(len(train))).tolist() == [0, 1]
    assert labelled_parts(parts, address="pets", seed=1) == parts


def test_labelled_parts__without_labels_they_are_refused(pets):
    parts = Parts(folder_images(pets / "train" / "cat", Wanted(3)), folder_images(pets / "val", Wanted(3)))
    for refused in (parts, Parts(parts.held_out, parts.train)):
        with pytest.raises(DataError, match="no labels; pets; needs two classes or more"):
            labelled_parts(refused, address="pets", seed=0)


def refusal(data: Path) -> str:
    with pytest.raises(DataError) as raised:
        labelled_parts(open_source(str(data)), address=str(data), seed=0)
    return str(raised.value)


def test_labelled_parts__an_image_beside_class_folders_is_named(tmp_path, write):
    write(tmp_path, "stray.png", *(f"{name}/{number}.png" for name in "ab" for number in range(3)))
    assert "no labels, for 1 of 7 images are not CLASS/IMAGE, such as stray.png" in refusal(tmp_path)


def test_labelled_parts__folders_of_other_names_than_parts_have_are_named(tmp_path, write):
    write(tmp_path, *(f"{part}/{name}/1.png" for part in ("testing", "training") for name in "ab"))
    said = refusal(tmp_path)
    assert "for 4 of 4 images are not CLASS/IMAGE, such as t" in said
    assert "with the parts train and val (or valid, validation, test)" in said


def test_labelled_parts__a_list_needs_a_column_and_shards_a_pattern(tmp_path, write):
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "a.cls").write_text("1")
    (tmp_path / "list.csv").write_text("path,class\na.png,x\nb.png,y\n")
    assert "in a column called label: give every row one" in refusal(tmp_path / "list.csv")
    with tarfile.open(tmp_path / "s-0.tar", "w") as archive:
        for name in ("a.png", "a.cls"):
            archive.add(tmp_path / name, name)
    assert "or as .cls files of shards, which a pattern names" in refusal(tmp_path / "s-0.tar")


@pytest.mark.parametrize("ending", ["", ".5"])
def test_labelled_parts__labels_that_are_numbers_to_be_predicted_are_no_classes(ending, tmp_path, write):
    write(tmp_path, *(f"{number}.png" for number in range(9)))
    rows = "".join(f"{number}.png,{number}{ending}\n" for number in range(9))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    assert "labels are classes: there is no regression" in refusal(tmp_path / "list.csv")


def test_labelled_parts__held_out_classes_without_training_images_are_named(pets, write):
    write(pets, "val/emu/1.png", "val/ant/1.png")
    with pytest.raises(DataError, match="held-out classes without training images: ant, emu; pets"):
        labelled_parts(open_source(str(pets)), address="pets", seed=0)


def test_samples__are_a_function_of_seed_epoch_and_index_alone(pets):
    (pets / "train" / "cat" / "1.png").write_bytes((pets / "train" / "cat" / "0.png").read_bytes())
    train = open_source(str(pets)).train
    samples = LabelledSamples(train, transform(), seed=1)
    before = torch.get_rng_state()
    image, label, skipped = samples[2, 11]
    assert (image.shape, label, skipped) == ((3, 16, 20), 1, {})
    torch.rand(3)
    again = pickle.loads(pickle.dumps(samples))[2, 11][0]
    assert torch.equal(image, again)
    assert not torch.equal(image, samples[3, 11][0])
    assert not torch.equal(samples[2, 0][0], samples[2, 1][0])  # of the same pixels
    assert not torch.equal(image, LabelledSamples(train, transform(), seed=2)[2, 11][0])
    torch.set_rng_state(before)
    _ = samples[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.long
def test_samples__two_workers_load_what_none_does(pets):
    samples = LabelledSamples(open_source(str(pets)).train, transform(), seed=1)
    alone, together = (
        [*train_batches(samples, StepSampler(14, 6, 0, 4, 1), collate_labelled, workers=workers, pin_memory=False)]
        for workers in (0, 2)
    )
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert one.images.shape == (6, 3, 16, 20)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_samples__a_bad_file_gives_the_label_of_the_image_that_stands_in(pets):
    (pets / "train" / "cat" / "9.png").write_text("no image")
    image, label, skipped = LabelledSamples(open_source(str(pets)).train, transform("none"), seed=0)[0, 9]
    assert (image.shape, label, list(skipped)) == ((3, 16, 20), 1, ["cat/9.png"])


def test_training_transform__without_augmentation_it_normalises():
    plain = training_transform(
        (3, 8, 8), mean=[0.5] * 3, std=[0.25] * 3, scale=(1.0, 1.0), flip=False, auto_augment="none", random_erasing=0.0
    )
    image = plain(torch.full((3, 8, 8), 255, dtype=torch.uint8))
    assert torch.allclose(image, torch.full((3, 8, 8), 2.0))


def test_training_transform__posterize_never_asks_pillow_for_no_bits():
    steps = transform("rand-m10-n4").steps.transforms
    posterize = [op for step in steps for op in getattr(step, "ops", ()) if op.name.startswith("Posterize")]
    assert posterize
    for operation in posterize:
        operation.aug_fn(Image.new("RGB", (4, 4)), 0)


# -- images that Pillow cannot hold ------------------------------------------------------------------------------------


def images(channels: int, height: int, width: int) -> torch.Tensor:
    """Smooth colours, since resampling need not agree on noise; uint8."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    planes = [100 + 60 * rows * number / channels + 80 * columns for number in range(channels)]
    return torch.stack(planes).byte()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_training_transform__any_number_of_channels_is_cropped_mirrored_normalised_and_erased(channels, dtype):
    mean, std = ([start + number / 100 for number in range(channels)] for start in (0.3, 0.1))
    options = {"mean": mean, "std": std, "scale": (1.0, 1.0), "auto_augment": "none"}
    image = images(channels, 16, 16).to(dtype)
    expected = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    plain = training_transform((channels, 16, 16), **options, flip=False, random_erasing=0.0)
    torch.testing.assert_close(plain(image), expected, atol=1e-4, rtol=1e-4)
    mirrored = training_transform((channels, 16, 16), **options, flip=True, random_erasing=0.0)
    with seeded(1):
        seen = [mirrored(image) for _ in range(8)]
    flips = [torch.allclose(each, expected.flip(-1), atol=1e-4) for each in seen]
    assert 0 < sum(flips) < 8
    with seeded(1):
        erased = training_transform((channels, 16, 16), **options, flip=False, random_erasing=0.999)(image)
    assert 0.01 < ((erased - expected).abs() > 1e-3).float().mean() < 0.7


def test_training_transform__a_policy_is_for_pictures_alone():
    augment = training_transform((3, 16, 16), **AUGMENT | {"random_erasing": 0.0}, auto_augment="rand-m9-n4")
    flat = torch.full((3, 16, 16), 77, dtype=torch.uint8)
    with seeded(0):
        assert any(augment(flat).std() > 0.1 for _ in range(8))
        for _ in range(8):
            torch.testing.assert_close(augment(flat.float()), torch.full((3, 16, 16), (77 / 255 - 0.5) / 0.2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(20, 8000), (8000, 20), (1, 30_000)])
def test_training_transform__of_an_extremely_long_image_is_a_crop_as_any(shape, dtype):
    for channels in (3, 5):
        augment = training_transform(
            (channels, 16, 20),
            **AUGMENT | {"mean": [0.5] * channels, "std": [0.2] * channels},
            auto_augment="rand-m9-mstd0.5-inc1",
        )
        assert augment(torch.zeros(channels, *shape, dtype=dtype)).shape == (channels, 16, 20)
