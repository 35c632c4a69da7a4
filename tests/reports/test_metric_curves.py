"""Curves of what a run has logged."""

import numpy as np

from dmjd.reports.curves import curve, draw_curves, smoothed, thinned


def test_thinned__keeps_the_spike_and_the_ends() -> None:
    values = np.zeros(10_000)
    values[4321] = 1
    kept = thinned(values)
    assert {0, 4321, 9999} <= set(kept.tolist())
    assert len(kept) <= 502


def test_smoothed__a_constant_stays_itself() -> None:
    np.testing.assert_allclose(smoothed(np.full(50, 3.0), 7), 3.0)


def test_draw_curves__shows_what_was_logged_and_shares_in_percent() -> None:
    lines = [{"step": step, "epoch": step / 2, "loss": 1.0 / step, "loss_visible": 0.5} for step in range(1, 5)]
    lines += [{"step": 4, "epoch": 2.0, "top1": 0.25}, {"step": 8, "epoch": 4.0, "top1": 0.75, "feature_std": 0.31}]
    figures = draw_curves(lines)
    assert [figure["title"] for figure in figures] == [
        "Loss",
        "Top-1, percent",
        "Standard deviation of features, percent",
    ]
    assert "Loss over steps: total from 1 to 0.25; visible tokens from 0.5 to 0.5" in figures[0]["svg"]
    assert "Top-1, percent over epochs: top-1 from 25 to 75" in figures[1]["svg"]
    assert "standard deviation from 31 to 31" in figures[2]["svg"]
    assert "var(--hue0)" in figures[0]["svg"]


def test_curve__is_none_where_nothing_was_logged_and_says_where_nothing_is_finite() -> None:
    assert curve("Loss", {"total": "loss"}, [{"step": 1, "rankme": 2.0}]) is None
    figure = curve("Loss", {"total": "loss"}, [{"step": 1, "loss": None}])
    assert figure is not None
    assert "total never finite" in figure["svg"]
    assert "no finite value" in figure["svg"]
