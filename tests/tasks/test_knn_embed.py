"""What a backbone's features are worth, and the features themselves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmjd import load_backbone
from dmjd.cli import main
from dmjd.data.crops import center_crop
from dmjd.data.decode import Wanted, decode
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
    assert capsys.readouterr().err.startswith("error: none of 1 images decodes")
    assert not out.exists()
