"""Numbers of detection against a slow computation."""

import pickle
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from in_two import in_two
from torch import nn
from torchmetrics.detection import MeanAveragePrecision

from dmjd.data.decode import Wanted
from dmjd.data.detection import open_detection
from dmjd.engine.distributed import Ranks
from dmjd.evaluation.detection import Finder, judge_detection


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
        self.place = nn.Parameter(torch.empty(0))  # says where it computes

    def forward(self, images):
        found, (self.seen,) = next(self.answers), images
        return [
            {
                "boxes": torch.tensor([box for _, _, box in found]).reshape(-1, 4),
                "labels": torch.tensor([label for label, _, _ in found], dtype=torch.long) + 1,
                "scores": torch.tensor([score for _, score, _ in found]),
            }
        ]


@pytest.fixture
def judged(write_coco, tmp_path):
    """Judge a network that gives these answers to these images."""

    def judge(boxes, answers):
        held_out = open_detection(str(write_coco(tmp_path / "data", boxes)), Wanted(3))[1]
        return judge_detection(Finder(Oracle(answers), nullcontext), held_out, Ranks(torch.device("cpu")))

    return judge


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
def test_average_precision__is_that_of_a_slow_computation(case, judged):
    answers = CASES[case]
    found = judged(BOXES, answers)
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


def test_average_precision__two_images_without_a_detection_of_an_absent_class(judged):
    boxes = {"a": [(0, [5.0, 5.0, 20.0, 20.0], False)], "b": []}
    found = judged(boxes, [[(0, 0.9, [5.0, 5.0, 25.0, 25.0])], []])
    assert found.summary["map"] == 1.0
    assert found.rows[1] == {"class": "square", "objects": 0, "ap": ""}


def test_finder__a_network_sees_bytes_as_0_to_1_and_its_first_class_is_the_background():
    network = Oracle([[(1, 0.5, [1.0, 2.0, 3.0, 4.0])]])
    found = Finder(network, nullcontext)(torch.full((3, 5, 6), 255, dtype=torch.uint8))
    assert (network.seen == 1).all()
    assert (found["labels"].tolist(), found["boxes"].tolist()) == ([1], [[1, 2, 3, 4]])


def test_judge_detection__two_ranks_find_what_one_finds_also_where_scores_are_equal(write_coco, tmp_path):
    box = (0, [10.0, 20.0, 30.0, 25.0], False)
    hit, miss = (0, 0.5, [10.0, 20.0, 40.0, 45.0]), (0, 0.5, [45.0, 5.0, 65.0, 25.0])
    answers = [[hit], [miss], [hit]]  # precise is who comes first among equals: they stay in the order of the images
    held_out = open_detection(str(write_coco(tmp_path / "data", {"a": [box], "b": [box], "c": [box]})), Wanted(3))[1]

    def judge(ranks):
        find = Finder(Oracle(answers[ranks.rank :: ranks.world_size]), nullcontext)
        found = judge_detection(find, held_out, ranks)
        return found.summary, found.rows, [(picture.number, picture.prediction["boxes"]) for picture in found.shown]

    alone, together = judge(Ranks(torch.device("cpu"))), in_two(judge)
    assert alone[:2] == together[:2]
    assert alone[0]["images"] == 3
    torch.testing.assert_close(alone[2], together[2])


# -- masks -------------------------------------------------------------------------------------------------------------


class MaskOracle(Oracle):
    """An oracle that draws every object without the upper left quarter of its box, on images of 50 x 70 pixels."""

    def forward(self, images):
        (found,) = super().forward(images)
        masks = torch.zeros(len(found["boxes"]), 1, 50, 70, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks[:, 0], found["boxes"].int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
            mask[top : (top + bottom) // 2, left : (left + right) // 2] = 0
        return [found | {"masks": masks}]


@dataclass(frozen=True)
class WeighingRanks(Ranks):
    """One rank that notes how many bytes it would send to others."""

    weights: list = field(default_factory=list)

    def gather(self, item):
        self.weights.append(len(pickle.dumps(item)))
        return super().gather(item)


@pytest.fixture
def outlined(write_coco, tmp_path):
    """Images whose objects have outlines."""

    def opened(boxes):
        return open_detection(str(write_coco(tmp_path / "data", boxes, masks=True)), Wanted(3))[1]

    return opened


@pytest.mark.parametrize("case", CASES)
def test_average_precision__of_masks_is_that_of_torchmetrics_on_full_masks(case, outlined):
    held_out, ranks = outlined(BOXES), Ranks(torch.device("cpu"))
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"), class_metrics=True, backend="faster_coco_eval")
    find = Finder(MaskOracle(CASES[case]), nullcontext)
    for index in range(len(held_out)):
        image, objects = held_out.read(index)
        truth = {"boxes": objects.boxes, "labels": objects.labels, "masks": objects.masks}
        metric.update([find(image)], [truth | {"iscrowd": objects.ignored.long()}])
    expected = metric.compute()
    judged = judge_detection(Finder(MaskOracle(CASES[case]), nullcontext), held_out, ranks)
    for ours, theirs in {"map": "bbox_map", "mask_map": "segm_map", "mask_map50": "segm_map_50"}.items():
        assert judged.summary[ours] == pytest.approx(float(expected[theirs]), abs=1e-4)
    for row, boxes, masks in zip(
        judged.rows, expected["bbox_map_per_class"], expected["segm_map_per_class"], strict=True
    ):
        assert (row["ap"], row["mask_ap"]) == pytest.approx((float(boxes), float(masks)), abs=1e-4)
    if case == "perfect":
        assert 0 < judged.summary["mask_map"] < judged.summary["map"] == 1.0


def test_judge_detection__ranks_send_each_other_masks_as_run_lengths(outlined):
    one = (0, 0.4, [1.0, 1.0, 60.0, 40.0])  # too unlikely to be drawn
    ranks = WeighingRanks(torch.device("cpu"))
    judge_detection(Finder(MaskOracle([[one] * 100] * len(BOXES)), nullcontext), outlined(BOXES), ranks)
    assert max(ranks.weights) < 100 * 50 * 70 * len(BOXES) / 5
