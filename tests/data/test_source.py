"""A folder of any shape, or a set by name, becomes numbered images."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmjd.data import source as sources
from dmjd.data.decode import BadImage, decode
from dmjd.data.shapes import CLASSES
from dmjd.data.source import Images, folder_images, hold_out, in_memory, load, load_all
from dmjd.errors import DataError


def write(root: Path, *names: str, size: tuple[int, int] = (6, 4)) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def numbered(count: int, pattern: str = "{:03d}.png") -> list[str]:
    return [pattern.format(number) for number in range(count)]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_images__a_flat_folder_is_sorted_and_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "a.JPG", "c.bmp")
    (tmp_path / "notes.txt").write_text("")
    images = folder_images(tmp_path, 3)
    assert images.names == ["a.JPG", "b.png", "c.bmp"]
    assert images.labels is None
    assert len(images) == 3


def test_folder_images__nested_folders_are_found_by_relative_names_and_have_no_labels(tmp_path: Path) -> None:
    names = ["2020/may/a.png", "2020/b.png", "2021/c.png"]
    images = folder_images(write(tmp_path, *names), 3)
    assert images.names == sorted(names)
    assert images.labels is None
    assert torch.equal(images.read(0), decode(tmp_path / sorted(names)[0], 3))


def test_folder_images__a_folder_of_class_folders_has_labels(tmp_path: Path) -> None:
    images = folder_images(write(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png"), 3)
    assert images.names == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert images.classes == ("cat", "dog")
    assert images.labels == [0, 0, 1]


@pytest.mark.parametrize("names", [("only/a.png", "only/b.png"), ("cat/a.png", "dog/b.png", "stray.png")])
def test_folder_images__one_class_or_a_stray_image_makes_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert folder_images(write(tmp_path, *names), 3).labels is None


def test_folder_images__hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.png", ".hidden.png", ".git/b.png", "deep/.cache/c.png")
    assert folder_images(tmp_path, 3).names == ["a.png"]


def test_folder_images__links_to_files_are_followed_and_loops_of_folders_are_not(tmp_path: Path) -> None:
    write(tmp_path, "deep/a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "deep" / "a.png")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path)
    assert folder_images(tmp_path, 3).names == ["b.png", "deep/a.png"]


def test_folder_images__a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    assert folder_images(write(tmp_path, "album.png/a.png"), 3).names == ["album.png/a.png"]


def test_folder_images__a_name_that_is_not_unicode_reads(tmp_path: Path) -> None:
    os.rename(write(tmp_path, "a.png") / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    assert folder_images(tmp_path, 3).read(0).shape == (3, 4, 6)


def test_load__without_images_it_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_text("")
    for data, reason in (("empty", "no images"), ("nowhere", "no such data"), ("file.png", "no such data")):
        for find in (load, load_all):
            with pytest.raises(DataError, match=f"{reason}.*{data}"):
                find(str(tmp_path / data))


@pytest.mark.parametrize("part", ["val", "validation", "test"])
def test_load__a_folder_that_brings_its_parts_keeps_them(tmp_path: Path, part: str) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", f"{part}/cat/c.png", f"{part}/dog/d.png")
    train, held_out = load(str(tmp_path))
    assert (train.names, held_out.names) == (["cat/a.png", "dog/b.png"], ["cat/c.png", "dog/d.png"])
    assert train.labels == held_out.labels == [0, 1]


def test_load__val_comes_before_test(tmp_path: Path) -> None:
    write(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    assert load(str(tmp_path)).held_out.names == ["b.png"]


def test_load__a_train_part_alone_is_split(tmp_path: Path) -> None:
    write(tmp_path, *numbered(20, "train/{:02d}.png"))
    parts = load(str(tmp_path))
    assert (len(parts.train), len(parts.held_out)) == (19, 1)


# -- held-out images ---------------------------------------------------------------------------------------------------


def bare(count: int) -> Images:
    names = numbered(count, "{:06d}.png")
    return Images(names=names, labels=list(range(count)), classes=(), root=Path(), in_chans=3)


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (39, 1), (40, 2), (1000, 50), (30_000, 1000)])
def test_hold_out__a_twentieth_disjoint_and_complete(count: int, held: int) -> None:
    train, held_out = hold_out(bare(count), seed=0)
    assert len(held_out) == held
    assert sorted([*train.names, *held_out.names]) == list(bare(count).names)
    for part in (train, held_out):
        assert [int(name[:6]) for name in part.names] == part.labels


def test_hold_out__the_seed_alone_decides() -> None:
    assert hold_out(bare(200), seed=3) == hold_out(bare(200), seed=3)
    assert hold_out(bare(200), seed=3).held_out.names != hold_out(bare(200), seed=4).held_out.names


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3])
def test_in_memory__equals_decoding(tmp_path: Path, in_chans: int) -> None:
    write(tmp_path, "a.png", "b.png", size=(6, 4))
    write(tmp_path, "c.png", size=(9, 30))
    (tmp_path / "bad.png").write_text("no image")
    images = folder_images(tmp_path, in_chans)
    held = in_memory(images)
    assert held.held is not None
    for index, name in enumerate(images.names):
        if name == "bad.png":
            with pytest.raises(BadImage) as from_file:
                images.read(index)
            with pytest.raises(BadImage) as from_memory:
                held.read(index)
            assert str(from_file.value) == str(from_memory.value)
        else:
            assert torch.equal(held.read(index), images.read(index))


def test_in_memory__large_sets_stay_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder_images(write(tmp_path, "a.png", "b.png"), 3)
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 2 * 6 * 4 * 3 - 1)
    assert in_memory(images) is images


def test_in_memory__sets_without_a_readable_image_stay_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    images = folder_images(tmp_path, 3)
    assert in_memory(images) is images


# -- load_all ----------------------------------------------------------------------------------------------------------


def test_load_all__names_are_relative_to_the_root_in_every_part(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png", "test/e.png")
    parts = load_all(str(tmp_path))
    assert [list(images.names) for images in parts] == [
        ["train/cat/a.png", "train/dog/b.png"],
        ["val/cat/c.png", "val/dog/d.png"],
        ["test/e.png"],
    ]
    for images in parts:
        for index, name in enumerate(images.names):
            assert torch.equal(images.read(index), decode(tmp_path / name, 3))


def test_load_all__a_folder_without_parts_is_one(tmp_path: Path) -> None:
    write(tmp_path, *numbered(40))
    (images,) = load_all(str(tmp_path))
    assert images.names == numbered(40)


# -- built-in sets -----------------------------------------------------------------------------------------------------


def test_shapes__is_made_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHAPES_SIZES", {"train": 24, "val": 12})
    for in_chans, hw, side in ((3, (32, 48), 48), (1, (8, 8), 16)):
        parts = load("shapes", in_chans=in_chans, image_hw=hw)
        assert (len(parts.train), len(parts.held_out)) == (24, 12)
        assert parts.train.read(3).shape == (in_chans, side, side)
        assert parts.train.classes == CLASSES
        assert parts.train.labels == [*range(12), *range(12)]


def test_shapes__has_5000_and_1000_images() -> None:
    assert sources.SHAPES_SIZES == {"train": 5000, "val": 1000}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return tmp_path


@pytest.mark.parametrize("in_chans", [1, 3])
def test_fashion_mnist__reads_a_folder_of_idx_files(mnist: Path, in_chans: int) -> None:
    train, held_out = load(f"fashion-mnist:{mnist}", in_chans=in_chans)
    assert (len(train), len(held_out)) == (5, 3)
    assert train.labels == [0, 1, 2, 3, 4]
    assert len(train.classes) == 10
    pixels = np.random.default_rng(5).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    assert torch.equal(train.read(4), torch.from_numpy(pixels[4]).expand(in_chans, -1, -1))
    assert [len(images) for images in load_all(f"fashion-mnist:{mnist}")] == [5, 3]


@pytest.mark.parametrize("harm", ["truncated", "text", "missing", "short", "empty"])
def test_fashion_mnist__broken_files_are_a_data_error(mnist: Path, harm: str) -> None:
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "text":
        path.write_text("<html>not found</html>")
    elif harm == "missing":
        path.unlink()
    elif harm == "short":
        write_idx(path, np.zeros(2, np.uint8))
    else:
        path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"fetch .* anew"):
        load(f"fashion-mnist:{mnist}")
