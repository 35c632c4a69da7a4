"""Detection end to end on small scenes, and its numbers against a slow computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image
from torch import nn

from dmjd.cli import main
from dmjd.config import Detect
from dmjd.data.detection import load
from dmjd.evaluation.extractor import FeatureExtractor
from dmjd.tasks.dense import opened
from dmjd.tasks.detect import detector, instances, judge, see

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


def write(root: Path, boxes: dict[str, list[tuple[int, list[float], bool]]], *, masks: bool = False) -> Path:
    """Images of 50 x 70 pixels by name with (class, box as left, top, width, height, crowd), the same in both parts."""
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": c} for i, c in enumerate(CLASSES)]}
    for number, (name, objects) in enumerate(boxes.items()):
        pixels = np.random.default_rng(number).integers(0, 90, (50, 70, 3), dtype=np.uint8)
        for label, (left, top, width, height), crowd in objects:
            pixels[int(top) : int(top + height), int(left) : int(left + width), label] += 150
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            outline = {"segmentation": [corners]} if masks else {}
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": number,
                    "category_id": label,
                    "bbox": [left, top, width, height],
                    "iscrowd": int(crowd),
                    **outline,
                }
            )
        content["images"].append({"id": number, "file_name": f"{name}.png", "height": 50, "width": 70})
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


SCENES = {
    "a": [(0, [5, 5, 20, 20], False), (1, [35, 10, 25, 30], False)],
    "b": [(1, [10, 20, 30, 25], False)],
    "c": [],
    "d": [(0, [40, 20, 24, 24], False), (0, [2, 2, 18, 18], False)],
}


# -- average precision -------------------------------------------------------------------------------------------------


def overlap(box, other):
    """IoU of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    inside = max(width, 0) * max(height, 0)
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
    return inside / (sum(areas) - inside)


def slow_precision(truths, founds, threshold):
    """Average precision of one class at one IoU: the mean over 101 recalls of the best precision from there on.

    Detections in falling order of scores take the free box that they overlap most; those within nothing but an ignored
    one do not count.
    """
    ordered = sorted(
        ((score, image, box) for image, found in enumerate(founds) for score, box in found), key=lambda each: -each[0]
    )
    taken, hits = set(), []
    for _, image, box in ordered:
        best = max(
            (
                (overlap(box, truth), number)
                for number, (truth, ignored) in enumerate(truths[image])
                if not ignored and (image, number) not in taken and overlap(box, truth) >= threshold
            ),
            default=None,
        )
        if best:
            taken.add((image, best[1]))
            hits.append(True)
        elif not any(ignored and inside(box, truth) >= threshold for truth, ignored in truths[image]):
            hits.append(False)
    total = sum(not ignored for truth in truths for _, ignored in truth)
    right = np.cumsum(hits)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    points = [precision[recall >= point - 1e-12] for point in np.linspace(0, 1, 101)]
    return np.mean([point.max() if len(point) else 0 for point in points])


def inside(box, crowd):
    """Share of a box that a crowd covers, which is what COCO compares with a crowd."""
    width = min(box[2], crowd[2]) - max(box[0], crowd[0])
    height = min(box[3], crowd[3]) - max(box[1], crowd[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


class Oracle(nn.Module):
    """A network that finds what it is told, image by image."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        found = next(self.answers)
        return [
            {
                "boxes": torch.tensor([box for _, _, box in found]).reshape(-1, 4),
                "labels": torch.tensor([label for label, _, _ in found], dtype=torch.long) + 1,
                "scores": torch.tensor([score for _, score, _ in found]),
            }
        ]


def judged(tmp_path, backbones, boxes, answers):
    held_out = load(str(write(tmp_path / "data", boxes)), in_chans=3)[1]
    settings = Detect(data="none", backbone=str(backbones["vit"]), device="cpu")
    return judge(FeatureExtractor(settings, settings.backbone), Oracle(answers), held_out)


BOXES = {
    "a": [(0, [5.0, 5.0, 20.0, 20.0], False), (1, [35.0, 10.0, 25.0, 30.0], False)],
    "b": [(0, [10.0, 20.0, 30.0, 25.0], False), (0, [45.0, 5.0, 20.0, 20.0], True)],
}
CASES = {
    "perfect": [
        [(0, 0.9, [5.0, 5.0, 25.0, 25.0]), (1, 0.8, [35.0, 10.0, 60.0, 40.0])],
        [(0, 0.7, [10.0, 20.0, 40.0, 45.0])],
    ],
    "nothing found": [[], []],
    "one pixel off": [
        [(0, 0.9, [6.0, 5.0, 26.0, 25.0]), (1, 0.8, [35.0, 11.0, 60.0, 41.0])],
        [(0, 0.7, [11.0, 20.0, 41.0, 45.0])],
    ],
    "inside the ignored one": [
        [(0, 0.9, [5.0, 5.0, 25.0, 25.0]), (1, 0.8, [35.0, 10.0, 60.0, 40.0])],
        [(0, 0.95, [46.0, 6.0, 64.0, 24.0]), (0, 0.7, [10.0, 20.0, 40.0, 45.0])],
    ],
    "false, double and misplaced ones": [
        [
            (0, 0.5, [5.0, 5.0, 25.0, 25.0]),
            (0, 0.9, [30.0, 30.0, 40.0, 40.0]),
            (0, 0.4, [6.0, 6.0, 25.0, 25.0]),
            (1, 0.8, [5.0, 5.0, 25.0, 25.0]),
        ],
        [(0, 0.7, [14.0, 20.0, 40.0, 45.0])],
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_average_precision__is_that_of_a_slow_computation(case, backbones, tmp_path):
    answers = CASES[case]
    found = judged(tmp_path, backbones, BOXES, answers)
    of_class = {}
    for label in (0, 1):
        truths = [
            [((b[0], b[1], b[0] + b[2], b[1] + b[3]), crowd) for own, b, crowd in objects if own == label]
            for objects in BOXES.values()
        ]
        founds = [[(score, box) for own, score, box in answer if own == label] for answer in answers]
        of_class[label] = [slow_precision(truths, founds, iou) for iou in np.linspace(0.5, 0.95, 10)]
    assert found.summary["map"] == pytest.approx(np.mean([*of_class.values()]), abs=1e-3)
    assert found.summary["map50"] == pytest.approx(np.mean([each[0] for each in of_class.values()]), abs=1e-3)
    assert found.summary["map75"] == pytest.approx(np.mean([each[5] for each in of_class.values()]), abs=1e-3)
    for label, row in enumerate(found.rows):
        assert row["ap"] == pytest.approx(np.mean(of_class[label]), abs=1e-3)
    if case == "perfect":
        assert found.summary["map"] == found.summary["map_small"] == 1.0
        assert found.summary["map_large"] is None  # there is none
    if case == "nothing found":
        assert found.summary["map"] == 0.0
    if case == "one pixel off":
        assert 0.5 < found.summary["map"] < 1.0


def test_average_precision__two_images_without_a_detection_of_an_absent_class(backbones, tmp_path):
    boxes = {"a": [(0, [5.0, 5.0, 20.0, 20.0], False)], "b": []}
    found = judged(tmp_path, backbones, boxes, [[(0, 0.9, [5.0, 5.0, 25.0, 25.0])], []])
    assert found.summary["map"] == 1.0
    assert found.rows[1] == {"class": "square", "objects": 0, "ap": ""}


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "masks", "flags"), [("vit", True, "--window 2"), ("convvit", False, ""), ("grey", False, "")]
)
def test_detect__trains_judges_and_predicts(name, masks, flags, backbones, tmp_path, capsys):
    data, out = write(tmp_path / "data", SCENES, masks=masks), tmp_path / "run"
    assert main(words(backbones[name], data, out, flags)) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said.keys() >= {"map", "map50", "map75", "map_small", "map_medium", "map_large", "images", "seconds"}
    assert ("mask_map" in said) == masks
    assert (said["images"], said["train_images"]) == (4, 4)
    assert {"loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= lines(out)[0].keys()
    assert ("loss_mask" in lines(out)[0]) == masks
    assert (out / "report.html").read_text().count("data:image/jpeg") == 12

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


def test_detect__finds_squares(backbones, tmp_path, capsys):
    data = write(tmp_path / "data", SCENES)
    flags = "--steps 100 --optim.blr 0.6 --optim.warmup_epochs 2 --fpn_channels 16 --head_channels 32 --log.evals 0"
    assert main(words(backbones["convvit"], data, tmp_path / "run", f"{flags} --scale 0.9 1.1")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["map50"] > 0.5


def test_detect__stopped_and_resumed_it_ends_as_if_unbroken(backbones, tmp_path, interrupt):
    data, unbroken, stopped = write(tmp_path / "data", SCENES), tmp_path / "unbroken", tmp_path / "stopped"
    flags = "--steps 20 --drop_path 0.2"
    assert main(words(backbones["vit"], data, unbroken, flags)) == 0
    interrupt(words(backbones["vit"], data, stopped, flags))
    assert main(words(backbones["vit"], data, stopped, f"{flags} --resume")) == 0
    losses = [{line["step"]: line["loss"] for line in lines(out) if "loss" in line} for out in (unbroken, stopped)]
    assert losses[0] == losses[1]
    ends = [json.loads((out / "result.json").read_text()) | {"seconds": 0} for out in (unbroken, stopped)]
    assert ends[0] == ends[1]


def network(backbones, masks=False, **settings):
    given = Detect(data="none", backbone=str(backbones["vit"]), device="cpu", fpn_channels=8, **settings)
    torch.manual_seed(0)
    backbone, pyramid = opened(given)
    return backbone, detector(given, backbone, pyramid, 2, masks=masks)


def test_detector__what_it_sees_does_not_depend_on_the_image_before(backbones):
    image = torch.randint(256, (3, 128, 256), dtype=torch.uint8)
    found = []
    for first in ((3, 128, 256), (3, 80, 256)):  # the second is padded to a map that suggests another stride
        backbone, model = network(backbones, crop_size="128x256")
        model.eval()
        with torch.inference_mode():
            see(backbone, model, torch.zeros(first, dtype=torch.uint8))
            found.append(see(backbone, model, image))
    assert len(found[0]["boxes"])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_detector__boxes_are_computed_in_float32_whatever_the_precision(backbones):
    backbone, model = network(backbones, masks=True, crop_size="64", precision="bf16")
    types = []
    model.rpn.anchor_generator.register_forward_hook(lambda module, given, found: types.append(found[0].dtype))
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pooler.register_forward_pre_hook(lambda module, given: types.append(given[1][0].dtype))
    box, mask = torch.tensor([[8.0, 8.0, 40.0, 50.0]]), torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 8:50, 8:40] = True
    with backbone.autocast():
        maps = model.backbone.pyramid(torch.rand(1, 3, 64, 64))
        losses = model([torch.rand(3, 64, 64)], [{"boxes": box, "labels": torch.ones(1).long(), "masks": mask}])
    assert maps[0].dtype == torch.bfloat16  # the backbone does compute in half precision
    assert types == [torch.float32] * 3
    sum(losses.values()).backward()


def test_instances__where_two_overlap_the_more_likely_one_is_in_front():
    masks = torch.tensor([[[1, 1, 0]], [[0, 1, 1]]], dtype=torch.bool)
    assert instances(masks, 1, 3).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--window 0", 2, "window 0 is out of range"),
        ("--fpn_channels 0", 2, "fpn_channels 0 is out of range"),
        ("--predict nowhere", 4, "no network of dmjd detect"),
        ("--classes nowhere.txt", 3, "no names of classes"),
    ],
)
def test_detect__a_users_mistake_is_one_line(flags, code, said, backbones, tmp_path, capsys):
    data = write(tmp_path / "data", SCENES)
    assert main(words(backbones["vit"], data, tmp_path / "run", flags)) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert said in error[0]


def test_detect__windows_of_a_hybrid_are_refused(backbones, tmp_path, capsys):
    data = write(tmp_path / "data", SCENES)
    assert main(words(backbones["convvit"], data, tmp_path / "run", "--window 2")) == 2
    assert "windows need a ViT" in capsys.readouterr().err


def test_predict__an_empty_folder_twins_and_a_broken_image(backbones, tmp_path, capsys):
    data, out = write(tmp_path / "data", SCENES), tmp_path / "run"
    assert main(words(backbones["convvit"], data, out, "--steps 1 --log.evals 0")) == 0
    command = ["detect", "--backbone", str(out / "last.safetensors"), "--out", str(tmp_path / "seen"), "--predict"]
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty")]) == 3
    assert main([*command, str(tmp_path / "nowhere")]) == 3
    assert "no such image or folder" in capsys.readouterr().err
    (data / "images" / "a.jpg").write_bytes((data / "images" / "a.png").read_bytes())
    assert main([*command, str(data / "images")]) == 3
    assert "two images of the same name" in capsys.readouterr().err
    (data / "images" / "a.jpg").unlink()
    (data / "images" / "b.png").write_bytes(b"no image")
    assert main([*command, str(data / "images")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]).items() >= {"images": 3, "skipped": 1}.items()
    assert "b.png" in said.err


def test_detect__two_workers_train_what_none_does(backbones, tmp_path):
    data = write(tmp_path / "data", SCENES, masks=True)
    runs = [tmp_path / workers for workers in ("0", "2")]
    for out in runs:
        assert main(words(backbones["convvit"], data, out, f"--steps 3 --log.evals 0 --workers {out.name}")) == 0
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
