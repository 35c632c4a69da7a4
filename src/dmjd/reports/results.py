"""The files of every evaluation with labels: result.json, per_class.csv and report.html."""

import csv
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmjd.data.cells import plain_cell
from dmjd.engine.checkpoint import write_atomically
from dmjd.engine.run import read_metrics
from dmjd.reports.curves import draw_curves
from dmjd.reports.page import write_page


def write_results(
    out: Path,
    *,
    verb: str,
    settings: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    template: str,
    page: Mapping[str, Any],
) -> None:
    """Write result.json, per_class.csv and report.html, and print on stderr where to look and how to go on.

    Args:
        out: Directory of the results, created if needed; the curves come from its metrics.jsonl.
        verb: Name of the verb.
        settings: Settings as YAML, for the end of the page.
        summary: The numbers.
        rows: The table by class, at least one row.
        template: Template of the page.
        page: Further values for the template.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({key: plain_cell(cell) if isinstance(cell, str) else cell for key, cell in row.items()})
    write_atomically(out / "per_class.csv", table.getvalue())
    write_atomically(out / "result.json", json.dumps(summary, indent=1))
    common = {
        "name": out.resolve().name,
        "verb": verb,
        "summary": summary,
        "rows": rows,
        "curves": draw_curves(read_metrics(out / "metrics.jsonl")),
        "settings": settings,
    }
    write_page(out / "report.html", template, {**common, **page})
    said = f"look at {out / 'report.html'}"
    for network in (out / "best.safetensors", out / "linear.safetensors"):
        if network.is_file():
            command = ["dmjd", "predict", "--backbone", str(network), "--data", "IMAGES", "--out", "predicted"]
            said += f"; then: {shlex.join(command)}"
    print(said, file=sys.stderr)
