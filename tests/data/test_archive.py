"""Archives are like the folders that they were made of, shards have samples, and what is cut is noticed at opening."""

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dmjd.data.archive import ArchiveReader, expand, index_tar
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.source import Source, open_all
from dmjd.errors import DataError


def png(value: int = 0) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, dtype=np.uint8)).save(content, "png")
    return content.getvalue()


def tar(path: Path, members: Mapping[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def packed(path: Path, members: Mapping[str, bytes]) -> str:
    if path.suffix == ".tar":
        return tar(path, members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def names(data: str) -> list[str]:
    return [source.name(index) for source in open_all(data) for index in range(len(source))]


def only(data: str) -> Source:
    (source,) = open_all(data)
    return source


both = pytest.mark.parametrize("ending", [".zip", ".tar"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DMJD_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indices"


# -- zip and tar -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["b.png", "a.JPG"], ["a.JPG", "b.png"]),
        (["top/b.png", "top/deep/a.png"], ["b.png", "deep/a.png"]),
        (["./b.png", "/c.png"], ["b.png", "c.png"]),
        (["top/.a.png", "__MACOSX/top/._b.png", "top/b.png"], ["b.png"]),
        (["top/train/a.png", "top/val/b.png", "top/other/c.png"], ["train/a.png", "val/b.png"]),
        (["train/a.png", "train/b.png"], ["train/a.png", "train/b.png"]),
    ],
)
def test_archive__names_are_those_of_the_unpacked_folder(tmp_path, ending, members, expected):
    assert names(packed(tmp_path / f"x{ending}", dict.fromkeys(members, png()))) == expected


@both
def test_archive__class_folders_are_labels(tmp_path, ending):
    source = only(packed(tmp_path / f"x{ending}", dict.fromkeys(["x/dog/1.png", "x/cat/2.png", "x/cat/1.png"], png())))
    assert (source.classes, [source.label(index) for index in range(3)]) == (("cat", "dog"), [0, 0, 1])


@both
def test_archive__classes_are_numbered_as_those_of_the_unpacked_folder(tmp_path, ending):
    members = {f"{label}/{number}.png": png() for label in ("10", "9", "1") for number in range(2)}
    for name, content in members.items():
        path = tmp_path / "unpacked" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    ours, theirs = only(packed(tmp_path / f"x{ending}", members)), only(str(tmp_path / "unpacked"))
    assert ours.classes == theirs.classes == ("1", "10", "9")
    assert [ours.label(index) for index in range(6)] == [theirs.label(index) for index in range(6)]


@both
def test_archive__other_files_are_passed_over_and_counted(tmp_path, ending, capsys):
    data = packed(tmp_path / f"x{ending}", {"a.png": png(), "notes.txt": b"", "README": b""})
    assert names(data) == ["a.png"]
    assert capsys.readouterr().err == f"1 images; ignored: 1 without an ending, 1 .txt; {data}\n"


@both
def test_archive__folders_beside_train_that_are_no_parts_are_named(tmp_path, ending, capsys):
    data = packed(tmp_path / f"x{ending}", dict.fromkeys(["train/a.png", "valid/b.png", "bus/c.png", "d.png"], png()))
    assert names(data) == ["train/a.png", "valid/b.png"]
    assert capsys.readouterr().err.startswith(f"not read: bus; {data}; ")


@both
def test_archive__an_image_that_does_not_decode_is_bad_and_others_read(tmp_path, ending):
    source = only(packed(tmp_path / f"x{ending}", {"a.png": b"", "b.png": png()[:40], "c.png": png(7)}))
    for index in range(2):
        with pytest.raises(BadImage):
            source.read(index)
    assert (source.read(2) == 7).all()


@both
def test_archive__is_a_bad_image_when_its_file_is_gone(tmp_path, ending):
    source = only(packed(tmp_path / f"x{ending}", {"a.png": png()}))
    (tmp_path / f"x{ending}").unlink()
    with pytest.raises(BadImage, match="FileNotFoundError"):
        source.read(0)


def test_archive__a_tar_that_was_appended_to_has_the_last_of_a_name(tmp_path):
    data = tar(tmp_path / "x.tar", {"a.png": png(1)})
    with tarfile.open(data, "a") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(png(2))
        archive.addfile(member, io.BytesIO(png(2)))
    assert (only(data).read(0) == 2).all()


def test_archive__links_in_a_tar_are_the_images_that_they_lead_to(tmp_path):
    root = tmp_path / "x"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    (root / "a" / "1.png").write_bytes(png(1))
    os.link(root / "a" / "1.png", root / "b" / "hard.png")
    (root / "b" / "soft.png").symlink_to("../a/1.png")
    (root / "b" / "again.png").symlink_to("soft.png")
    (root / "b" / "gone.png").symlink_to("../a/2.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(root, "x")
    source = only(str(tmp_path / "x.tar"))
    found = [source.name(index) for index in range(len(source))]
    assert found == ["a/1.png", "b/again.png", "b/hard.png", "b/soft.png"]
    assert all((source.read(index) == 1).all() for index in range(4))


def test_archive__a_tar_without_folders_has_links_too_and_the_last_of_a_name_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, target, value in (
            ("old.png", None, 1),
            ("soft.png", "old.png", 0),
            ("file.png", "old.png", 0),
            ("file.png", None, 9),
        ):
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = tarfile.SYMTYPE, target
                archive.addfile(member)
            else:
                member.size = len(png(value))
                archive.addfile(member, io.BytesIO(png(value)))
        twice = tarfile.TarInfo("old.png")  # as GNU tar packs a file that is named twice
        twice.type, twice.linkname = tarfile.LNKTYPE, "old.png"
        archive.addfile(twice)
    source = only(str(tmp_path / "x.tar"))
    assert {source.name(index): int(source.read(index)[0, 0, 0]) for index in range(len(source))} == {
        "old.png": 1,
        "soft.png": 1,
        "file.png": 9,
    }
    assert len(names(str(tmp_path / "?.tar"))) == 3


@pytest.mark.parametrize("broken", [("name", 46, 0xFF), ("version", 6, 0xFF)], ids=lambda broken: broken[0])
def test_archive__a_damaged_directory_of_a_zip_is_one_line(tmp_path, broken):
    path = Path(packed(tmp_path / "x.zip", {"a\u00e9.png": png()}))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + broken[1]] = broken[2]
    path.write_bytes(content)
    with pytest.raises(DataError, match="no whole zip file"):
        open_all(str(path))


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.7])
@both
def test_archive__one_that_is_cut_short_is_refused_at_opening(tmp_path, ending, cut):
    path = Path(packed(tmp_path / f"x{ending}", {f"{number}.png": png(number) for number in range(40)}))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(DataError, match=r"no whole (zip|tar) file .*copy it again") as raised:
        open_all(str(path))
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_archive__a_tar_that_is_cut_between_two_members_is_refused(tmp_path):
    path = Path(tar(tmp_path / "x.tar", {f"{number}.png": png(number) for number in range(3)}))
    start, size = index_tar(path).spans[1].tolist()
    path.write_bytes(path.read_bytes()[: start + -(-size // 512) * 512])
    with pytest.raises(DataError, match=f"breaks off at byte {path.stat().st_size}"):
        open_all(str(path))


def test_archive__what_cannot_be_read_in_place_is_refused_with_advice(tmp_path):
    (tmp_path / "empty.zip").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "bz.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", png())
    with tarfile.open(tmp_path / "really.tar", "w:gz"):
        pass
    tar(tmp_path / "text.tar", {"a.txt": b"", ".b.png": png()})
    for name, reason in (
        ("gone.zip", "no such archive"),
        ("gone.tar", "no such tar file"),
        ("empty.zip", "no whole zip file"),
        ("bz.zip", "a.png is compressed by method 12"),
        ("really.tar", "no whole tar file .*uncompressed"),
        ("x.tar.gz", "a compressed tar file; .*; unpack it"),
        ("x.tgz", "a compressed tar file; .*; unpack it"),
        ("text.tar", "no images"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_all(str(tmp_path / name))
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="pages as frames are for folders and lists"):
        open_all(str(tmp_path / "text.tar"), Wanted(pages="frames"))


# -- shards ------------------------------------------------------------------------------------------------------------


def shards(root: Path, count: int, **more: bytes) -> str:
    """Shards of two samples: image, label and text."""
    for shard in range(count):
        members = {}
        for key in (f"{shard}0", f"{shard}1"):
            members |= {f"{key}.json": b"{}", f"{key}.png": png(int(key)), f"{key}.cls": str(11 - int(key)).encode()}
        tar(root / f"s-{shard:02d}.tar", members | more)
    return str(root / f"s-{{00..{count - 1:02d}}}.tar")


def test_shards__samples_are_images_with_the_labels_of_their_key(tmp_path):
    source = only(shards(tmp_path, 2))
    assert [source.name(index) for index in range(4)] == [
        *("s-00.tar/00.png", "s-00.tar/01.png", "s-01.tar/10.png", "s-01.tar/11.png")
    ]
    assert [int(source.read(index)[0, 0, 0]) for index in range(4)] == [0, 1, 10, 11]
    assert source.classes == ("0", "1", "10", "11")
    assert [source.label(index) for index in range(4)] == [3, 2, 1, 0]


def test_shards__have_no_labels_unless_every_sample_has(tmp_path):
    data = shards(tmp_path, 2)
    tar(tmp_path / "s-01.tar", {"a.png": png()})
    assert (len(only(data)), only(data).classes) == (3, ())


def test_shards__keys_end_at_the_first_dot_of_the_file_in_its_folder(tmp_path):
    members = {"x/1.png": png(), "x/1.mask.png": png(), "x.y/1.PNG": png(), "x.y/2.mask.png": png(), "._1.png": b""}
    tar(tmp_path / "a.tar", members)
    assert names(str(tmp_path / "?.tar")) == ["a.tar/x/1.png", "a.tar/x.y/1.PNG", "a.tar/x.y/2.mask.png"]
    tar(tmp_path / "b.tar", {"1.mask.png": png(), "1.other.png": png(), "1.jpg": png()})
    assert names(str(tmp_path / "{b}.tar")) == ["b.tar/1.jpg"]


def test_shards__of_several_folders_have_names_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "0.tar", {"1.png": png()})
    assert names(str(tmp_path / "*" / "0.tar")) == ["a/0.tar/1.png", "b/0.tar/1.png"]


def test_expand__braces_count_and_list_and_stars_look(tmp_path):
    for name in ("train-08.tar", "train-09.tar", "train-10.tar", "val-08.tar", "val-09.tar", "val-10.tar"):
        (tmp_path / name).touch()
    found = [Path(path).name for path in expand(str(tmp_path / "{val,train}-{08..10}.tar"))]
    assert found == [f"{part}-{number}.tar" for part in ("val", "train") for number in ("08", "09", "10")]
    assert [Path(path).name for path in expand(str(tmp_path / "{train,val}-0*.tar"))] == [
        *("train-08.tar", "train-09.tar", "val-08.tar", "val-09.tar")
    ]
    assert [Path(path).name for path in expand(str(tmp_path / "val-{09,0*}.tar"))] == ["val-09.tar", "val-08.tar"]


def test_shards__what_is_wrong_is_said_in_one_line(tmp_path):
    data = shards(tmp_path, 2)
    (tmp_path / "s-00.tar").rename(tmp_path / "away.tar")
    tar(tmp_path / "two.tar", {"1.png": png(), "1.jpg": png()})
    tar(tmp_path / "masks.tar", {"1.mask.png": png(), "1.other.png": png()})
    tar(tmp_path / "none.tar", {"1.txt": b""})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "away.tar").read_bytes()[:3000])
    for pattern, reason in (
        (data, "no such shard; .*s-00.tar; check the pattern"),
        (str(tmp_path / "t?o.tar"), "two images in a sample, 1.png and 1.jpg; .*two.tar"),
        (str(tmp_path / "mask?.tar"), r"two images in a sample, 1\.mask\.png and 1\.other\.png; .*masks.tar"),
        (str(tmp_path / "non*.tar"), "no images in 1 shards"),
        (str(tmp_path / "gone*.tar"), "no such shard"),
        (str(tmp_path / "s-{01..00}.tar"), "no shards; .*; write the lower number"),
        (str(tmp_path / "cut*.tar"), "no whole tar file .*; .*cut.tar; copy it again"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_all(pattern)
        assert raised.value.exit_code == 3
        assert "\n" not in str(raised.value)


def test_shards__listing_takes_little_memory_an_image(tmp_path, peak):
    members = {f"{number:06d}.{ending}": b"1" for number in range(50) for ending in ("png", "cls")}
    first = tar(tmp_path / "00.tar", members)
    os.utime(first, (1_000_000, 1_000_000))
    for shard in range(1, 12):
        shutil.copy2(first, tmp_path / f"{shard:02d}.tar")
    few, many = (str(tmp_path / f"{{00..{last}}}.tar") for last in ("03", "11"))
    only(many)  # keeps the indices
    assert peak(lambda: only(many)) - peak(lambda: only(few)) < 8 * 50 * 150


def test_shards__a_file_that_is_named_like_a_pattern_is_a_file(tmp_path):
    assert names(tar(tmp_path / "x[1].tar", {"a.png": png()})) == ["a.png"]


def test_shards__more_of_them_than_are_kept_open_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dmjd.data.archive.OPEN_FILES", 1)
    source = only(shards(tmp_path, 3))
    assert [int(source.read(index)[0, 0, 0]) for index in (0, 5, 1, 3, 0)] == [0, 21, 1, 11, 0]
    assert len([file for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]) == 1


# -- kept indices ------------------------------------------------------------------------------------------------------


def test_index__is_kept_for_a_file_that_is_not_new_and_made_anew_when_it_changes(tmp_path, cache):
    path = Path(tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": b"7\n"}))
    index_tar(path)
    assert not cache.exists()  # within the resolution of its time it may still be written to
    os.utime(path, (1_000_000, 1_000_000))
    first = index_tar(path)
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    again = index_tar(path)
    assert kept.stat().st_mtime_ns == written
    assert [*again.names] == [*first.names] == ["a.png", "a.cls"]
    assert torch.equal(again.spans, first.spans)
    assert [*again.texts] == ["", "7"]
    tar(path, {"b.png": png()})
    os.utime(path, (2_000_000, 2_000_000))
    assert [*index_tar(path).names] == ["b.png"]
    tar(path, {"c.png": png(), "more.bin": bytes(20_000)})
    os.utime(path, (2_000_000, 2_000_000))
    assert [*index_tar(path).names] == ["c.png", "more.bin"]


def test_index__a_broken_one_is_made_anew_and_no_cache_is_no_harm(tmp_path, cache):
    path = Path(tar(tmp_path / "x.tar", {"a.png": png()}))
    os.utime(path, (1_000_000, 1_000_000))
    index_tar(path)
    (kept,) = cache.iterdir()
    kept.write_bytes(b"broken")
    assert [*index_tar(path).names] == ["a.png"]
    kept.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    assert [*index_tar(path).names] == ["a.png"]


def test_reader__opens_a_file_once(tmp_path):
    source = only(tar(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)}))
    source.read(0), source.read(1)
    assert isinstance(source.reader, ArchiveReader)
    assert source.reader._open.cache_info().misses == 1
