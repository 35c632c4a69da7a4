"""The verdict on a run, and what it rests on."""

import pytest
import torch

from dmjd.evaluation.rank import Explained
from dmjd.evaluation.verdict import judge

UNTRAINED = {"explained": -1.0, "explained_train": -1.0, "feature_std": 0.6, "rankme": 12.0}
GOOD = {"explained": 0.36, "explained_train": 0.38, "feature_std": 0.34, "rankme": 13.0}


def share(predicted, target, batches=1):
    found = Explained()
    for part in zip(predicted.chunk(batches), target.chunk(batches), strict=True):
        found.add(*part)
    return found.share


def test_explained__of_exact_predictions_is_one_of_the_mean_target_zero_and_of_worse_ones_below():
    target = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    mean = target.mean(dim=(0, 1)).expand_as(target)
    assert share(target, target) == 1
    assert share(mean, target) == pytest.approx(0, abs=1e-6)
    assert share(mean + 10, target) < -10
    assert share((target + mean) / 2, target) == pytest.approx(0.75, abs=1e-6)


def test_explained__does_not_depend_on_batches():
    predicted, target = (torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert share(predicted, target, 3) == pytest.approx(share(predicted, target), abs=1e-9)


def test_explained__of_constant_targets_is_zero():
    assert share(torch.full((3, 2, 4), 0.7), torch.full((3, 2, 4), 0.7)) == 0


def test_judge__a_single_image_is_not_said_to_be_like_all_others():
    alone = {key: value for key, value in GOOD.items() if key.startswith("explained")}
    assert judge({**alone, "explained": -1.0}, alone).kind == "learned"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "learned"),
        ({"knn_top1": 0.5, "linear_top1": 0.6}, "learned"),
        ({"rankme": 7.0}, "learned"),
        ({"rankme": 5.0}, "collapsed"),
        ({"feature_std": 0.01}, "collapsed"),
        ({"explained": 0.02, "explained_train": 0.03}, "too little"),
        ({"explained": -0.1, "explained_train": -0.1}, "too little"),
        ({"explained": -0.3, "explained_train": -0.04}, "too little"),
        ({"explained": -0.003, "explained_train": -0.003}, "nothing"),
        ({"explained": -1.2, "explained_train": -1.1}, "nothing"),
        ({"explained": 0.007, "explained_train": 0.016, "explained_visible": 0.01}, "nothing"),
        ({"explained": 0.007, "explained_train": 0.016, "explained_visible": 0.36}, "too little"),
        ({"explained": 0.007, "explained_train": 0.016, "explained_visible": 0.36, "rankme": 5.0}, "collapsed"),
        ({"explained": 0.1, "explained_train": 0.8}, "overfitted"),
        ({"knn_top1": 0.2, "linear_top1": 0.3}, "too little"),
        ({"knn_top1": 0.2, "linear_top1": 0.6}, "learned"),
    ],
)
def test_judge__names_what_became_of_a_run(changes, kind):
    untrained = UNTRAINED | ({"knn_top1": 0.3, "linear_top1": 0.4} if "knn_top1" in changes else {})
    verdict = judge(untrained, GOOD | changes)
    assert verdict.kind == kind
    assert bool(verdict.advice) == (kind != "learned")


@pytest.mark.parametrize(
    ("num_images", "looks", "words"),
    [
        (5000, 400.0, []),
        (5000, 18.0, ["seen 18 times"]),
        (300, 400.0, ["more than 300 images"]),
        (300, 18.0, ["seen 18 times", "more than 300 images"]),
    ],
)
def test_verdict__of_a_good_run_says_what_few_looks_or_few_images_leave_undone(num_images, looks, words):
    verdict = judge(UNTRAINED, GOOD).knowing(num_images, looks, longer="--epochs")
    assert verdict.kind == "learned"
    assert all(each in verdict.advice for each in words)
    assert bool(verdict.advice) == bool(words)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "predictions explain 36% of the variance of hidden tokens (held-out images)"),
        (
            {"explained": -1.35, "explained_train": -1.35},
            "predictions of hidden tokens are worse than the mean target (held-out images)",
        ),
        (
            {"explained": -0.2, "explained_train": 0.8},
            "predictions of hidden tokens are worse than the mean target (held-out images), "
            "but on training images they explain 80%",
        ),
    ],
)
def test_verdict__says_what_predictions_explain_or_that_the_mean_target_is_better(changes, line):
    assert judge(UNTRAINED, GOOD | changes).line == line


def test_judge__names_the_flag_that_makes_the_run_longer():
    assert (
        judge(UNTRAINED, GOOD | {"explained": 0.02, "explained_train": 0.03}, longer="--steps").advice == "more --steps"
    )


def test_verdict__of_a_bad_run_is_about_what_went_wrong():
    verdict = judge(UNTRAINED, GOOD | {"rankme": 5.0})
    assert verdict.knowing(300, 50.0, longer="--epochs") == verdict


def test_verdict__of_a_run_that_was_short_does_not_blame_the_learning_rate_first():
    verdict = judge(UNTRAINED, GOOD | {"rankme": 5.0}).knowing(5000, 5.0, longer="--minutes")
    assert verdict.kind == "collapsed"
    assert verdict.advice.startswith("more --minutes first: each image was seen 5 times")
    assert "--optim.blr" in verdict.advice
