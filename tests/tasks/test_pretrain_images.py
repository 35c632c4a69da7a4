"""What settings say of images reaches the run, its backbone and its report."""

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dmjd.cli import main
from dmjd.engine import trainer

Paint = Callable[[Path, Mapping[str, int]], Path]
TINY = shlex.split(
    "--steps 2 --batch_size 4 --workers 0 --device cpu --monitor.evals 0 --monitor.log_every 1 --monitor.max_images 4 "
    "--model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2 "
    "--decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2"
)


def pretrain(data: Path, out: Path, *words: str) -> int:
    return main(["pretrain", "--preset", "quick", "--data", str(data), "--out", str(out), *TINY, *words])


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def about(out: Path) -> tuple[dict[str, list[float]], list[float]]:
    """What the backbone's file says of images."""
    with safe_open(out / "backbone.safetensors", "pt") as file:
        return json.loads(file.metadata()["pretrained_cfg"]), json.loads(file.metadata()["value_range"])


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of five channels and 12 bits, each channel darker than the one before."""
    root = tmp_path_factory.mktemp("bands")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 4096, (36, 40, 5)) // np.array([1, 2, 4, 8, 16])
        np.save(root / f"{number:02d}.npy", pixels.astype(np.uint16))
    return root


def test_pretrain__range_and_statistics_are_measured_said_and_kept(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(bands, tmp_path / "run", "--model.in_chans", "5") == 0
    assert f"values of 0 to 4095 become 0 to 1; {bands}" in capsys.readouterr().err
    said, value_range = about(tmp_path / "run")
    assert value_range == [0, 4095]
    assert said["input_size"] == [5, 32, 32]
    assert np.allclose(said["mean"], 0.5 / np.array([1, 2, 4, 8, 16]), rtol=0.05)
    assert (tmp_path / "run" / "report.html").exists()


def test_pretrain__measures_statistics_of_deep_colours_and_not_of_bytes(bands: Path, tmp_path: Path) -> None:
    for name, dtype, most in (("deep", np.uint16, 4095), ("bytes", np.uint8, 255)):
        (tmp_path / name).mkdir()
        for path in bands.iterdir():
            colours = np.load(path)[..., :3] / 4095 * most
            np.save(tmp_path / name / path.name, colours.astype(dtype))
        assert pretrain(tmp_path / name, tmp_path / f"{name}-run") == 0
    assert np.allclose(about(tmp_path / "deep-run")[0]["mean"], 0.5 / np.array([1, 2, 4]), rtol=0.05)
    assert about(tmp_path / "bytes-run")[0]["mean"] == [0.485, 0.456, 0.406]


def test_pretrain__is_not_resumed_on_images_that_measure_otherwise(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(bands, tmp_path / "images")
    assert pretrain(images, tmp_path / "run", "--model.in_chans", "5") == 0
    for path in images.iterdir():
        np.save(path, np.load(path) // 2)
    assert pretrain(images, tmp_path / "run", "--model.in_chans", "5", "--resume") == 4
    assert "error: the values of the images have changed; " in capsys.readouterr().err


def test_pretrain__range_and_statistics_can_be_said(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "statistics.json"
    file.write_text(json.dumps({"mean": [0.4] * 5, "std": [0.2] * 5, "value_range": [0, 8191]}))
    words = ["--model.in_chans", "5", "--data_statistics", str(file)]
    assert pretrain(bands, tmp_path / "one", *words) == 0
    assert about(tmp_path / "one")[1] == [0, 8191]
    assert about(tmp_path / "one")[0]["mean"] == [0.4] * 5
    file.write_text(json.dumps({"mean": [0.3] * 5, "std": [0.2] * 5, "value_range": [0, 8191]}))
    assert pretrain(bands, tmp_path / "one", *words, "--resume") == 4
    assert "the values of --data_statistics have changed" in capsys.readouterr().err
    assert pretrain(bands, tmp_path / "one", *words, "--resume", "--allow_change", "data_statistics") == 0
    assert pretrain(bands, tmp_path / "two", *words, "--data_range", "0", "5000") == 0
    assert about(tmp_path / "two")[1] == [0, 5000]
    assert lines(tmp_path / "one")[0]["loss"] != lines(tmp_path / "two")[0]["loss"]


@pytest.mark.parametrize("place", ["auto", "no"])
def test_pretrain__a_range_of_bytes_for_deeper_images_is_refused_wherever_they_lie(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    file = tmp_path / "statistics.json"
    file.write_text(json.dumps({"mean": [0.4] * 5, "std": [0.2] * 5}))
    words = ["--model.in_chans", "5", "--data_statistics", str(file), "--data_on_device", place]
    assert pretrain(bands, tmp_path / "run", *words) == 3
    assert "where images are said to have 8 bits or most of them do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ("--model.in_chans 4", 3, "5 channels, not 4"),
        ("--model.in_chans 5 --data_statistics imagenet", 2, "statistics of 3 channels, not 5"),
        ("--model.in_chans 5 --data_statistics nowhere.json", 2, "no statistics"),
    ],
)
def test_pretrain__what_does_not_fit_the_images_is_one_line(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, code: int, reason: str
) -> None:
    assert pretrain(bands, tmp_path / "run", *words.split()) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("values of")]
    assert len(errors) == 1
    assert reason in errors[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_pretrain__the_report_shows_the_channels_asked_for(bands: Path, tmp_path: Path) -> None:
    words = ["--model.in_chans", "5", "--masked.target", "pixels"]
    assert pretrain(bands, tmp_path / "first", *words) == 0
    assert pretrain(bands, tmp_path / "last", *words, "--monitor.channels", "4", "3", "0") == 0
    shown = [load_file(tmp_path / name / "samples.safetensors") for name in ("first", "last")]
    for name in ("images", "target"):
        first, last = (each[name].astype(int).mean(axis=(0, 2, 3)) for each in shown)
        assert first[0] > first[1] > first[2]
        assert last[0] < last[1] < last[2]


def test_pretrain__images_of_several_sizes_are_no_tensor_on_the_device(
    paint: Paint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = paint(tmp_path / "data", {"a": 6})
    assert pretrain(root, tmp_path / "yes", "--data_on_device", "yes") == 0
    assert pretrain(root, tmp_path / "no", "--data_on_device", "no") == 0
    one, other = (lines(tmp_path / name)[0]["loss"] for name in ("yes", "no"))
    assert one == pytest.approx(other, rel=0.02)  # crops within a level
    (root / "a" / "00.png").write_bytes((root / "a" / "01.png").read_bytes())
    np.save(root / "a" / "wide.npy", np.zeros((40, 90, 3), np.uint8))
    assert pretrain(root, tmp_path / "mixed", "--data_on_device", "yes") == 2
    assert "images of several sizes, or too many to hold" in capsys.readouterr().err


def test_pretrain__what_did_not_decode_of_one_folder_is_named_by_its_path_in_there(
    paint: Paint, tmp_path: Path
) -> None:
    root = paint(tmp_path / "data", {"a": 20})
    for number in range(20):
        (root / "a" / f"{number:02d}.png").rename(root / f"{number:02d}.png")
        (root / "a" / f"{number:02d}.png").write_bytes(b"no image")
    assert pretrain(root, tmp_path / "run", "--max_bad", "0.4") == 3
    rows = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert [row.partition("\t")[0] for row in rows] == [f"a/{number:02d}.png" for number in range(20)]


def test_pretrain__what_did_not_decode_is_named_before_the_first_step(
    paint: Paint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = paint(tmp_path / "data", {"train": 101, "val": 4})
    for name in ("train/007.png", "val/02.png"):
        (root / name).write_bytes(b"no image")
    (root / "val" / "03.png").write_bytes(b"no image")
    assert pretrain(root, tmp_path / "run") == 3  # three of 102
    assert not lines(tmp_path / "run")
    rows = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert [row.partition("\t")[0] for row in rows] == sorted(["007.png", f"{root}/val/02.png", f"{root}/val/03.png"])
    (root / "val" / "02.png").unlink()
    (root / "val" / "03.png").unlink()
    capsys.readouterr()
    assert pretrain(root, tmp_path / "again") == 0
    assert (
        "warning: left out 1 of 104 images, such as 007.png: not an image of a known format" in capsys.readouterr().err
    )


def test_pretrain__says_what_share_of_time_images_were_waited_for_and_once_what_would_help(
    paint: Paint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = paint(tmp_path / "data", {"a": 6})
    assert pretrain(root, tmp_path / "quick") == 0
    assert all(0 < line["data_share"] < 1 for line in lines(tmp_path / "quick"))
    assert "waiting for images" not in capsys.readouterr().err
    monkeypatch.setattr(trainer, "PATIENCE", 1e-3)
    monkeypatch.setattr(trainer, "WAITING", 0.0)
    assert pretrain(root, tmp_path / "slow") == 0
    said = capsys.readouterr().err
    assert said.count("of the time goes into waiting for images") == 1
    assert "dmjd prepare" in said
