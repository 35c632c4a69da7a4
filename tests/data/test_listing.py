"""A folder is listed in the order of its sorted paths, and remembered as long as it has not changed."""

import os
import time
from pathlib import Path

import pytest

from dmjd.data import listing
from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images, ignored_files
from dmjd.data.listing import list_files
from dmjd.errors import DataError

ENDINGS = frozenset([".png", ".jpg"])


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def settle(root: Path) -> None:
    """Make folders old enough for their time to tell of every change."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 60, time.time() - 60))


def test_list_files__order_is_that_of_the_sorted_paths(tmp_path: Path) -> None:
    names = [
        "a/b.png",
        "a-b/c.png",
        "a.png",
        "a/b/c.png",
        "ab.png",
        "a/b-c.png",
        "B.png",
        "a/é.png",
        "z/1.png",
        "z.jpg",
    ]
    assert [*list_files(touch(tmp_path, *names), ENDINGS).names] == sorted(names)


def test_list_files__others_are_counted_by_ending(tmp_path: Path) -> None:
    found = list_files(touch(tmp_path, "a.png", "b.TXT", "deep/c.txt", "README", ".hidden.txt"), ENDINGS)
    assert (len(found.names), found.passed_over) == (1, {"": 1, ".txt": 2})


def test_folder_images__says_what_was_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_images(touch(tmp_path, "a.png", "b.txt", "deep/c.txt", "README"), Wanted())
    assert capsys.readouterr().err == f"1 images; ignored: 2 .txt, 1 without an ending; {tmp_path}\n"


def test_folder_images__names_five_kinds_of_ignored_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_images(touch(tmp_path, "a.png", *(f"x.{ending}" for ending in "abcdef"), "y.f", "g"), Wanted())
    assert "ignored: 2 .f, 1 without an ending, 1 .a, 1 .b, 1 .c, 2 of other kinds; " in capsys.readouterr().err


def test_ignored_files__are_those_of_folders_of_images(tmp_path: Path) -> None:
    assert ignored_files(str(touch(tmp_path, "a.png", "b.heic", "deep/c.heic"))) == {".heic": 2}
    assert ignored_files("shapes") == {}
    assert ignored_files(str(touch(tmp_path / "parts", "train/a.png", "train/b.txt", "val/c.png", "d.txt"))) == {
        ".txt": 1
    }


def test_list_files__an_ending_that_is_no_unicode_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MANY", 1)
    root = touch(tmp_path / "images", "a.png", "b.png", os.fsdecode(b"notes.\xff"))
    settle(root)
    assert list_files(root, ENDINGS, tmp_path / "cache").passed_over == {os.fsdecode(b".\xff"): 1}


def test_folder_images__says_that_linked_folders_are_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = touch(tmp_path / "set", "cat/a.png", "dog/b.png")
    touch(tmp_path / "elsewhere", "c.png")
    (root / "owl").symlink_to(tmp_path / "elsewhere")
    folder_images(root, Wanted())
    assert capsys.readouterr().err == f"2 images; ignored: 1 linking to a folder; {root}\n"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "owl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no images; .*links; .*, and folders that are links are not followed"):
        folder_images(tmp_path / "links", Wanted())


@pytest.mark.parametrize("change", ["new", "gone", "renamed", "deep"])
def test_list_files__what_is_kept_is_used_until_a_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    root, cache = touch(tmp_path / "images", "a.png", "deep/b.png", "c.txt"), tmp_path / "cache"
    monkeypatch.setattr(listing, "MANY", 1)
    settle(root)
    first = list_files(root, ENDINGS, cache)
    (kept,) = cache.iterdir()
    monkeypatch.setattr(listing, "_scan", lambda *_: pytest.fail("scanned again"))
    again = list_files(root, ENDINGS, cache)
    assert [*again.names] == [*first.names] == ["a.png", "deep/b.png"]
    assert again.passed_over == first.passed_over == {".txt": 1}
    monkeypatch.undo()
    if change == "new":
        touch(root, "d.png")
    elif change == "gone":
        (root / "a.png").unlink()
    elif change == "renamed":
        (root / "a.png").rename(root / "e.png")
    else:
        touch(root, "deep/f.png")
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert [*list_files(root, ENDINGS, cache).names] == sorted(paths)
    kept.write_bytes(b"broken")
    assert [*list_files(root, ENDINGS, cache).names] == sorted(
        p.relative_to(root).as_posix() for p in root.rglob("*.png")
    )


def test_list_files__a_folder_that_changed_a_moment_ago_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MANY", 1)
    list_files(touch(tmp_path / "images", "a.png"), ENDINGS, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
