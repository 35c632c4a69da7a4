"""`dmjd prepare` writes the same bytes however often it is stopped, and refuses what it cannot finish."""

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmjd.cli import main
from dmjd.data.prepared import JOURNAL, SET, read_set, verify

COUNT = 100
BAD = ("train/017.png", "val/003.png")
SMALL = ["--size", "60", "--shard_mb", "1"]  # two files of pixels for the training images

# Every fsync takes a while, as on a busy disk, and comes after every 16 images.
SLOW_DISK = """if True:
    import os, sys, time
    from dmjd.cli import main
    from dmjd.tasks import prepare
    prepare.SAFE, fsync = 1, os.fsync
    os.fsync = lambda file: (fsync(file), time.sleep(0.1))
    sys.exit(main(sys.argv[1:]))
"""


def write_images(root: Path, count: int) -> Path:
    root.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 75 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.png", compress_level=0)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts without classes, each with an image that does not decode."""
    root = tmp_path_factory.mktemp("data") / "photos"
    write_images(root / "train", COUNT)
    write_images(root / "val", 20)
    for name in BAD:
        (root / name).write_text("no image")
    return root


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("sets") / "undisturbed"
    assert prepare(photos, out) == 0
    return files(out)


def prepare(data: Path, out: Path, *flags: str, small: Sequence[str] = SMALL) -> int:
    return main(["prepare", "--data", str(data), "--out", str(out), *small, *flags])


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def prepare_on_a_full_disk(data: Path, out: Path) -> int:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, before[1]))
    try:
        return prepare(data, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def unfinished(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A set whose writer met a full disk after some chunks."""
    monkeypatch.setattr("dmjd.tasks.prepare.SAFE", 1)
    assert prepare_on_a_full_disk(photos, tmp_path / "unfinished") == 6
    capsys.readouterr()
    return tmp_path / "unfinished"


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "1", "5"])
def test_prepare__writes_the_same_bytes_on_any_number_of_threads(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    assert prepare(photos, tmp_path / "set", "--workers", workers) == 0
    assert files(tmp_path / "set") == undisturbed
    assert [name for name in undisturbed if name.endswith(".bin")] == [
        "train-00000.bin",
        "train-00001.bin",
        "val-00000.bin",
    ]
    verify(tmp_path / "set")


def test_prepare__names_what_does_not_decode_and_leaves_it_out(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(photos, tmp_path / "set") == 0
    (said,) = capsys.readouterr().out.splitlines()
    assert re.match(r"118 images, 1\.5 MB, 2 skipped \(see .*/set/skipped\.tsv\); go on with dmjd pretrain ", said)
    rows = undisturbed["skipped.tsv"].decode().splitlines()
    assert rows == [f"{name}\tnot an image of a known format" for name in BAD]
    assert read_set(tmp_path / "set")["images"] == {"train": COUNT - 1, "val": 19}


def test_prepare__a_set_of_which_nothing_decodes_is_a_data_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no image")
    assert prepare(tmp_path / "photos", tmp_path / "set") == 3
    assert one_error(capsys).startswith("error: none of 1 images decodes; ")
    assert (tmp_path / "set" / "skipped.tsv").read_text().startswith("a.png\t")
    assert prepare(tmp_path / "set", tmp_path / "other") == 3
    assert one_error(capsys).startswith("error: not a finished set; ")


@pytest.mark.parametrize("count", [1, 40])
def test_prepare__other_channels_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    data = write_images(tmp_path / "cubes", count - 1)
    np.save(data / "018.npy", np.zeros((70, 70, 4), dtype=np.uint16))  # of 40, it is not in the sample
    assert prepare(data, tmp_path / "set", "--in_chans", "3") == 3
    assert one_error(capsys).startswith("error: 4 channels, not 3; ")


# -- stopped, and gone on ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_prepare__killed_it_goes_on_to_the_same_bytes(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "-c", SLOW_DISK, "prepare", "--data", str(photos), "--out", str(out), *SMALL]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        until = time.monotonic() + 60
        while not (out / JOURNAL).is_file() or (out / JOURNAL).read_bytes().count(b"\n") < 7:  # the plan, 6 chunks
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / SET).exists()
    assert (out / "train-00001.bin").is_file()
    assert not (out / "val.index.safetensors").exists()
    assert prepare(photos, out) == 0
    assert files(out) == undisturbed


@pytest.mark.parametrize("lost", ["nothing", "half a line", "the last lines", "all lines but the plan", "all lines"])
def test_prepare__goes_on_from_the_last_whole_line_of_its_journal(
    photos: Path, undisturbed: dict[str, bytes], unfinished: Path, lost: str
) -> None:
    lines = (unfinished / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    kept = {"nothing": lines, "half a line": [*lines[:-1], lines[-1][:30]], "the last lines": lines[:-2]}
    (unfinished / JOURNAL).write_bytes(b"".join(kept.get(lost, lines[: lost == "all lines but the plan"])))
    with (unfinished / "train-00000.bin").open("ab") as file:
        file.write(b"what was written and not yet recorded")
    assert prepare(photos, unfinished, "--workers", "0") == 0
    assert files(unfinished) == undisturbed


def test_prepare__a_finished_set_says_so_and_stays(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert prepare(photos, out) == 0
    (out / JOURNAL).write_text("of a process that was killed before it could remove this\n")
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != JOURNAL}
    capsys.readouterr()
    assert prepare(photos, out) == 0
    assert capsys.readouterr().out.startswith("this set is already finished; 118 images, ")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (out / "val-00000.bin").write_bytes(b"cut")
    assert prepare(photos, out) == 3
    assert "val-00000.bin" in one_error(capsys)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_prepare__goes_on_with_the_same_settings_and_images_only(
    photos: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    if finished:
        assert prepare(photos, unfinished) == 0
    capsys.readouterr()
    before = files(unfinished)
    assert prepare(photos, unfinished, "--size", "50", "--in_chans", "1", small=["--shard_mb", "1"]) == 2
    assert one_error(capsys).startswith(f"error: the set was begun with size 60, in_chans 3; {unfinished}; ")
    more = Path(shutil.copytree(photos, tmp_path / "more"))
    shutil.copy(more / "val" / "001.png", more / "val" / "new.png")
    assert prepare(more, unfinished) == 3
    assert one_error(capsys).startswith("error: the images of --data have changed")
    assert files(unfinished) == before


def test_prepare__a_full_disk_is_one_line_that_says_how_to_go_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert prepare_on_a_full_disk(photos, out) == 6
    assert one_error(capsys).startswith(
        f"error: File too large; {out}; free some space or check permissions, and run the same"
    )


def test_prepare__a_disk_too_small_for_the_set_is_told_before(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_000_000, 1_000_000, 1_000_000))
    assert prepare(photos, tmp_path / "set") == 6
    assert "are free" in one_error(capsys)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_000_000, 0, 2_000_000))
    assert prepare(photos, tmp_path / "set") == 0


def test_prepare__a_folder_of_something_else_is_left_alone(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare(photos, tmp_path) == 2
    assert one_error(capsys).startswith("error: it holds something else")
    assert prepare(photos, tmp_path / "notes.txt" / "set") == 6
    assert one_error(capsys).startswith("error: Not a directory")
    assert list(files(tmp_path)) == ["notes.txt"]


def test_prepare__two_processes_do_not_write_one_set(
    photos: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (unfinished / JOURNAL).open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert prepare(photos, unfinished) == 6
    assert one_error(capsys).startswith("error: another process is writing this set")


def test_prepare__goes_on_where_nothing_can_be_locked(
    photos: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert prepare(photos, unfinished) == 0
    assert f"warning: files cannot be locked here; {unfinished}; " in capsys.readouterr().err
    verify(unfinished)


def test_prepare__a_lost_file_of_an_unfinished_set_is_a_data_error(
    photos: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (unfinished / "train-00000.bin").write_bytes(b"")
    assert prepare(photos, unfinished) == 3
    assert one_error(capsys).startswith("error: a file of the unfinished set is missing or truncated; ")
