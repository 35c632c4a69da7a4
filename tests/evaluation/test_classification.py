"""The numbers and the table that every classification ends with."""

import torch
from torch import Tensor

from dmjd.evaluation.classification import ClassificationResult

CLASSES = ("ant", "bee", "<i>cat</i> & co", "dog", "elk", "fox", "gnu")


def ranked(*order: int) -> Tensor:
    """Scores of one image, whose classes come in this order; those not named follow."""
    rest = [number for number in range(len(CLASSES)) if number not in order]
    scores = torch.empty(len(CLASSES))
    scores[[*order, *rest]] = torch.arange(len(CLASSES), 0, -1).float()
    return scores


def by_hand() -> ClassificationResult:
    """Five images: ant, ant, ant taken for a bee, bee, and a cat taken for an ant with five others before the cat."""
    scores = [ranked(0), ranked(0, 1), ranked(1, 0), ranked(1), ranked(0, 1, 3, 4, 5, 2)]
    return ClassificationResult(torch.stack(scores), torch.tensor([0, 0, 0, 1, 2]), CLASSES)


def test_summary__has_the_numbers_worked_by_hand() -> None:
    # Wilson's interval of 3 in 5 for z = 1.96: (0.6 + z^2/10 +- z * sqrt(0.6 * 0.4 / 5 + z^2/100)) / (1 + z^2/5)
    #                                        = (0.98415 +- 0.57616) / 1.76829
    assert by_hand().summary() == {
        "top1": 0.6,
        "top1_low": 0.2307,
        "top1_high": 0.8824,
        "top5": 0.8,
        "mean_class_accuracy": 0.5556,  # (2/3 + 1 + 0) / 3; four classes have no images
        "images": 5,
    }


def test_summary__with_fewer_than_five_classes_any_is_among_the_first_five() -> None:
    summary = ClassificationResult(torch.eye(3), torch.tensor([1, 1, 2]), CLASSES[:3]).summary()
    assert (summary["top1"], summary["top5"]) == (0.6667, 1.0)


def test_summary__an_interval_stays_within_0_and_1() -> None:
    right = ClassificationResult(torch.eye(2), torch.tensor([0, 1]), CLASSES[:2]).summary()
    wrong = ClassificationResult(torch.eye(2), torch.tensor([1, 0]), CLASSES[:2]).summary()
    # 2 of 2: the lower end is 1 / (1 + z^2/2) = 0.3424; 0 of 2 is its mirror image.
    assert (right["top1_low"], right["top1_high"]) == (0.3424, 1.0)
    assert (wrong["top1_low"], wrong["top1_high"]) == (0.0, 0.6576)


def test_summary__of_equal_scores_the_first_class_wins_as_in_the_table() -> None:
    result = ClassificationResult(torch.ones(20, 7), torch.arange(20) % 7, CLASSES)  # a collapsed backbone's votes
    ant, *others = result.by_class()
    assert (ant["accuracy"], {each["accuracy"] for each in others}) == (1.0, {0.0})
    summary = result.summary()
    assert (summary["top1"], summary["top5"]) == (0.15, 0.75)  # 3 ants of 20; 15 up to the elks


def test_confusion__rows_are_true_classes() -> None:
    confusion = by_hand().confusion
    assert confusion.shape == (7, 7)
    assert confusion[:3, :3].tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert confusion.sum() == 5


def test_confusion__is_counted_once() -> None:
    result = by_hand()
    assert result.confusion is result.confusion


def test_by_class__counts_by_hand_and_is_empty_where_there_is_nothing_to_divide_by() -> None:
    ant, bee, cat, dog, *_ = by_hand().by_class()
    assert ant == {"class": "ant", "images": 3, "accuracy": 0.6667, "precision": 0.6667, "taken_for": "bee"}
    assert bee == {"class": "bee", "images": 1, "accuracy": 1.0, "precision": 0.5, "taken_for": ""}
    assert cat == {"class": CLASSES[2], "images": 1, "accuracy": 0.0, "precision": "", "taken_for": "ant"}
    assert dog == {"class": "dog", "images": 0, "accuracy": "", "precision": "", "taken_for": ""}
