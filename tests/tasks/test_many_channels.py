"""Images of twelve channels and twelve bits, from a folder of arrays to the numbers of every verb."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import dmjd
from dmjd.backbones.files import save_backbone
from dmjd.backbones.vit import create_vit
from dmjd.cli import main
from dmjd.data.crops import center_crop

CHANNELS, LIGHT = 12, "--steps 2 --batch_size 4 --workers 0 --device cpu --log.evals 0"
CLASSES = ("corn", "rye")


def pixels(number: int, labels: np.ndarray) -> np.ndarray:
    """Noise of 12 bits; a channel of each class is brighter where the class is."""
    image = np.random.default_rng(number).integers(0, 1500, (*labels.shape, CHANNELS))
    for label in range(len(CLASSES)):
        image[..., 5 + label] += 2000 * (labels == label)
    image[0, 0] = 4095
    return image.astype(np.uint16)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    encoder = create_vit("tiny", image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, in_chans=CHANNELS)
    path = tmp_path_factory.mktemp("backbone") / "twelve.safetensors"
    save_backbone(path, encoder.backbone, encoder.architecture, [0.2] * CHANNELS, [0.1] * CHANNELS)
    return path


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> Path:
    """Arrays in class folders."""
    root = tmp_path_factory.mktemp("fields")
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                array = pixels(100 * count + 10 * label + number, np.full((36, 40), label))
                np.save(root / part / name / f"{number}.npy", array)
    return root


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Path:
    """Arrays with a class for every pixel, and as COCO has them: the left half is of the first class."""
    root = tmp_path_factory.mktemp("maps")
    for part, count in (("train", 5), ("val", 2)):
        labels = np.zeros((36, 50), np.uint8)
        labels[:, 25:] = 1
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            np.save(root / "images" / part / f"{number}.npy", pixels(100 * count + number, labels))
            Image.fromarray(labels).save(root / "annotations" / part / f"{number}.png")
        boxes = [
            {"id": number, "image_id": number, "category_id": 0, "bbox": [0, 0, 25, 36], "iscrowd": 0}
            for number in range(count)
        ]
        content = {
            "images": [{"id": number, "file_name": f"{number}.npy"} for number in range(count)],
            "categories": [{"id": 0, "name": "corn"}],
            "annotations": boxes,
        }
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def run(verb: str, backbone: Path, data: Path, flags: str) -> int:
    return main([verb, "--backbone", str(backbone), "--data", str(data), *flags.split()])


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_knn__tells_classes_of_images_of_twelve_channels(backbone, fields, capsys):
    assert run("knn", backbone, fields, "--k 3 --device cpu") == 0
    assert said(capsys)["top1"] == 1.0


def test_embed__features_are_those_of_values_over_their_range(backbone, fields, tmp_path):
    assert run("embed", backbone, fields, f"--out {tmp_path / 'all.npy'} --device cpu") == 0
    features, model = np.load(tmp_path / "all.npy"), dmjd.load_backbone(backbone)
    first = np.load(fields / "train" / CLASSES[0] / "0.npy").astype(np.float32) / 4095
    image = center_crop(torch.from_numpy(first).permute(2, 0, 1), (32, 32))
    with torch.inference_mode():
        expected = model(((image - 0.2) / 0.1)[None])[0]
    assert features.shape == (18, 16)
    np.testing.assert_allclose(features[0], expected.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("linear", ""),
        ("linear", f"--recipe paper --warmup_epochs 0 {LIGHT}"),
        ("finetune", f"--augment.auto_augment rand-m9-mstd0.5-inc1 --augment.random_erasing 0.5 {LIGHT}"),
    ],
)
def test_classifiers__learn_from_images_of_twelve_channels(verb, flags, backbone, fields, tmp_path, capsys):
    assert run(verb, backbone, fields, f"{flags} --out {tmp_path / 'run'}") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 <= result["top1"] <= 1
    if flags:
        assert losses(tmp_path / "run")
        assert all(map(math.isfinite, losses(tmp_path / "run")))
    lines = capsys.readouterr().err.splitlines()
    left_out = [line for line in lines if "RandAugment" in line]
    assert len(left_out) == (verb == "finetune")  # said once
    if verb == "finetune":
        model = dmjd.load_backbone(tmp_path / "run" / "last.safetensors")
        assert model.value_range == [0, 4095]


@pytest.mark.parametrize("policy", ["none", "rand-m9-mstd0.5-inc1"])
def test_finetune__says_that_deep_colours_go_without_a_policy(policy, backbones, tmp_path, capsys):
    for part in ("train", "val"):
        for label, name in enumerate(CLASSES):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(4):
                array = pixels(10 * label + number, np.full((36, 40), label))[..., 4:7]
                np.save(tmp_path / "data" / part / name / f"{number}.npy", array)
    flags = f"{LIGHT} --augment.auto_augment {policy} --out {tmp_path / 'run'}"
    assert run("finetune", backbones["vit"], tmp_path / "data", flags) == 0
    assert ("no RandAugment" in capsys.readouterr().err) == (policy != "none")


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_segment__trains_judges_and_predicts_images_of_twelve_channels(inference, backbone, maps, tmp_path, capsys):
    out, seen = tmp_path / "run", tmp_path / "seen"
    flags = f"--crop_size 32 --decoder_channels 16 --inference {inference} {LIGHT} --out {out}"
    assert run("segment", backbone, maps, flags) == 0
    assert 0 <= said(capsys)["miou"] <= 1
    assert all(map(math.isfinite, losses(out)))
    predict = ["--predict", str(maps / "images" / "val"), "--out", str(seen), "--device", "cpu"]
    assert main(["segment", "--backbone", str(out / "last.safetensors"), *predict]) == 0
    assert np.array(Image.open(seen / "masks" / "0.png")).shape == (36, 50)
    picture = np.array(Image.open(seen / "overlays" / "0.jpg"))
    assert picture.shape == (36, 50, 3)
    assert 10 < picture.mean() < 150  # neither black nor white: noise of 1,500 of 4,095, and colours


def test_detect__trains_judges_and_predicts_images_of_twelve_channels(backbone, maps, tmp_path, capsys):
    out, seen = tmp_path / "run", tmp_path / "seen"
    flags = f"--crop_size 64 --fpn_channels 8 --head_channels 16 {LIGHT} --out {out}"
    assert run("detect", backbone, maps, flags) == 0
    assert said(capsys)["images"] == 2
    assert all(map(math.isfinite, losses(out)))
    predict = ["--predict", str(maps / "images" / "val" / "1.npy"), "--out", str(seen), "--device", "cpu"]
    assert main(["detect", "--backbone", str(out / "last.safetensors"), *predict]) == 0
    assert np.array(Image.open(seen / "overlays" / "1.jpg")).shape == (36, 50, 3)


def test_pretrain__prints_commands_that_work_for_pages_as_channels(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plates").mkdir()
    for number in range(8):
        tifffile.imwrite(f"plates/{number}.tif", pixels(number, np.zeros((36, 40), int)).transpose(2, 0, 1))
    shape = "--model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2"
    head = "--decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --monitor.evals 0"
    short = f"{shape} {head} --steps 2 --batch_size 4 --workers 0 --device cpu"
    # The preset auto counts the channels, which are the pages here.
    assert main(["pretrain", "--data", "plates", "--data_pages", "bands", "--out", "run", *short.split()]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition("then: ")[2]
    assert main([*shlex.split(command)[1:], "--device", "cpu"]) == 0
    assert np.load("features.npy").shape == (8, 16)
    assert f"{command.replace(' --out features.npy', '')} --out features.npy" in Path("run/report.html").read_text()
