"""`dmjd doctor` says what is in a set, a run or a backbone, and what is wrong with it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmjd.cli import main
from dmjd.data.statistics import Statistics
from dmjd.tasks.doctor import fitting_size, name_of

TINY = (
    "--steps 4 --batch_size 8 --workers 0 --device cpu --monitor.evals 1 --monitor.saves 2 --monitor.max_images 16 "
    "--model.image_size 32 --model.patch_size 8 --model.embed_dim 32 --model.depth 1 --model.num_heads 2 "
    "--decoder.embed_dim 16 --decoder.num_heads 2 --decoder.depth 1 --optim.warmup_epochs 0"
)


def scene(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    """A picture of soft spots, unlike any of another seed."""
    spots = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def examine(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The line of JSON that a healthy thing gives."""
    assert main(["doctor", *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


# -- sets of images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes in two parts, with one of everything that may be wrong."""
    root = tmp_path / "photos"
    for part, seeds in (("train", range(16)), ("val", range(16, 22))):
        for seed in seeds:
            folder = root / part / "ab"[seed % 2]
            folder.mkdir(parents=True, exist_ok=True)
            scene(seed).save(folder / f"{seed}.png")
    shutil.copy(root / "train/a/0.png", root / "val/a/equal.png")
    scene(1, 30, 40).save(root / "val/b/near.jpg")
    scene(2).save(root / "train/a/copy.bmp")
    (root / "train/a/cut.png").write_bytes((root / "train/a/4.png").read_bytes()[:200])
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(30).save(root / "train/a/turned.jpg", exif=exif)
    np.save(root / "train/a/twelve.npy", np.zeros((12, 30, 40), np.uint16))
    deep = np.asarray(scene(31).convert("L")).astype(np.uint16) * 16
    Image.fromarray(deep).save(root / "train/b/deep.png")
    scene(32).save(root / "train/b/pages.tif", save_all=True, append_images=[scene(33)])
    scene(34, 20, 300).save(root / "train/b/long.png")
    (root / "train/b/notes.txt").write_text("no image")
    return root


@pytest.mark.long
def test_doctor__in_a_process_of_its_own_finds_all_that_is_wrong(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    command = [sys.executable, "-m", "dmjd", "doctor", str(photos), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DMJD_DATA": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    line = json.loads(done.stdout)
    counts = {"images": 31, "looked_at": 31, "broken": 1, "refused": 2, "equal": 2, "near_pairs": 1, "leaked": 2}
    assert line | counts == line
    assert line["out"] == str(out / "report.html")
    found = json.loads((out / "summary.json").read_text())
    assert found["parts"] == {"train": 23, "val": 8}
    assert found["labels"]["val"] == {"a": 4, "b": 4}
    assert found["passed_over"] == {".txt": 1}
    assert (found["turned"], found["long"], found["flat"], found["pages"]) == (1, 1, 0, {"2": 1})
    assert found["depths"]["uint16"] == 2
    assert found["types"] == {"uint8": 27, "uint16": 1}
    rows = [row.split("\t") for row in (out / "broken.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["train", "a/cut.png"], ["train", "a/twelve.npy"], ["train", "b/pages.tif"]]
    assert sorted((out / "duplicates.tsv").read_text().splitlines()) == [
        "equal\ttrain\ta/0.png\tval\ta/equal.png",
        "equal\ttrain\ta/2.png\ttrain\ta/copy.bmp",
        "near\ttrain\tb/1.png\tval\tb/near.jpg",
    ]
    text = (out / "report.html").read_text("utf-8")
    assert text.index("Leakage: 2 of 8 held-out images") < text.index("1 of 31 files does not decode")


@pytest.mark.long
def test_doctor__recommends_a_command_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    for number in range(24):
        array = np.random.default_rng(number).integers(0, 4096, (12, 40, 44)).astype(np.uint16)
        np.save(tmp_path / "set" / f"{number:02d}.npy", array)
    found = examine(capsys, "--data", tmp_path / "set", "--out", tmp_path / "found")
    words = shlex.split(found["command"])
    assert words[:4] == ["dmjd", "pretrain", "--data", str(tmp_path / "set")]
    assert words[4:] == ["--out", "runs/set"]
    statistics = Statistics.read(tmp_path / "found" / "statistics.json")
    assert (statistics.levels.high, len(statistics.mean)) == (4095, 12)
    monkeypatch.chdir(tmp_path)
    assert main([*words[1:], *shlex.split(TINY)]) == 0
    weights = load_file(tmp_path / "runs" / "set" / "backbone.safetensors")
    assert list(weights["patch_embed.proj.weight"].shape[1:]) == [12, 8, 8]


def test_doctor__looks_at_pages_as_frames_where_most_files_have_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        scenes = [scene(10 * number + page) for page in range(4)]
        scenes[0].save(tmp_path / "set" / f"{number}.tif", save_all=True, append_images=scenes[1:])
    found = examine(capsys, tmp_path / "set", "--out", tmp_path / "found")
    assert (found["images"], found["refused"]) == (12, 0)
    bands = examine(capsys, tmp_path / "set", "--out", tmp_path / "found", "--data_pages", "bands")
    assert (bands["images"], bands["refused"]) == (3, 0)
    assert json.loads((tmp_path / "found" / "summary.json").read_text())["in_chans"] == 12


def test_doctor__does_not_guess_what_pages_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plates").mkdir()
    for number in range(6):
        pages = np.random.default_rng(number).integers(0, 4096, (5, 40, 44), dtype=np.uint16)
        tifffile.imwrite(f"plates/{number}.tif", pages, photometric="minisblack")
    assert main(["doctor", "plates"]) == 0
    said = capsys.readouterr()
    command = shlex.split(json.loads(said.out)["command"])
    assert command == ["dmjd", "pretrain", "--data", "plates", "--out", "runs/plates"]
    (line,) = said.err.splitlines()
    assert "say --data_pages bands (channels of one image) or frames" in line
    page = Path("doctor/report.html").read_text("utf-8")
    assert "Files have several pages (6 of 5 pages), which may be channels of one image" in page
    assert main([*command[1:], *shlex.split(TINY)]) == 3  # and not after all images are looked at as frames
    assert capsys.readouterr().err == "error: 5 pages; plates/0.tif; say --data_pages bands or frames\n"
    for pages, images in (("bands", 6), ("frames", 30)):
        found = examine(capsys, "plates", "--data_pages", pages)
        assert (found["images"], found["command"]) == (images, f"{shlex.join(command)} --data_pages {pages}")
    assert "Files have several pages (6 of 5 pages); they were" in Path("doctor/report.html").read_text("utf-8")


def test_doctor__recommends_what_training_cannot_find_out_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my photos").mkdir()
    for number in range(12):
        scene(number).save(tmp_path / "my photos" / f"{number}.png")
    (tmp_path / "my photos" / "cut.png").write_bytes(b"cut")
    command = examine(capsys, tmp_path / "my photos", "--out", tmp_path / "found", "--in_chans", 1)["command"]
    assert shlex.split(command)[4:] == ["--out", "runs/my-photos", "--model.in_chans", "1", "--max_bad", "0.09"]


@pytest.mark.parametrize(
    ("data", "name"),
    [("shapes", "shapes"), ("a/b.csv", "b"), ("s/x-{00..12}.tar", "x-00-12"), ("hf:me/cats", "cats"), ("*.tar", "run")],
)
def test_name_of__is_a_word(data: str, name: str) -> None:
    assert name_of(data) == name


def test_doctor__looks_at_a_sample_by_seed(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(capsys, colours, "--out", tmp_path, "--max_images", 10, "--workers", 1)
    assert (found["images"], found["looked_at"]) == (36, 10)
    assert "a sample of 10 was decoded" in (tmp_path / "report.html").read_text("utf-8")


def test_doctor__of_images_that_are_all_the_same_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        np.save(tmp_path / "set" / f"{number}.npy", np.full((20, 20), 300.5, np.float32))
    assert examine(capsys, tmp_path / "set", "--out", tmp_path / "found")["equal"] == 2
    assert "All values are the same." in (tmp_path / "found" / "report.html").read_text("utf-8")
    assert not (tmp_path / "found" / "statistics.json").exists()


def test_doctor__of_nothing_but_broken_files_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.png").write_bytes(b"cut")
    assert main(["doctor", str(tmp_path)]) == 3
    assert "none of 1 images can be used (not an image of a known format)" in capsys.readouterr().err


def test_doctor__verifies_a_prepared_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    for number in range(4):
        array = np.random.default_rng(number).integers(0, 4096, (12, 40, 44)).astype(np.uint16)
        np.save(tmp_path / "set" / f"{number}.npy", array)
    prepared, out = tmp_path / "prepared", tmp_path / "found"
    assert main(["prepare", "--data", str(tmp_path / "set"), "--out", str(prepared), "--in_chans", "12"]) == 0
    assert examine(capsys, prepared, "--out", out)["command"] == f"dmjd pretrain --data {prepared} --out runs/prepared"
    pixels = next(prepared.glob("*.bin"))
    flip(pixels)
    assert main(["doctor", str(prepared), "--out", str(out)]) == 3
    assert str(pixels) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("short", "size", "patch"),
    [(8, 32, 4), (32, 32, 4), (64, 64, 8), (100, 96, 8), (128, 128, 16), (250, 224, 16), (4000, 224, 16)],
)
def test_fitting_size__is_a_multiple_of_a_patch(short: int, size: int, patch: int) -> None:
    assert fitting_size(short) == (size, patch)


# -- runs and backbones ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", "--preset", "quick", "--data", str(colours), "--out", str(out), *shlex.split(TINY)]) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(trained, tmp_path / "run")


def test_doctor__of_a_run_says_how_far_it_came(run: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(capsys, run)
    assert (found["kind"], found["finished"], found["data"], found["steps"]) == ("run", True, str(colours), 4)
    assert found["checkpoints"] == [2, 4]
    assert found["metrics"] == len((run / "metrics.jsonl").read_text().splitlines())
    assert found["backbone"]["input_size"] == [3, 32, 32]
    assert found["pretrained"]["task"] == "pretrain"
    assert found["pretrained"]["parameters"] > found["backbone"]["parameters"]
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    killed = examine(capsys, run)
    assert (killed["finished"], killed["metrics"], killed["metrics_cut"]) == (False, found["metrics"], 1)


def test_doctor__of_a_checkpoint_counts_what_is_in_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step-00000004"
    found = examine(capsys, folder)
    weights = load_file(folder / "model.safetensors")
    assert found == {
        "kind": "checkpoint",
        "step": 4,
        "tensors": len(weights),
        "parameters": sum(value.numel() for value in weights.values()),
    }


def test_doctor__of_a_backbone_says_what_it_takes(
    backbones: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = examine(capsys, backbones["grey"])
    assert (found["kind"], found["input_size"], found["mean"], found["std"]) == ("backbone", [1, 32, 32], [0.4], [0.2])
    assert found["parameters"] == sum(value.numel() for value in load_file(backbones["grey"]).values())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


BREAKS = {
    "checkpoints/step-00000002/model.safetensors": cut,
    "checkpoints/step-00000004/optimizer.safetensors": flip,
    "checkpoints/step-00000004/state.json": Path.unlink,
    "checkpoints/step-00000004/MANIFEST.json": cut,
    "backbone.safetensors": cut,
    "pretrained.safetensors": flip,
    **{f"{name}.safetensors": lambda file: file.write_bytes(b"garbage") for name in ("best", "last", "linear")},
    "config.yaml": lambda file: file.write_text("a: [1"),
    "summary.json": cut,
    "metrics.jsonl": lambda file: file.write_text("{}\n{\n{}\n"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_doctor__names_the_broken_file_of_a_run(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BREAKS[name](run / name)
    assert main(["doctor", str(run)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert str(run / name) in line


def test_doctor__finds_weights_that_are_no_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "backbone.safetensors"
    weights = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
    weights["norm.weight"][3] = torch.nan
    save_file(weights, path, metadata)
    assert main(["doctor", str(path)]) == 4
    assert capsys.readouterr().err.startswith(f"error: norm.weight is not finite; {path}; ")


def test_doctor__of_a_missing_path_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "none.safetensors")]) == 4
    assert main(["doctor", str(tmp_path / "none")]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 2
