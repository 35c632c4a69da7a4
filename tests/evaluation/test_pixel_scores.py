"""Numbers of segmentation against others', and the windows that large images are seen in."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from in_two import in_two
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import nn

from dmjd.backbones.normalize import Normalize
from dmjd.data.decode import Wanted
from dmjd.data.segmentation import open_segmentation
from dmjd.engine.distributed import Ranks
from dmjd.evaluation.segmentation import PixelClassifier, judge_segmentation, scores, starts


def confusion(true: np.ndarray, predicted: np.ndarray, count: int) -> torch.Tensor:
    table = torch.zeros(count, count, dtype=torch.long)
    for row, column in zip(true.ravel(), predicted.ravel(), strict=True):
        table[row, column] += 1
    return table


def test_scores__worked_by_hand():
    perfect, _ = scores(torch.diag(torch.tensor([5, 3, 0])), "abc")
    assert perfect == {"miou": 1.0, "pixel_accuracy": 1.0, "mean_class_accuracy": 1.0}
    # One of six pixels of class a is taken for b: IoU 5/6 and 2/3, accuracy 5/6 and 1.
    off, rows = scores(torch.tensor([[5, 1], [0, 2]]), "ab")
    assert off == {"miou": 0.75, "pixel_accuracy": 0.875, "mean_class_accuracy": 0.9167}
    assert rows[0] == {"class": "a", "pixels": 6, "accuracy": 0.8333, "iou": 0.8333}
    # A class that is only predicted counts with IoU 0; one that nobody has seen does not count.
    absent, rows = scores(torch.tensor([[4, 1, 0], [0, 0, 0], [0, 0, 0]]), "abc")
    assert absent == {"miou": 0.4, "pixel_accuracy": 0.8, "mean_class_accuracy": 0.8}
    assert (rows[1]["iou"], rows[1]["accuracy"], rows[2]["iou"]) == (0.0, "", "")
    assert scores(torch.zeros(2, 2, dtype=torch.long), "ab")[0]["miou"] == 0.0  # every pixel ignored


def test_scores__are_scikit_learns():
    random = np.random.default_rng(0)
    true, predicted = random.integers(0, 4, 300), random.integers(0, 4, 300)
    found, rows = scores(confusion(true, predicted, 4), "abcd")
    assert found["miou"] == pytest.approx(jaccard_score(true, predicted, average="macro"), abs=1e-4)
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(true, predicted), abs=1e-4)
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted), abs=1e-4)
    by_class = jaccard_score(true, predicted, average=None)
    assert [row["iou"] for row in rows] == pytest.approx(by_class.tolist(), abs=1e-4)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("full", "expected"), [(10, [0]), (11, [0, 1]), (17, [0, 6, 7]), (22, [0, 6, 12])])
def test_windows__cover_the_image_and_end_with_it(full, expected):
    assert starts(full, 10, 6) == expected


class Pointwise(nn.Conv2d):
    """A network that sees single pixels, and remembers the sizes of what it saw."""

    def forward(self, images):
        self.sizes = [*getattr(self, "sizes", []), images.shape[2:]]
        return [super().forward(images)]


@pytest.mark.parametrize("size", [(40, 70), (20, 70), (24, 32), (9, 11)])
def test_windows__of_a_network_that_sees_single_pixels_are_the_whole_image(size):
    model, image = Pointwise(3, 5, 1), torch.randn(1, 3, *size)
    whole, slid = (
        PixelClassifier(model, nn.Identity(), nullcontext, (24, 32), slide=slide).logits(image)
        for slide in (False, True)
    )
    torch.testing.assert_close(whole, slid)


@pytest.mark.parametrize("slide", [False, True])
@pytest.mark.parametrize("shape", [(20, 8000), (8000, 20), (1, 30_000), (24, 120)])
def test_classify__of_an_extremely_long_image_takes_no_more_than_four_crops(shape, slide):
    model = Pointwise(3, 5, 1)
    classify = PixelClassifier(model, Normalize([0.5] * 3, [0.2] * 3), nullcontext, (24, 24), slide=slide)
    with torch.inference_mode():
        classes = classify(torch.randint(256, (3, *shape)).byte())
    assert classes.shape == shape
    assert max(max(size) for size in model.sizes) <= (24 if slide else 4 * 24)
    assert len(model.sizes) <= (6 if slide else 1)


def test_classify__an_image_is_seen_with_the_shorter_side_of_a_window_as_its_shorter_side():
    model = Pointwise(3, 5, 1)
    classify = PixelClassifier(model, Normalize([0.5] * 3, [0.2] * 3), nullcontext, (24, 36))
    with torch.inference_mode():
        assert classify(torch.zeros(3, 48, 60).byte()).shape == (48, 60)
    assert model.sizes == [(24, 30)]


def test_classify__deep_images_are_what_bytes_are_but_for_rounding():
    torch.manual_seed(0)
    model = Pointwise(3, 5, 1)
    classify = PixelClassifier(model, Normalize([0.5] * 3, [0.2] * 3), nullcontext, (24, 24))
    image = torch.randint(256, (3, 40, 50)).byte()
    with torch.inference_mode():
        assert (classify(image) == classify(image.float())).float().mean() > 0.97


# -- whole sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def streets(tmp_path):
    """Three held-out images of two classes and ignored pixels, of different sizes."""
    for part, number in (("train", 0), ("val", 0), ("val", 1), ("val", 2)):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        labels = np.where(pixels[..., 0] > 200, 255, pixels[..., 1] // 128)
        for folder, picture in (("images", pixels), ("annotations", labels.astype(np.uint8))):
            (tmp_path / folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / folder / part / f"{number}.png")
    return open_segmentation(str(tmp_path), Wanted(3))[1]


def test_judge_segmentation__counts_all_pixels_but_the_ignored_ones_on_two_ranks_as_on_one(streets):
    torch.manual_seed(0)
    classify = PixelClassifier(Pointwise(3, 2, 1), Normalize([0.5] * 3, [0.2] * 3), nullcontext, (20, 20))
    table = torch.zeros(2, 2, dtype=torch.long)
    with torch.inference_mode():
        for index in range(3):
            image, labels = streets.read(index)
            known = labels != 255
            table += confusion(labels[known].numpy(), classify(image)[known].numpy(), 2)
        expected, rows = scores(table, streets.classes)
        assert rows[0]["iou"]
        for run in (lambda judge: judge(Ranks(torch.device("cpu"))), in_two):
            judged = run(lambda ranks: judge_segmentation(classify, streets, ranks))
            assert (judged.summary, judged.rows) == (expected | {"images": 3}, rows)
            assert [picture.number for picture in judged.shown] == [0, 1, 2]
            for picture in judged.shown:
                labels = streets.read(picture.number)[1]
                assert torch.equal(picture.truth, labels.where(labels != 255, 2))  # a colour beyond the classes'
