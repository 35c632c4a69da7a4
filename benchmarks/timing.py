"""Timing of two sides in turns, in wall-clock and CPU seconds, and the file and the table of results."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dmjd.method import Losses

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "bench"
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of the losses of two sides


class Seconds(NamedTuple):
    """Wall-clock and CPU seconds of some work; the latter do not depend on what else ran."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Seconds:
    """Time some work of this process."""
    began = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - began[0], time.process_time() - began[1])


def alternate(
    first: Callable[[], Seconds], second: Callable[[], Seconds], pairs: int, *, warm_up: int = 1
) -> list[tuple[Seconds, Seconds]]:
    """Time two sides in turns, alternating which is first; pairs of the warm-up do not count."""
    found = []
    for turn in range(pairs + warm_up):
        if turn % 2:
            seconds = second()
            pair = first(), seconds
        else:
            pair = first(), second()
        found.append(pair)
    return found[warm_up:]


def agree(ours: Losses, others: Losses, precision: str) -> None:
    """Refuse to time two sides that compute different losses."""
    for name, *pair in zip(Losses._fields, ours, others, strict=True):
        one, other = (loss.item() for loss in pair)
        if abs(one - other) > TOLERANCES[precision] * abs(one):
            raise SystemExit(f"error: the sides disagree; {name} loss {one:g} and {other:g}; not timed")


def spread(values: Iterable[float]) -> list[float]:
    """Median, least and most."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[0], ordered[-1]]


def summary(pairs: Sequence[tuple[Seconds, Seconds]]) -> dict[str, Any]:
    """Summarise pairs: seconds of both sides, and the ratio of the second to the first."""
    return {
        kind: {
            "seconds": [spread(pair[side][place] for pair in pairs) for side in (0, 1)],
            "ratio": spread(pair[1][place] / pair[0][place] for pair in pairs),
        }
        for place, kind in enumerate(Seconds._fields)
    }


def written(values: Sequence[float], digits: int = 2) -> str:
    """Write a median and its spread."""
    median, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{median} ({low} .. {high})"


def cells_of(pairs: Sequence[tuple[Seconds, Seconds]], sides: tuple[str, str]) -> dict[str, str]:
    """Format pairs as the cells of a row."""
    found = summary(pairs)
    cells = {}
    for place, side in enumerate(sides):
        wall, cpu = (found[kind]["seconds"][place][0] for kind in Seconds._fields)
        cells[f"{side}, s"] = f"{wall:.3g}"
        cells[f"{side}, CPU s"] = f"{cpu:.3g}"
    cells["ratio"] = written(found["wall"]["ratio"])
    cells["ratio of CPU s"] = written(found["cpu"]["ratio"])
    return cells


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the load during a measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    git = ["git", "-C", str(ROOT)]
    commit, changed = (
        subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "src", "benchmarks"))
    )
    return {
        "processor": names.get("model name", platform.processor()),
        "model": " ".join(names.get(key, "") for key in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "timm", "transformers")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit + ("+" if changed else ""),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def store(name: str, row: str, content: dict[str, Any], out: Path) -> None:
    """Store a row of a race in OUT/NAME.json, and rewrite and print its table, OUT/NAME.md.

    Args:
        name: Of the race.
        row: Of what is new; a row of the same name is replaced.
        content: Settings, figures, and `cells`: text by column.
        out: Folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[row] = content | {"machine": machine()}
    path.write_text(json.dumps(rows, indent=1) + "\n")
    columns = list(dict.fromkeys(column for each in rows.values() for column in each["cells"]))
    table = [f"| {' | '.join(['', *columns])} |", "|" + "---|" * (1 + len(columns))]
    for each, found in rows.items():
        table.append(f"| {' | '.join([each, *(found['cells'].get(column, '') for column in columns)])} |")
    text = "\n".join(table) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text, flush=True)
