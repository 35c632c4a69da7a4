"""A folder of any shape becomes numbered images, with labels if its folders are classes."""

import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from dmjd.data.decode import Wanted, decode
from dmjd.data.folder import FolderImages, folder_images, image_names, open_folder
from dmjd.errors import DataError


def names(images: FolderImages) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def labels(images: FolderImages) -> list[int | None]:
    return [images.label(index) for index in range(len(images))]


def test_folder_images__a_flat_folder_is_sorted_and_has_no_labels(tmp_path, write):
    write(tmp_path, "b.png", "a.JPG", "c.bmp")
    (tmp_path / "notes.txt").write_text("")
    images = folder_images(tmp_path, Wanted(3))
    assert names(images) == ["a.JPG", "b.png", "c.bmp"]
    assert images.classes == ()
    assert labels(images) == [None] * 3
    assert (images.address, images.in_memory) == (str(tmp_path), False)


def test_folder_images__nested_folders_are_found_by_relative_names_and_have_no_labels(tmp_path, write):
    paths = ["2020/may/a.png", "2020/b.png", "2021/c.png"]
    images = folder_images(write(tmp_path, *paths), Wanted(3))
    assert names(images) == sorted(paths)
    assert images.classes == ()
    assert torch.equal(images.read(0), decode(tmp_path / sorted(paths)[0], Wanted(3)))


def test_folder_images__a_folder_of_class_folders_has_labels(tmp_path, write):
    images = folder_images(write(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png"), Wanted(3))
    assert names(images) == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert images.classes == ("cat", "dog")
    assert labels(images) == [0, 0, 1]


@pytest.mark.parametrize("paths", [("only/a.png", "only/b.png"), ("cat/a.png", "dog/b.png", "stray.png")])
def test_folder_images__one_class_or_a_stray_image_makes_no_labels(tmp_path, write, paths):
    assert folder_images(write(tmp_path, *paths), Wanted(3)).classes == ()


def test_folder_images__hidden_files_and_folders_are_left_out(tmp_path, write):
    write(tmp_path, "a.png", ".hidden.png", ".git/b.png", "deep/.cache/c.png")
    assert [*image_names(tmp_path)] == ["a.png"]


def test_folder_images__links_to_files_are_followed_and_loops_of_folders_are_not(tmp_path, write):
    write(tmp_path, "deep/a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "deep" / "a.png")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path)
    assert [*image_names(tmp_path)] == ["b.png", "deep/a.png"]


def test_folder_images__a_folder_named_like_an_image_is_a_folder(tmp_path, write):
    assert [*image_names(write(tmp_path, "album.png/a.png"))] == ["album.png/a.png"]


def test_folder_images__a_name_that_is_not_unicode_reads(tmp_path, write):
    os.rename(write(tmp_path, "a.png") / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    assert folder_images(tmp_path, Wanted(3)).read(0).shape == (3, 4, 6)


def test_folder_images__labels_are_shared_with_workers(tmp_path, write):
    images = folder_images(write(tmp_path, "dog/1.png", "cat/2.png"), Wanted(3))
    ForkingPickler.dumps(images)
    assert images.labels.content.is_shared()
    assert labels(images) == [0, 1]


def test_folder_images__survive_pickling(tmp_path, write):
    images = folder_images(write(tmp_path, "dog/1.png", "cat/2.png"), Wanted(1))
    again = pickle.loads(pickle.dumps(images))
    assert (names(again), labels(again), again.classes) == (names(images), labels(images), images.classes)
    assert torch.equal(again.read(1), images.read(1))


def opened(root: Path) -> list[str]:
    return list(open_folder(str(root), Wanted()))


def test_open_folder__parts_are_those_that_there_are(tmp_path, write):
    assert opened(write(tmp_path, "val/a.png")) == [""]  # without a train part it is one
    assert opened(write(tmp_path, "train/b.png", "test/c.png", "other/d.png")) == ["train", "val", "test"]


def test_open_folder__folders_beside_train_that_are_no_parts_are_named(tmp_path, write, capsys):
    write(tmp_path, "train/a.png", "valid/b.png", ".hidden/c.png", *(f"other{number}/d.png" for number in range(6)))
    assert opened(tmp_path) == ["train", "valid"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"not read: other0, other1, other2, other3, other4 and 1 more; {tmp_path}; beside train, ")


def test_open_folder__a_part_that_training_looks_at_needs_images_and_others_do_not(tmp_path, write):
    write(tmp_path, "train/a.png", "val/b.png")
    (tmp_path / "test").mkdir()
    assert opened(tmp_path) == ["train", "val"]
    (tmp_path / "val" / "b.png").unlink()
    with pytest.raises(DataError, match=r"no images; .*val"):
        opened(tmp_path)
