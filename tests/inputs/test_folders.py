"""Folders as they are in life: empty, broken, changing under a run, linked in circles, with names of any bytes."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmjd.cli import main
from dmjd.data.cells import plain_cell
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.folder import folder_images
from dmjd.data.source import open_all

TINY = """pretrain --preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1
--model.num_heads 2 --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --steps 2
--monitor.evals 0 --monitor.max_images 8 --workers 0 --device cpu"""
ODD = [
    "=1+1.png",
    "+49.png",
    "-2.png",
    "@SUM(A1).png",
    "=HYPERLINK(x).png",
    "<img src=x onerror=alert(1)>.png",
    "a&b\"c'd.png",
    "tab\tbreak\nreturn\r.png",
    "图像 ünïcode \u202e.png",
    os.fsdecode(b"not unicode \xff\xfe.png"),
    "{{ settings }}.png",
    "%s %d {0}.png",
    " leading and trailing .png",
]


def write_images(folder: Path, count: int = 12, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32 + number % 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def flags(data: Path, out: Path) -> list[str]:
    return [*TINY.split(), "--data", str(data), "--out", str(out)]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if not line.endswith(", saved") and not line.startswith("training: ")]
    return line


def names(data: Path) -> list[str]:
    (source,) = open_all(str(data))
    return [source.name(index) for index in range(len(source))]


def test_pretrain__an_empty_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "in" / "side").mkdir(parents=True)
    assert main(flags(tmp_path / "images", tmp_path / "run")) == 3
    assert "no images" in one_line(capsys)


def test_pretrain__a_folder_of_bad_images_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number}.png").write_bytes(b"no image")
    assert main(flags(folder, tmp_path / "run")) == 3
    assert re.search(r"none of 7 images decodes; \d+\.png: not an image of a known format; ", one_line(capsys))


def test_list_files__links_that_go_round_are_not_followed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 3)
    for name, to in (("up", ".."), ("self", "."), ("sister", "sister")):
        (folder / name).symlink_to(to)
    (folder / "deep").mkdir()
    (folder / "deep" / "back").symlink_to(folder)
    (folder / "round.png").symlink_to("round.png")
    assert names(folder) == ["000.png", "001.png", "002.png", "round.png"]
    with pytest.raises(BadImage, match="symbolic links"):
        open_all(str(folder))[0].read(3)


def test_list_files__one_file_under_several_names_is_several_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 1)
    (folder / "again.png").symlink_to("000.png")
    os.link(folder / "000.png", folder / "hard.png")
    (source,) = open_all(str(folder))
    assert names(folder) == ["000.png", "again.png", "hard.png"]
    assert torch.equal(source.read(0), source.read(1))
    assert torch.equal(source.read(0), source.read(2))


def test_folder__files_that_go_or_change_after_the_listing_are_bad_and_new_ones_are_not_seen(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 4)
    images = folder_images(folder, Wanted(3))
    (folder / "000.png").unlink()
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:90])
    (folder / "002.png").unlink()
    (folder / "002.png").mkdir()
    write_images(folder, 1, first=9)
    assert len(images) == 4
    for index, reason in enumerate(["FileNotFoundError", ".", "IsADirectoryError"]):
        with pytest.raises(BadImage, match=reason):
            images.read(index)
    assert images.read(3).shape == (3, 32, 33)


def test_pretrain__resumed_after_files_came_or_went_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_images(tmp_path / "images"), tmp_path / "run"
    assert main([*flags(folder, out), "--monitor.saves", "2"]) == 0
    (out / "summary.json").unlink()
    for change in (
        lambda: write_images(folder, 1, first=50),
        lambda: [(folder / f"{n:03d}.png").unlink() for n in (50, 3)],
    ):
        change()
        capsys.readouterr()
        assert main(["pretrain", "--data", str(folder), "--out", str(out), "--resume"]) == 4
        assert "images of --data have changed" in one_line(capsys)


def test_pretrain__files_that_vanish_during_a_run_are_named_and_it_goes_on(tmp_path: Path) -> None:
    """By hand, as a run of another process would see it: the source is made, then files go."""
    from dmjd.data.source import read_or_substitute

    folder = write_images(tmp_path / "images", 6)
    images = folder_images(folder, Wanted(3))
    kept = [images.read(index) for index in range(6)]
    for name in ("002.png", "003.png"):
        (folder / name).unlink()
    for index, stands_in in ((2, 4), (3, 4), (1, 1)):
        image, number, skipped = read_or_substitute(images, index)
        assert number == stands_in  # always the next one that decodes
        assert torch.equal(image, kept[stands_in])
        assert [*skipped] == [f"{place:03d}.png" for place in range(index, stands_in)]


def write_odd(folder: Path, good: bool) -> None:
    content = (write_images(folder, 150) / "000.png").read_bytes() if good else b"no image"
    if not good:
        write_images(folder, 200)
    for name in ODD:
        (folder / name).write_bytes(content)


@pytest.mark.long
@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.slow)])
def test_pretrain__names_of_any_bytes_are_read_in_any_locale(tmp_path: Path, locale: str) -> None:
    write_odd(tmp_path / "images", good=True)
    environment = {**os.environ, "LC_ALL": locale, "LANG": locale, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUTF8", None)
    out = tmp_path / os.fsdecode("run \u56fe".encode())
    done = subprocess.run(
        [sys.executable, "-m", "dmjd.cli", *flags(tmp_path / "images", out)],
        capture_output=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "skipped.tsv").read_bytes() == b""
    assert json.loads((out / "summary.json").read_text("utf-8"))["skipped"] == 0


def test_pretrain__odd_names_are_one_harmless_cell_each_and_do_nothing_in_the_report(tmp_path: Path) -> None:
    write_odd(tmp_path / "images", good=False)
    out = tmp_path / "run <script>alert(1)</script>".replace("/", "")
    assert main([*flags(tmp_path / "images", out), "--max_bad", "0.5"]) == 0
    rows = [line.split("\t") for line in (out / "skipped.tsv").read_text("utf-8").splitlines()]
    assert len(rows) == len(ODD)
    assert all(len(row) == 2 for row in rows)
    assert not [name for name, _ in rows if name[0] in "=+-@\t\r"]
    page = (out / "report.html").read_text("utf-8")
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize("text", ["=1+1", "+A1", "-A1", "@SUM(A1)", " =1+1", "\t=1"])
def test_plain_cell__formulas_become_text(text: str) -> None:
    assert plain_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=b", "-1", "+49.5", "-inf", "1e-3", "cat", "'=1"])
def test_plain_cell__words_and_numbers_stay(text: str) -> None:
    assert plain_cell(text) == text


def test_embed__paths_and_labels_are_harmless_cells(
    tmp_path: Path, backbones: dict[str, Path], paint: Callable[..., Path]
) -> None:
    data = paint(tmp_path / "images", {"=cmd": 2, "-1": 2, "cat": 2})
    assert (
        main(["embed", "--backbone", str(backbones["vit"]), "--data", str(data), "--out", str(tmp_path / "a.npy")]) == 0
    )
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"'=cmd", "-1", "cat"}
    assert not [row for row in rows if row["path"][0] in "=+-@"]


def test_knn__classes_are_harmless_cells(
    tmp_path: Path, backbones: dict[str, Path], paint: Callable[..., Path]
) -> None:
    counts = {f"{part}/{name}": 3 for part in ("train", "val") for name in ("=cmd", "cat")}
    data = paint(tmp_path / "images", counts)
    out = tmp_path / "results"
    assert main(["knn", "--backbone", str(backbones["vit"]), "--data", str(data), "--out", str(out)]) == 0
    assert "'=cmd" in (out / "per_class.csv").read_text()
    assert "\n=cmd" not in (out / "per_class.csv").read_text()
