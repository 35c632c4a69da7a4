"""What a backbone's features are worth, and the features themselves."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from timm.models.vision_transformer import VisionTransformer

from dmjd import load_backbone
from dmjd.cli import main
from dmjd.data.cells import cell_text, plain_cell
from dmjd.data.crops import center_crop
from dmjd.data.decode import Wanted, decode
from dmjd.evaluation.feature_file import FeatureWriter
from dmjd.evaluation.knn import knn_top1
from dmjd.evaluation.rank import rankme

CLASSES = ("dots", "rows", "columns")
TINY = """--preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 2
--model.num_heads 2 --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2
--batch_size 16 --steps 3 --workers 0 --device cpu"""


def write_image(path: Path, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 100, (36, 40, 3))
    period = {"dots": (slice(None, None, 3), slice(None, None, 3)), "rows": slice(None, None, 4)}
    pixels[period.get(kind, (slice(None), slice(None, None, 4)))] += rng.integers(80, 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in two parts."""
    root = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                write_image(root / part / name / f"{number:02d}.png", name, 1000 * label + 100 * count + number)
    return root


@pytest.fixture(scope="module")
def backbone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(["pretrain", *TINY.split(), "--data", str(data), "--out", str(out)]) == 0
    return out / "backbone.safetensors"


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    found: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def embedded(backbone: Path, data: Path, out: Path) -> tuple[np.ndarray, list[list[str]]]:
    assert (
        main(["embed", "--backbone", str(backbone), "--data", str(data), "--out", str(out), "--batch_size", "7"]) == 0
    )
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.reader(file))
    return np.load(out), rows


# -- knn ---------------------------------------------------------------------------------------------------------------


def test_knn__prints_its_accuracy_as_the_last_line(
    backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["knn", "--backbone", str(backbone), "--data", str(data), "--k", "5"]) == 0
    said = last_line(capsys)
    assert set(said) >= {"top1", "seconds"}
    features, rows = embedded(backbone, data, tmp_path / "all.npy")
    labels = torch.tensor([CLASSES.index(label) for _, label in rows[1:]])
    train = torch.tensor([path.startswith("train/") for path, _ in rows[1:]])
    known = torch.from_numpy(features)
    expected = knn_top1(known[train], labels[train], known[~train], labels[~train], k=5)
    assert said["top1"] == pytest.approx(expected, abs=1e-4)
    assert said["top1"] > 0.5  # chance is a third
    assert said["rankme"] == pytest.approx(rankme(known[~train]), abs=0.01)


def test_knn__splits_class_folders_without_parts(
    backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["knn", "--backbone", str(backbone), "--data", str(data / "train")]) == 0
    assert 0 <= last_line(capsys)["top1"] <= 1


def test_knn__without_labels_is_a_data_error(backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["knn", "--backbone", str(backbone), "--data", str(data / "train" / "dots")]) == 3
    assert capsys.readouterr().err.startswith("error: no labels")


def test_knn__a_held_out_class_without_training_images_is_a_data_error(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/dots/a.png", "train/rows/a.png", "val/dots/b.png", "val/columns/b.png"):
        write_image(tmp_path / name, Path(name).parent.name, 0)
    capsys.readouterr()
    assert main(["knn", "--backbone", str(backbone), "--data", str(tmp_path)]) == 3
    assert "columns" in capsys.readouterr().err


# -- embed -------------------------------------------------------------------------------------------------------------


def test_embed__rows_are_the_features_of_the_paths_beside_them(backbone: Path, data: Path, tmp_path: Path) -> None:
    features, (header, *rows) = embedded(backbone, data, tmp_path / "new" / "all.npy")
    assert features.dtype == np.float32
    assert features.shape == (3 * (12 + 5), 16)
    assert header == ["path", "label"]
    assert len(rows) == len(features)
    assert all(Path(path).parent.name == label for path, label in rows)
    assert {path for path, _ in rows} == {str(path.relative_to(data)) for path in data.rglob("*.png")}
    model = load_backbone(backbone)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    for row in (0, 20, len(rows) - 1):
        image = center_crop(decode(data / rows[row][0], Wanted(3)), (32, 32))
        with torch.inference_mode():
            expected = model(((image / 255 - mean) / std)[None])[0]
        np.testing.assert_allclose(features[row], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_embed__images_without_classes_have_paths_alone(backbone: Path, data: Path, tmp_path: Path) -> None:
    features, rows = embedded(backbone, data / "val" / "rows", tmp_path / "rows.npy")
    assert rows == [["path"], *([f"{number:02d}.png"] for number in range(5))]
    assert len(features) == 5


def test_embed__files_that_do_not_decode_are_in_neither_and_counted(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write_image(tmp_path / "images" / f"{number}.png", "rows", number)
    (tmp_path / "images" / "2.png").write_text("no image")
    features, rows = embedded(backbone, tmp_path / "images", tmp_path / "f.npy")
    assert [row[0] for row in rows] == ["path", "0.png", "1.png", "3.png"]
    assert len(features) == 3
    said = last_line(capsys)
    assert (said["images"], said["skipped"]) == (3, 1)


def test_embed__without_a_good_image_is_a_data_error(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no image")
    out = tmp_path / "f.npy"
    capsys.readouterr()
    assert main(["embed", "--backbone", str(backbone), "--data", str(tmp_path / "images"), "--out", str(out)]) == 3
    assert capsys.readouterr().err.startswith("error: none of 1 images decodes; a.png: not an image of ")
    assert not out.exists()


def test_embed__its_file_is_what_numpy_writes(backbone: Path, data: Path, tmp_path: Path) -> None:
    features, _ = embedded(backbone, data, tmp_path / "f.npy")
    expected = io.BytesIO()
    np.save(expected, features)
    assert (tmp_path / "f.npy").read_bytes() == expected.getvalue()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.csv", "f.json", "f.npy"]


def embed(backbone: Path, data: Path, out: Path, flags: str = "") -> int:
    words = ["--backbone", backbone, "--data", data, "--out", out, "--workers", "0", "--device", "cpu", *flags.split()]
    return main(["embed", *map(str, words)])


def test_embed__layers_are_joined_as_knn_joins_them_and_halves_are_halves(
    backbone: Path, data: Path, tmp_path: Path
) -> None:
    assert embed(backbone, data, tmp_path / "two.npy", "--layers 0 --layers -1") == 0
    assert embed(backbone, data, tmp_path / "last.npy", "--layers -1 --dtype float16") == 0
    two, last = np.load(tmp_path / "two.npy"), np.load(tmp_path / "last.npy")
    assert (two.shape[1], last.shape[1], last.dtype) == (32, 16, np.float16)
    np.testing.assert_array_equal(two[:, 16:].astype(np.float16), last)
    assert embed(backbone, data, tmp_path / "none.npy", "--layers 9") == 2


def test_embed__tokens_are_those_of_the_models_last_norm_row_by_row(backbone: Path, data: Path, tmp_path: Path) -> None:
    assert embed(backbone, data, tmp_path / "t.npy", "--tokens --batch_size 7") == 0
    assert embed(backbone, data, tmp_path / "f.npy", "--layers -1 --tokens") == 0
    tokens = np.load(tmp_path / "t.npy")
    assert tokens.shape == np.load(tmp_path / "f.npy").shape == (51, 16, 16)
    model = load_backbone(backbone)
    with (tmp_path / "t.csv").open(newline="") as file:
        path = [*csv.reader(file)][1][0]
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    image = center_crop(decode(data / path, Wanted(3)), (32, 32))
    with torch.inference_mode():
        expected = model.forward_features(((image / 255 - mean) / std)[None])[0, model.num_prefix_tokens :]
    np.testing.assert_allclose(tokens[0], expected.numpy(), rtol=1e-4, atol=1e-5)
    pooled = torch.from_numpy(tokens).mean(dim=1)  # the pooled output of this backbone is the mean of its tokens
    embed(backbone, data, tmp_path / "p.npy")
    np.testing.assert_allclose(pooled.numpy(), np.load(tmp_path / "p.npy"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", ["", "--dtype float16", "--tokens"])
def test_embed__parquet_has_the_same_numbers_and_the_names_themselves(
    backbone: Path, tmp_path: Path, flags: str
) -> None:
    for kind in ("rows", "dots"):
        write_image(tmp_path / "images" / kind / '=1+1, or "so".png', kind, 1)
    assert embed(backbone, tmp_path / "images", tmp_path / "f.npy", flags) == 0
    assert embed(backbone, tmp_path / "images", tmp_path / "f.parquet", flags) == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["path", "label", "feature"]
    assert table["label"].to_pylist() == ["dots", "rows"]
    assert table["path"].to_pylist() == [f'{kind}/=1+1, or "so".png' for kind in ("dots", "rows")]
    np.testing.assert_array_equal(np.array(table["feature"].to_pylist()), np.load(tmp_path / "f.npy"))
    assert sorted(path.name for path in tmp_path.glob("f.*")) == ["f.csv", "f.json", "f.npy", "f.parquet"]


@pytest.mark.parametrize("name", ["=1+1", "'=1+1", "-5", "plain", "'quoted'", " @x", "''"])
def test_cells__their_text_comes_back(name: str) -> None:
    assert plain_cell(cell_text(plain_cell(name))) == plain_cell(name)
    assert cell_text(plain_cell(name)) == (name if name != "'=1+1" else "=1+1")  # the one that cannot be told apart


def left_after(seconds: float, state: Path) -> dict[str, object]:
    """What a run has written down of itself by the time that some rows are there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if state.exists() and (left := json.loads(state.read_text()))["rows"] >= 20:
            return left
        time.sleep(0.001)
    raise AssertionError("nothing was written")


@pytest.mark.long
def test_embed__killed_and_resumed_it_writes_the_same_bytes(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (250, 9, 9, 3), dtype=np.uint8))
    (tmp_path / "whole").mkdir()
    assert embed(backbone, images, tmp_path / "whole" / "f.npy", "--batch_size 2") == 0
    words = ["embed", "--backbone", backbone, "--data", images, "--out", tmp_path / "f.npy", "--batch_size", 2]
    command = [sys.executable, "-m", "dmjd.cli", *map(str, words), "--workers", "0", "--device", "cpu"]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        left_after(60, tmp_path / "f.json.partial")
        run.kill()
    assert not (tmp_path / "f.npy").exists()
    with (tmp_path / "f.npy.partial").open("ab") as file:
        file.write(b"half a row")  # a kill comes at any moment
    assert embed(backbone, images, tmp_path / "f.npy", "--batch_size 4 --resume") == 4
    assert "another batch_size than for the existing rows" in capsys.readouterr().err
    before = (tmp_path / "f.npy.partial").stat().st_size
    assert embed(backbone, images, tmp_path / "f.npy", "--batch_size 2 --resume") == 0
    assert before > 1000
    for name in ("f.npy", "f.csv", "f.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_embed__goes_on_in_the_part_where_it_stopped_and_counts_all_that_it_left_out(
    backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "images")
    for name in ("train/dots/03.png", "val/rows/01.png"):
        (tmp_path / "images" / name).write_text("no image")
    (tmp_path / "whole").mkdir()
    assert embed(backbone, tmp_path / "images", tmp_path / "whole" / "f.npy", "--batch_size 4") == 0
    expected = last_line(capsys)
    whole, calls = FeatureWriter.append, []

    def append(self: FeatureWriter, *given: object) -> None:
        calls.append(given)
        if len(calls) == 11:  # in the second part
            raise KeyboardInterrupt
        whole(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "append", append)
        assert embed(backbone, tmp_path / "images", tmp_path / "f.npy", "--batch_size 4") == 130
    assert embed(backbone, tmp_path / "images", tmp_path / "f.npy", "--batch_size 4 --resume") == 0
    assert last_line(capsys) | {"seconds": 0, "out": ""} == expected | {"seconds": 0, "out": ""}
    assert expected["skipped"] == 2
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "whole" / "f.npy").read_bytes()


@pytest.mark.parametrize("verb", ["knn", "embed", "linear"])
def test_judging__without_memory_is_one_line(verb, colours, backbones, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(VisionTransformer, "forward", lambda *_: torch.empty(1 << 60))
    words = ["--backbone", str(backbones["vit"]), "--data", str(colours), "--out", str(tmp_path / "out.npy")]
    assert main([verb, *words, "--device", "cpu", "--workers", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")
    assert "choose cpu for --device" in line
    assert ("--batch_size" in line) == (verb != "linear")  # which has it for the paper's recipe alone
