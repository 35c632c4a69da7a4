"""Detection end to end on small scenes."""

import json

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image

from dmjd.cli import main
from dmjd.tasks.detect import instances

FLAGS = {
    "--steps": "4",
    "--batch_size": "2",
    "--workers": "0",
    "--device": "cpu",
    "--log.log_every": "1",
    "--log.evals": "1",
    "--crop_size": "64",
    "--fpn_channels": "8",
    "--head_channels": "16",
}
CLASSES = ("disc", "square")


def words(backbone, data, out, flags=""):
    given = flags.split()
    unchanged = [word for pair in FLAGS.items() if pair[0] not in given for word in pair]
    return ["detect", "--backbone", str(backbone), "--data", str(data), "--out", str(out), *unchanged, *given]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


SCENES = {
    "a": [(0, [5, 5, 20, 20], False), (1, [35, 10, 25, 30], False)],
    "b": [(1, [10, 20, 30, 25], False)],
    "c": [],
    "d": [(0, [40, 20, 24, 24], False), (0, [2, 2, 18, 18], False)],
}


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "masks", "flags"), [("vit", True, "--window 2"), ("convvit", False, ""), ("grey", False, "")]
)
def test_detect__trains_judges_and_predicts(name, masks, flags, backbones, tmp_path, capsys, write_coco):
    data, out = write_coco(tmp_path / "data", SCENES, masks=masks), tmp_path / "run"
    assert main(words(backbones[name], data, out, flags)) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said.keys() >= {"map", "map50", "map75", "map_small", "map_medium", "map_large", "images", "seconds"}
    assert ("mask_map" in said) == masks
    assert (said["images"], said["train_images"], said["part"]) == (4, 4, "val")
    assert {"loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= lines(out)[0].keys()
    assert ("loss_mask" in lines(out)[0]) == masks
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 12
    assert "Pictures show boxes with a score of 0.5 or more." in page

    seen = tmp_path / "seen"
    network, images = str(out / "last.safetensors"), str(data / "images")
    assert main(["detect", "--backbone", network, "--predict", images, "--out", str(seen), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 4
    content = COCO(str(seen / "detections.json"))
    assert [each["name"] for each in content.dataset["categories"]] == [*CLASSES]
    assert [each["file_name"] for each in content.dataset["images"]] == ["a.png", "b.png", "c.png", "d.png"]
    for each in content.dataset["annotations"]:
        left, top, width, height = each["bbox"]
        assert left >= 0
        assert top >= 0
        assert left + width <= 70.01
        assert top + height <= 50.01
        assert 0 <= each["score"] <= 1
        assert not masks or content.annToMask(each).shape == (50, 70)
    assert np.array(Image.open(seen / "overlays" / "c.jpg")).shape == (50, 70, 3)
    assert (seen / "masks").is_dir() == masks


@pytest.mark.long
def test_detect__finds_squares(backbones, tmp_path, capsys, write_coco):
    data = write_coco(tmp_path / "data", SCENES)
    flags = "--steps 100 --optim.blr 0.6 --optim.warmup_epochs 2 --fpn_channels 16 --head_channels 32 --log.evals 0"
    assert main(words(backbones["convvit"], data, tmp_path / "run", f"{flags} --scale 0.9 1.1")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["map50"] > 0.5


@pytest.mark.long
def test_detect__stopped_and_resumed_it_ends_as_if_unbroken(backbones, tmp_path, interrupt, write_coco):
    data, unbroken, stopped = write_coco(tmp_path / "data", SCENES), tmp_path / "unbroken", tmp_path / "stopped"
    flags = "--steps 20 --drop_path 0.2"
    assert main(words(backbones["vit"], data, unbroken, flags)) == 0
    interrupt(words(backbones["vit"], data, stopped, flags))
    assert main(words(backbones["vit"], data, stopped, f"{flags} --resume")) == 0
    losses = [{line["step"]: line["loss"] for line in lines(out) if "loss" in line} for out in (unbroken, stopped)]
    assert losses[0] == losses[1]
    ends = [json.loads((out / "result.json").read_text()) | {"seconds": 0} for out in (unbroken, stopped)]
    assert ends[0] == ends[1]


def test_instances__where_two_overlap_the_more_likely_one_is_in_front():
    masks = torch.tensor([[[1, 1, 0]], [[0, 1, 1]]], dtype=torch.bool)
    assert instances(masks, 1, 3).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--window 0", 2, "window 0 is out of range"),
        ("--fpn_channels 0", 2, "fpn_channels 0 is out of range"),
        ("--predict nowhere", 4, "no network of dmjd detect"),
        ("--classes nowhere.txt", 3, "no class names"),
    ],
)
def test_detect__a_users_mistake_is_one_line(flags, code, said, backbones, tmp_path, capsys, write_coco):
    data = write_coco(tmp_path / "data", SCENES)
    assert main(words(backbones["vit"], data, tmp_path / "run", flags)) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert said in error[0]


def test_detect__windows_of_a_hybrid_are_refused(backbones, tmp_path, capsys, write_coco):
    data = write_coco(tmp_path / "data", SCENES)
    assert main(words(backbones["convvit"], data, tmp_path / "run", "--window 2")) == 2
    assert "windows need a ViT" in capsys.readouterr().err


def test_predict__an_empty_folder_twins_and_a_broken_image(backbones, tmp_path, capsys, write_coco):
    data, out = write_coco(tmp_path / "data", SCENES), tmp_path / "run"
    assert main(words(backbones["convvit"], data, out, "--steps 1 --log.evals 0")) == 0
    command = ["detect", "--backbone", str(out / "last.safetensors"), "--out", str(tmp_path / "seen"), "--predict"]
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty")]) == 3
    assert main([*command, str(tmp_path / "nowhere")]) == 3
    assert "no such data" in capsys.readouterr().err
    (data / "images" / "a.jpg").write_bytes((data / "images" / "a.png").read_bytes())
    assert main([*command, str(data / "images")]) == 3
    assert "two images of the same name" in capsys.readouterr().err
    (data / "images" / "a.jpg").unlink()
    (data / "images" / "b.png").write_bytes(b"no image")
    assert main([*command, str(data / "images")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]).items() >= {"images": 3, "skipped": 1}.items()
    assert "b.png" in said.err


@pytest.mark.slow
def test_detect__two_workers_train_what_none_does(backbones, tmp_path, write_coco):
    data = write_coco(tmp_path / "data", SCENES, masks=True)
    runs = [tmp_path / workers for workers in ("0", "2")]
    for out in runs:
        assert main(words(backbones["convvit"], data, out, f"--steps 3 --log.evals 0 --workers {out.name}")) == 0
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_detect__extremely_long_images_are_trained_on_and_judged(backbones, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    shapes = ((20, 3000), (3000, 20), (1, 5000))
    for number, shape in enumerate(shapes):
        Image.fromarray(np.full(shape, 90, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(len(shapes))],
        "categories": [{"id": 0, "name": "line"}],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 0, "bbox": [0, 0, width, height]}
            for number, (height, width) in enumerate(shapes)
        ],
    }
    for part in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    assert main(words(backbones["vit"], tmp_path, tmp_path / "run", "--steps 3 --log.evals 0")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
