"""The page of a pre-training run: what was trained, how good it is, what it predicts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dmjd.errors import ConfigError
from dmjd.reports.curves import Line, draw_curves, read_metrics, series
from dmjd.reports.page import write_page
from dmjd.reports.token_pictures import read_samples

MEASURES = {
    "knn_top1": "k-NN top-1",
    "linear_top1": "Linear probe top-1",
    "rankme": "RankMe",
    "feature_std": "Standard deviation of features",
}


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what a run directory holds; parts whose files are missing are left out.

    Args:
        run: Directory written by `dmjd pretrain`: `config.yaml`, `metrics.jsonl`, and, as far as the run got,
            `summary.json` and `samples.safetensors`.

    Raises:
        ConfigError: If `run` holds neither settings nor metrics, or is a run of another verb.
        CheckpointError: If `samples.safetensors` is broken.
    """
    config, summary, samples = (run / name for name in ("config.yaml", "summary.json", "samples.safetensors"))
    if (run / "result.json").is_file():
        raise ConfigError(f"not a pre-training run; {run}; its page is report.html, written by the verb")
    lines = read_metrics(run / "metrics.jsonl")
    if not lines and not config.is_file():
        raise ConfigError(f"not a run directory; {run}; give the directory that `dmjd pretrain --out` wrote")
    facts: Line = json.loads(summary.read_text("utf-8")) if summary.is_file() else {}
    settings: Line = yaml.safe_load(config.read_text("utf-8")) or {} if config.is_file() else {}
    training = [line for line in lines if "loss" in line]
    now = (training[-1] if training else {}) | facts
    steps, losses = series(training, "loss")
    page: Line = {
        "name": run.resolve().name,
        "finished": summary.is_file(),
        "now": {key: value for key in now if (value := number(now, key)) is not None},
        "data": str(facts.get("data") or settings.get("data") or ""),
        "labels": bool(facts.get("labels", True)),
        "command": str(facts.get("command") or ""),
        "run": run,
        "settings": config.read_text("utf-8") if config.is_file() else "",
        "broken": [int(step) for step in steps[~np.isfinite(losses)]],
        "numbers": key_numbers(facts, lines),
        "curves": draw_curves(lines),
        "samples": [],
    }
    if samples.is_file():
        page |= read_samples(samples)
    path = run / "report.html"
    write_page(path, "pretrain.html", page)
    return path


def key_numbers(facts: Line, lines: Sequence[Line]) -> list[Line]:
    """Make a row for each measure that is known: untrained, trained and difference, as text.

    Without a summary, the evaluation at step 0 counts as untrained and the latest one as trained.
    """
    first = {key: value for line in lines if line["step"] == 0 for key, value in line.items()}
    latest = {key: value for line in lines if line["step"] > 0 for key, value in line.items()}
    rows = []
    for key, name in MEASURES.items():
        before, after = number(facts.get("untrained") or first, key), number(facts.get("trained") or latest, key)
        if before is None and after is None:
            continue
        scale, unit, points = (1, "", "") if key == "rankme" else (100, "%", "\u00a0points")
        untrained, trained = ("\u2013" if value is None else f"{value * scale:.1f}{unit}" for value in (before, after))
        gain = math.nan if before is None or after is None else round((after - before) * scale, 1)
        sign = "+" if gain > 0 else "\u2212" if gain < 0 else "\u00b1"
        difference = "\u2013" if math.isnan(gain) else f"{sign}{abs(gain):.1f}{points}"
        row = {"key": key, "name": name, "untrained": untrained, "trained": trained, "difference": difference}
        rows.append(row | {"gain": gain, "known": after is not None})
    return rows


def number(values: Mapping[str, Any], key: str) -> float | None:
    """Look up a finite number; None where it is missing or not finite."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
