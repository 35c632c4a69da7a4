"""A prepared set holds the images of its source, made smaller, and says so when a bit of it is missing."""

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmjd.cli import main
from dmjd.data.crops import center_crop, resize
from dmjd.data.decode import Wanted
from dmjd.data.folder import open_folder
from dmjd.data.levels import Levels
from dmjd.data.loader import read_batches
from dmjd.data.prepared import SET, PreparedReader, open_prepared, verify
from dmjd.data.source import Source, fingerprint, measure_levels, open_all, open_source
from dmjd.errors import DataError

SIZE = 16


def prepared(data: Path, out: Path, *flags: str, size: int = SIZE) -> Path:
    assert main(["prepare", "--data", str(data), "--out", str(out), "--size", str(size), *flags]) == 0
    return out


def smaller(image: Tensor) -> Tensor:
    """What a prepared image has to be: its short side is 16 pixels, or as many as it had."""
    height, width = image.shape[1:]
    if min(height, width) <= SIZE:
        return image
    size = (SIZE, round(width * SIZE / height)) if height < width else (round(height * SIZE / width), SIZE)
    return torch.from_numpy(resize(image, size).numpy().clip(image.numpy().min(), image.numpy().max()))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Path]) -> Path:
    """Class folders in two parts, with wide, high and small images; the classes of the parts differ."""
    root = tmp_path_factory.mktemp("photos")
    write(root / "train", *(f"cat/{number}.png" for number in range(9)), size=(40, 30))
    write(root / "train", *(f"dog/{number}.jpg" for number in range(9)), size=(21, 50))
    write(root / "train", "dog/small.png", size=(12, 9))
    write(root / "val", "dog/a.png", "owl/b.png", size=(33, 33))
    return root


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(photos, tmp_path_factory.mktemp("sets") / "packed")


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A set of one's own, to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "copied"))


# -- what a set holds --------------------------------------------------------------------------------------------------


def test_prepared__images_are_those_of_the_folder_made_smaller(photos: Path, packed: Path) -> None:
    before, after = open_folder(str(photos), Wanted()), open_prepared(str(packed), Wanted())
    assert list(after) == ["train", "val"]
    for part in before:
        assert isinstance(after[part], Source)
        assert not after[part].in_memory
        assert after[part].classes == before[part].classes
        assert fingerprint(after[part]) == fingerprint(before[part])
        for index in range(len(before[part])):
            assert after[part].label(index) == before[part].label(index)
            assert torch.equal(after[part].read(index), smaller(before[part].read(index)))
    assert {min(after["train"].read(index).shape[1:]) for index in range(19)} == {9, SIZE}


def test_prepared__opens_wherever_a_folder_does(photos: Path, packed: Path) -> None:
    before, after = open_source(str(photos)), open_source(str(packed))
    for one, other in zip(before, after, strict=True):
        assert [one.name(index) for index in range(len(one))] == [other.name(index) for index in range(len(other))]
        assert one.classes == other.classes
    assert after.held_out.classes == ("cat", "dog", "owl")
    names = [[source.name(0) for source in open_all(str(root))] for root in (photos, packed)]
    assert names[0] == names[1] == ["train/cat/0.png", "val/dog/a.png"]


def test_prepared__without_parts_the_same_images_are_held_out(photos: Path, tmp_path: Path) -> None:
    before, after = photos / "train", prepared(photos / "train", tmp_path / "set")
    assert (after / "all-00000.bin").is_file()
    for one, other in zip(open_source(str(before), seed=3), open_source(str(after), seed=3), strict=True):
        assert fingerprint(one) == fingerprint(other)


def test_prepared__a_set_of_a_set_is_one(packed: Path, tmp_path: Path) -> None:
    again = prepared(packed, tmp_path / "again", size=8)
    image = open_prepared(str(again), Wanted())["train"].read(0)
    assert torch.equal(image, resize(open_prepared(str(packed), Wanted())["train"].read(0), (8, 10)))  # of 16 x 21


def test_prepared__many_channels_keep_their_depth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4096, (20, 30, 12)).astype(np.uint16) for _ in range(3)]
    arrays.append(rng.normal(size=(12, 18, 40)).astype(np.float32))
    (tmp_path / "cubes").mkdir()
    for number, array in enumerate(arrays):
        np.save(tmp_path / "cubes" / f"{number}.npy", array)
    out = prepared(tmp_path / "cubes", tmp_path / "set", "--in_chans", "12")
    images = open_prepared(str(out), Wanted(12))[""]
    for index in range(3):
        image = torch.from_numpy(arrays[index]).permute(2, 0, 1)
        assert images.read(index).dtype == torch.uint16
        assert torch.equal(images.read(index), smaller(image))
    assert images.read(3).dtype == torch.float32
    torch.testing.assert_close(images.read(3), smaller(torch.from_numpy(arrays[3])))
    scaled = open_prepared(str(out), Wanted(12, levels=Levels(0.0, 4095.0)))[""].read(0)
    assert torch.equal(scaled, Levels(0.0, 4095.0).scale(images.read(0)))


def test_prepared__deep_images_have_the_range_that_they_had(tmp_path: Path) -> None:
    edge = np.repeat([0, 4095], 20).astype(np.uint16) * np.ones((40, 1), np.uint16)
    for kind, array in (("camera", edge), ("share", (edge / 4095).astype(np.float32))):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / "edge.npy", array)
        folder = open_folder(str(tmp_path / kind), Wanted(1))[""]
        packed = open_prepared(str(prepared(tmp_path / kind, tmp_path / f"{kind}-set", "--in_chans", "1")), Wanted(1))
        assert measure_levels(packed[""]) == measure_levels(folder)


@pytest.mark.parametrize(("has", "wanted"), [(3, 1), (1, 3)])
def test_prepared__colour_becomes_grey_and_grey_colour(tmp_path: Path, has: int, wanted: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    out = prepared(tmp_path / "photos", tmp_path / "set", "--in_chans", str(has))
    stored, image = (open_prepared(str(out), Wanted(channels))[""].read(0) for channels in (has, wanted))
    assert (stored.shape, image.shape) == ((has, 10, 14), (wanted, 10, 14))
    grey = torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).copy())
    assert (image.int() - grey.int()).abs().max() <= 1


def test_prepared__other_channels_are_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "cubes").mkdir()
    np.save(tmp_path / "cubes" / "a.npy", np.zeros((8, 8, 5), dtype=np.uint8))
    out = prepared(tmp_path / "cubes", tmp_path / "set", "--in_chans", "5")
    with pytest.raises(
        DataError,
        match=r"^5 channels, not 3; .*set; pretrain .* with --model.in_chans 5 \(prepare and doctor: .*\), or",
    ):
        open_source(str(out))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_prepared__reading_copies_nothing_and_cannot_spoil_the_set(copied: Path) -> None:
    images = open_prepared(str(copied), Wanted())["train"]
    image = images.read(4)
    assert image.data_ptr() == images.read(4).data_ptr()
    image.zero_()
    assert torch.count_nonzero(open_prepared(str(copied), Wanted())["train"].read(4))
    verify(copied)


@pytest.mark.long
def test_prepared__a_worker_process_reads_the_same_pixels(packed: Path) -> None:
    images = open_prepared(str(packed), Wanted())["train"]
    images.read(0)
    assert len(pickle.dumps(images)) < 10_000  # and not the pixels
    batches = [
        list(
            read_batches(
                images,
                range(len(images)),
                partial(center_crop, size=(SIZE, SIZE)),
                batch_size=8,
                workers=workers,
                pin_memory=False,
            )
        )
        for workers in (0, 1)
    ]
    for (some, indices), (others, same) in zip(*batches, strict=True):
        assert torch.equal(some, others)
        assert indices == same


# -- sets that are not whole -------------------------------------------------------------------------------------------


def spoil(root: Path, name: str, kind: str) -> None:
    path = root / name
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if kind == "cut" else content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["train-00000.bin", "val.index.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_open__a_missing_or_cut_file_is_a_data_error_that_names_it(copied: Path, name: str, kind: str) -> None:
    spoil(copied, name, kind)
    with pytest.raises(DataError, match=f"{name}; copy it again, or prepare the set anew") as error:
        open_source(str(copied))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train-00000.bin", "val.index.safetensors"])
def test_verify__finds_one_bit(copied: Path, name: str) -> None:
    verify(copied)
    spoil(copied, name, "changed")
    with pytest.raises(DataError, match=f"^a file of the set has changed; .*{name}; "):
        verify(copied)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [('"format": 2', '"format": 3', "format 3, this version reads 2"), ('"files"', '"fils"', "not the description")],
)
def test_open__a_set_of_another_version_is_a_data_error(copied: Path, old: str, new: str, message: str) -> None:
    text = (copied / SET).read_text()
    (copied / SET).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        open_source(str(copied))


@pytest.mark.parametrize("content", ['{"kind": "tables"}', "[1]", "{", "null"])
def test_open__a_folder_with_a_set_json_of_its_own_stays_a_folder(
    write: Callable[..., Path], tmp_path: Path, content: str
) -> None:
    write(tmp_path, "a.png", "b.png")
    (tmp_path / SET).write_text(content)
    assert not isinstance(getattr(open_all(str(tmp_path))[0], "reader", None), PreparedReader)
