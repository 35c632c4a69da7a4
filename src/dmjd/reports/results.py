"""What every judgement by labels leaves behind: result.json, per_class.csv, report.html and one line of JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dmjd.config import to_dict
from dmjd.engine.checkpoint import write_atomically
from dmjd.reports.page import CURVES, curve, read_metrics, render


def write_results(
    settings: Any, out: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], template: str, **page: Any
) -> None:
    """Write result.json, per_class.csv and report.html.

    Args:
        settings: Of the verb; they stand at the end of the page.
        out: Directory of the results; the curves come from its metrics.jsonl.
        summary: The numbers.
        rows: The table by class.
        template: Of the page.
        page: What else the template shows.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "per_class.csv", table.getvalue())
    write_atomically(out / "result.json", json.dumps(summary, indent=1))
    lines = read_metrics(out / "metrics.jsonl")
    page = {
        "name": out.resolve().name,
        "verb": type(settings).__name__.lower(),
        "summary": summary,
        "rows": rows,
        "curves": [figure for title, keys in CURVES.items() if (figure := curve(title, keys, lines))],
        "settings": yaml.safe_dump(to_dict(settings), sort_keys=False),
        **page,
    }
    write_atomically(out / "report.html", render(template, page))
