"""The page of a pre-training run: what was trained, how good its features are, what it predicts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from dmjd.citation import CITATION
from dmjd.engine.run import read_facts, read_metrics
from dmjd.errors import CheckpointError, ConfigError
from dmjd.reports.curves import Line, draw_curves, series
from dmjd.reports.nearest_pictures import read_nearest
from dmjd.reports.page import write_page
from dmjd.reports.token_pictures import read_samples

DASH = "\u2013"  # in place of a missing value
MEASURES = {
    "explained": "Hidden tokens explained",
    "explained_visible": "Visible tokens explained",
    "knn_top1": "k-NN top-1",
    "linear_top1": "Linear probe top-1",
    "rankme": "RankMe",
    "feature_std": "Standard deviation of features",
}


class RunRecord(NamedTuple):
    """The records of a run directory; missing ones are empty.

    Attributes:
        name: Name of the directory.
        lines: Lines of metrics.jsonl.
        facts: Content of summary.json, which exists once the run has finished.
        settings: Content of config.yaml.
    """

    name: str
    lines: list[Line]
    facts: Line
    settings: Line

    @property
    def now(self) -> dict[str, float]:
        """Numbers of the whole run, or of its last logged step."""
        training = [line for line in self.lines if "loss" in line]
        found = (training[-1] if training else {}) | self.facts
        return {key: value for key in found if (value := number(found, key)) is not None}

    def measured(self, key: str) -> tuple[float | None, float | None]:
        """Look up a measure untrained and trained; for an unfinished run, at step 0 and at its last evaluation."""
        first = next((line for line in self.lines if line["step"] == 0 and key in line), {})
        latest = next((line for line in reversed(self.lines) if line["step"] > 0 and key in line), {})
        return number(self.facts.get("untrained") or first, key), number(self.facts.get("trained") or latest, key)


def read_run(run: Path) -> RunRecord:
    """Read the records of a run from a directory of `dmjd pretrain`.

    Raises:
        ConfigError: If it holds neither settings nor metrics, or is a run of another verb.
        CheckpointError: If its settings are broken.
    """
    config = run / "config.yaml"
    lines = read_metrics(run / "metrics.jsonl")
    if not lines and not config.is_file():
        raise ConfigError(f"not a run directory; {run}; give the directory that `dmjd pretrain --out` wrote")
    settings: Any = {}
    if config.is_file():
        try:
            settings = yaml.safe_load(config.read_text("utf-8")) or {}
        except (ValueError, yaml.YAMLError):
            settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"no settings; {config}; restore the file")
    if (run / "result.json").is_file() or "backbone" in settings:
        stands = (
            "stands as the verb wrote it" if (run / "report.html").is_file() else "is written by the verb at its end"
        )
        raise ConfigError(f"not a pre-training run; {run}; its page report.html {stands}")
    return RunRecord(run.resolve().name, lines, read_facts(run / "summary.json"), settings)


def write_report(run: Path, path: Path | None = None) -> Path:
    """Write the page of a run from the files in its directory; sections whose files are missing are left out.

    Args:
        run: Directory written by `dmjd pretrain`: `config.yaml`, `metrics.jsonl`, and, as far as the run got,
            `summary.json`, `samples.safetensors` and `neighbours.safetensors`.
        path: File to write; `run/report.html` if None.

    Raises:
        ConfigError: If `run` holds neither settings nor metrics, or is a run of another verb.
        CheckpointError: If the settings or a file of pictures are broken.
    """
    config, samples, neighbours = (
        run / name for name in ("config.yaml", "samples.safetensors", "neighbours.safetensors")
    )
    record = read_run(run)
    lines, facts, settings = record.lines, record.facts, record.settings
    steps, losses = series([line for line in lines if "loss" in line], "loss")
    page: Line = {
        "name": record.name,
        "finished": bool(facts),
        "now": record.now,
        "data": str(facts.get("data") or settings.get("data") or ""),
        "pages": settings.get("data_pages"),
        "labels": bool(facts.get("labels", True)),
        "command": str(facts.get("command") or ""),
        "run": run,
        "init": settings.get("init"),
        "settings": config.read_text("utf-8") if config.is_file() else "",
        "verdict": facts.get("verdict") or {},
        "broken": [int(step) for step in steps[~np.isfinite(losses)]],
        "numbers": key_numbers(record),
        "curves": draw_curves(lines),
        "environment": facts.get("environment") or {},
        "citation": CITATION,
        "longer": longer(settings),
        "samples": [],
    }
    if samples.is_file():
        page |= read_samples(samples)
    if neighbours.is_file():
        page |= read_nearest(neighbours)
    path = path or run / "report.html"
    write_page(path, "pretrain.html", page)
    return path


def key_numbers(record: RunRecord) -> list[Line]:
    """Make a row for each known measure: untrained, trained and difference, as text."""
    rows = []
    for key, name in MEASURES.items():
        before, after = record.measured(key)
        if before is None and after is None:
            continue
        scale, points = (1, "") if key == "rankme" else (100, "\u00a0points")
        gain = math.nan if before is None or after is None else round((after - before) * scale, 1)
        sign = "+" if gain > 0 else "\u2212" if gain < 0 else "\u00b1"
        difference = DASH if math.isnan(gain) else f"{sign}{abs(gain):.1f}{points}"
        untrained, trained = text(key, before), text(key, after)
        row = {"key": key, "name": name, "untrained": untrained, "trained": trained, "difference": difference}
        rows.append(row | {"gain": gain, "known": after is not None})
    return rows


def text(key: str, value: float | None) -> str:
    """Format a measure for display."""
    if value is None:
        return DASH
    return (f"{value:.1f}" if key == "rankme" else f"{value:.1%}").replace("-", "\u2212")


def longer(settings: Mapping[str, Any]) -> str:
    """Write the flag that makes a run twice as long."""
    steps, epochs = number(settings, "steps"), number(settings, "epochs")
    return f"--steps {2 * steps:.0f}" if steps else f"--epochs {2 * epochs:g}" if epochs else "--epochs MORE"


def number(values: Mapping[str, Any], key: str) -> float | None:
    """Look up a finite number; None if it is missing or not finite."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
