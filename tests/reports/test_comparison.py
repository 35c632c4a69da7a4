"""Runs side by side: what differs, what came of it, and losses only where they can be compared."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dmjd.errors import ConfigError
from dmjd.reports.comparison import write_comparison

SETTINGS = {
    "data": "photos",
    "out": "somewhere",
    "epochs": 4.0,
    "seed": 0,
    "workers": 3,
    "model": {"patch_size": 16, "embed_dim": 128},
    "masked": {"target": "hog", "loss": "l2"},
    "visible": {"weight": 1.0, "loss": "smooth_l1", "beta": 2.0},
    "hog": {"variant": "dmjd"},
}


class Tables(HTMLParser):
    """The cells of every table, row by row, and the titles of figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.inside: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = self.rows[-1]
        if tag == "h3":
            self.titles.append("")
            self.inside = self.titles

    def handle_endtag(self, tag: str) -> None:
        self.inside = None if tag in ("td", "th", "h3") else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.inside[-1] += data.strip()

    def row(self, title: str) -> list[str]:
        return next(cells for title_, *cells in self.rows if title_ == title)


def write_run(run: Path, *, knn: float = 0.5, finished: bool = True, **changes: object) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"out": str(run)} | changes))
    lines: list[dict] = [{"step": 0, "epoch": 0, "images": 0, "seconds": 0.1, "knn_top1": 0.25}]
    for step in range(1, 9):
        line = {"step": step, "epoch": step / 2, "images": step * 8, "seconds": step * 60.0}
        lines += [line | {"loss": 1 / step, "lr": 1e-3, "images_per_second": 12.0}]
    lines += [lines[-1] | {"knn_top1": knn}]
    del lines[-1]["loss"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"untrained": {"knn_top1": 0.25}, "trained": {"knn_top1": knn}, "seconds": 540.0, "images": 64}
        summary |= {"verdict": {"kind": "learned", "line": "a line", "advice": ""}, "environment": {"device": "abacus"}}
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def compared(folder: Path, runs: list[Path]) -> tuple[str, Tables]:
    text = write_comparison(runs, folder / "comparison.html").read_text("utf-8")
    return text, Tables(text)


def test_write_comparison__shows_settings_that_differ_and_no_others(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, workers=0, model={"embed_dim": 64})]
    _, tables = compared(tmp_path, runs)
    assert tables.row("seed") == ["0", "1"]
    assert tables.row("model.embed_dim") == ["128", "64"]
    assert tables.row("model.patch_size") == ["16", "\u2013"]
    assert not {"out", "workers", "epochs", "masked.target"} & {row[0] for row in tables.rows}


def test_write_comparison__shows_what_came_of_finished_and_unfinished_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", knn=0.5), write_run(tmp_path / "b", knn=0.75, finished=False)]
    text, tables = compared(tmp_path, runs)
    assert tables.row("k-NN top-1") == ["50.0%from 25.0%", "75.0%from 25.0%"]
    assert re.findall(r'class="best">([\d.]+)', text) == ["75.0"]
    assert tables.row("Time") == ["9\u00a0min", "8\u00a0min"]
    assert tables.row("Images seen") == ["64", "64"]
    assert tables.row("Device") == ["abacus", "\u2013"]
    assert "not finished, step 8" in text


def test_write_comparison__no_run_is_the_best_on_other_images(tmp_path: Path) -> None:
    text, _ = compared(tmp_path, [write_run(tmp_path / "a"), write_run(tmp_path / "b", knn=0.75, data="others")])
    assert 'class="best"' not in text


def test_write_comparison__draws_losses_together_only_where_they_have_a_common_scale(tmp_path: Path) -> None:
    alike = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)]
    text, tables = compared(tmp_path, alike)
    assert tables.titles[:2] == ["Loss", "Loss over time"]
    assert "a from 1 to 0.125; b from 1 to 0.125" in text
    other = write_run(tmp_path / "c", masked={"target": "pixels", "loss": "l2"})
    text, tables = compared(tmp_path, [*alike, other])
    assert tables.titles[:2] == ["Loss of a and b", "Loss of a and b over time"]
    assert "Losses can be compared only between runs" in text
    assert "No other run here can be compared with c." in text
    _, tables = compared(tmp_path, [alike[0], other])
    assert not any(title.startswith("Loss") for title in tables.titles)
    assert "k-NN top-1, percent" in tables.titles


def test_write_comparison__eight_runs_have_eight_lines(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{number}", seed=number) for number in range(8)]
    text, tables = compared(tmp_path, runs)
    assert tables.row("seed") == [*"01234567"]
    loss = text[text.index("<h3>Loss<") :].partition("</svg>")[0]
    assert set(re.findall(r"var\(--(hue\d)\)", loss)) == {f"hue{number}" for number in range(8)}
    assert all(f"--hue{number}:" in text for number in range(8))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    with pytest.raises(ConfigError, match=r"9 runs; a page has 8 at most; leave some out"):
        write_comparison([*runs, write_run(tmp_path / "ninth")], tmp_path / "page.html")


def test_write_comparison__runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / one / "run") for one in "ab"]
    text, _ = compared(tmp_path, runs)
    assert all(f"<strong>{run}</strong>" in text for run in runs)
    with pytest.raises(ConfigError, match="a run is given twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "page.html")


def test_write_comparison__needs_no_other_file_and_escapes_what_it_shows(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "<b>x"), write_run(tmp_path / "b", data="<script>alert(1)</script>")]
    text, _ = compared(tmp_path, runs)
    assert "<script" not in text
    assert "<b>x" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\((?!#)|\ssrc=", text)


def test_write_comparison__names_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        write_comparison([write_run(tmp_path / "a"), tmp_path / "nowhere"], tmp_path / "page.html")
