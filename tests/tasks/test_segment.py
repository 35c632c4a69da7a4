"""Segmentation end to end on small scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

import dmjd
from dmjd.cli import main

FLAGS = {
    "--steps": "6",
    "--batch_size": "4",
    "--workers": "0",
    "--device": "cpu",
    "--log.log_every": "1",
    "--log.evals": "1",
    "--crop_size": "32",
    "--decoder_channels": "16",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Noisy images, red where the class is 0, green where it is 1, with a border that is ignored."""
    root = tmp_path_factory.mktemp("scenes")
    for part, count in (("train", 8), ("val", 3)):
        for number in range(count):
            random = np.random.default_rng((count, number))
            labels = np.full((36 + number, 51), 255, np.uint8)
            edge = random.integers(12, 40)
            labels[2:-2, 2:edge], labels[2:-2, edge:-2] = 0, 1
            image = random.integers(0, 80, (*labels.shape, 3), dtype=np.uint8)
            for channel in (0, 1):
                image[..., channel] += 120 * (labels == channel).astype(np.uint8)
            for folder, array in (("images", image), ("annotations", labels)):
                (root / folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / part / f"{number}.png")
    (root / "classes.txt").write_text("red\ngreen\n")
    return root


def words(backbone, data, out, flags=""):
    given = flags.split()
    unchanged = [word for pair in FLAGS.items() if pair[0] not in given for word in pair]
    return ["segment", "--backbone", str(backbone), "--data", str(data), "--out", str(out), *unchanged, *given]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "convvit", "grey"])
def test_segment__trains_judges_and_predicts(name, scenes, backbones, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(words(backbones[name], scenes, out, "--auxiliary_weight 0.4 --inference slide")) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said.keys() >= {"miou", "pixel_accuracy", "mean_class_accuracy", "images", "train_images", "seconds"}
    assert (said["images"], said["train_images"], said["part"]) == (3, 8, "val")
    assert json.loads((out / "result.json").read_text()) == said
    assert {"loss", "loss_auxiliary", "lr", "grad_norm"} <= lines(out)[0].keys()
    assert (out / "per_class.csv").read_text().splitlines()[0] == "class,pixels,accuracy,iou"
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 9
    assert "mIoU" in page
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert "https:" not in page

    images, seen = scenes / "images" / "val", tmp_path / "seen"
    assert (
        main(["segment", "--backbone", str(out / "last.safetensors"), "--predict", str(images), "--out", str(seen)])
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
    for number in range(3):
        mask = np.array(Image.open(seen / "masks" / f"{number}.png"))
        overlay = np.array(Image.open(seen / "overlays" / f"{number}.jpg"))
        assert (*mask.shape, 3) == overlay.shape == (36 + number, 51, 3)
        assert {*mask.ravel().tolist()} <= {0, 1}
    assert (seen / "classes.txt").read_text() == "red\ngreen\n"
    # What it sees in the held-out images is what the run was judged by.
    true = [np.array(Image.open(scenes / "annotations" / "val" / f"{number}.png")) for number in range(3)]
    found = [np.array(Image.open(seen / "masks" / f"{number}.png")) for number in range(3)]
    known = np.concatenate([labels.ravel() for labels in true]) != 255
    flat = [np.concatenate([labels.ravel() for labels in each])[known] for each in (true, found)]
    assert jaccard_score(*flat, average="macro") == pytest.approx(said["miou"], abs=1e-4)


def test_segment__tells_red_from_green(scenes, backbones, tmp_path, capsys):
    flags = "--steps 80 --optim.blr 0.3 --optim.warmup_epochs 2 --log.evals 0"
    assert main(words(backbones["convvit"], scenes, tmp_path / "run", flags)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["miou"] > 0.8


def test_segment__stopped_and_resumed_it_ends_as_if_unbroken(scenes, backbones, tmp_path, interrupt):
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    flags = "--steps 20 --drop_path 0.2 --auxiliary_weight 0.4"
    assert main(words(backbones["vit"], scenes, unbroken, flags)) == 0
    interrupt(words(backbones["vit"], scenes, stopped, flags))
    assert main(words(backbones["vit"], scenes, stopped, f"{flags} --resume")) == 0
    losses = [{line["step"]: line["loss"] for line in lines(out) if "loss" in line} for out in (unbroken, stopped)]
    assert losses[0] == losses[1]
    ends = [json.loads((out / "result.json").read_text()) for out in (unbroken, stopped)]
    assert ends[0] | {"seconds": 0} == ends[1] | {"seconds": 0}
    assert ends[1]["seconds"] >= round(lines(stopped)[-1]["seconds"], 1)  # of both processes together


def test_segment__takes_a_convolutional_model_of_timm(scenes, tmp_path):
    timm.create_model("test_resnet")  # known to this version of timm
    assert main([*words("timm:test_resnet", scenes, tmp_path / "run", "--steps 2"), "--untrained"]) == 0


@pytest.mark.parametrize("name", ["vit", "convvit"])
def test_segment__its_backbone_goes_on_to_the_next_task(name, scenes, backbones, tmp_path):
    assert main(words(backbones[name], scenes, tmp_path / "first", "--steps 2")) == 0
    file = tmp_path / "first" / "last.safetensors"
    model, weights = dmjd.load_backbone(file), load_file(file)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[f"pyramid.backbone.{key}"])
    before = dmjd.load_backbone(backbones[name]).state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert main(words(file, scenes, tmp_path / "second", "--steps 1")) == 0


def test_segment__a_model_that_is_bound_to_a_size_is_refused(scenes, tmp_path, capsys):
    assert main([*words("timm:eva02_tiny_patch14_224", scenes, tmp_path / "run"), "--untrained"]) == 2
    assert "cannot take images of arbitrary size; timm:eva02_tiny_patch14_224" in capsys.readouterr().err


def test_segment__a_bad_annotation_stops_a_small_run_and_is_named(scenes, backbones, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("red\n")
    code = main(words(backbones["vit"], scenes, tmp_path / "run", f"--classes {tmp_path / 'names.txt'}"))
    assert code == 3
    assert "label 1, but the last of 1 classes is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--batch_size 1", 2, "BatchNorm needs two images"),
        ("--crop_size 12xa", 2, "neither SIDE nor HEIGHTxWIDTH"),
        ("--inference slide --stride 50", 2, "leaves gaps"),
        ("--scale 2 1", 2, "low before high"),
        ("--layer_decay 1.5", 2, "layer_decay 1.5 is out of range"),
        ("--predict nowhere", 4, "no network of dmjd segment"),
    ],
)
def test_segment__a_users_mistake_is_one_line(flags, code, said, scenes, backbones, tmp_path, capsys):
    assert main(words(backbones["vit"], scenes, tmp_path / "run", flags)) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert said in error[0]


@pytest.mark.parametrize("verb", ["segment", "detect"])
def test_dense__without_images_to_learn_from_or_to_look_at_it_says_so(verb, backbones, tmp_path, capsys):
    assert main([verb, "--backbone", str(backbones["vit"]), "--out", str(tmp_path / "run")]) == 2
    assert "no data: give --data to train, or --predict" in capsys.readouterr().err


@pytest.mark.slow
def test_segment__two_workers_train_what_none_does(scenes, backbones, tmp_path):
    runs = [tmp_path / workers for workers in ("0", "2")]
    for out in runs:
        assert main(words(backbones["convvit"], scenes, out, f"--steps 3 --log.evals 0 --workers {out.name}")) == 0
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_segment__extremely_long_images_are_trained_on_judged_and_predicted(inference, backbones, tmp_path, capsys):
    shapes, out, seen = ((20, 3000), (3000, 20), (1, 5000)), tmp_path / "run", tmp_path / "seen"
    for part in ("train", "val"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / part).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            labels = np.random.default_rng(number).integers(0, 2, shape, dtype=np.uint8)
            Image.fromarray(labels).save(tmp_path / "annotations" / part / f"{number}.png")
            Image.fromarray(labels * 200).save(tmp_path / "images" / part / f"{number}.png")
    flags = f"--steps 3 --log.evals 0 --inference {inference}"
    assert main(words(backbones["vit"], tmp_path, out, flags)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
    predict = ["--predict", str(tmp_path / "images" / "val"), "--out", str(seen), "--device", "cpu"]
    assert main(["segment", "--backbone", str(out / "last.safetensors"), *predict]) == 0
    for number, shape in enumerate(shapes):
        assert np.array(Image.open(seen / "masks" / f"{number}.png")).shape == shape
