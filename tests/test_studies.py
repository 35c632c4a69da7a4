"""The program of the studies: what a run gets, which runs are missing, and a toy study from images to its tables."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study as studies
import study_tables

from dmjd.cli import application, layers_of
from dmjd.config.pretrain import PretrainSettings

TOY = {
    "question": "Does it run?",
    "data": {"classes": 2, "train": 8, "tune": 4},
    "rows": 8,
    "rates": {"values": [1e-3], "budget": 1},
    "judges": ["knn", "linear"],
    "finetune": {},
    "common": {
        "preset": "dm",
        "model": {"size": "tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "image_size": 16, "patch_size": 4},
        "masking": {"num_views": 1, "mask_ratio": 0.5, "predict_ratio": 0.5, "block": 1},
        "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
        "monitor": {"max_images": 8, "evals": 0, "saves": 0},
    },
    "arms": {"untrained": {}, "two": {"masking": {"num_views": 2, "predict_ratio": 1.0}}},
    "runs": [{"cells": ["untrained@0", "two@1"], "seeds": 2}],
    "contrasts": [{"of": "two@1", "against": "untrained@0", "says": "training"}],
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY))
    return path


def put(study: studies.Study, job: studies.Job, linear: float) -> None:
    """Write a result as if a job had run."""
    path = study.folder / f"{job.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rate": job.rate, "measures": {"linear": {"top1": linear}}}))


def parsed(settings: dict[str, Any], folder: Path) -> PretrainSettings:
    """Read the settings of a run as `dmjd pretrain --config` does."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = ["pretrain", "--data", "d", "--config", str(config)]
    _, bound, _ = application(layers_of(words)).parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["settings"]


def test_settings__give_every_arm_the_same_rows_and_the_rate_that_was_searched(toy: Path, tmp_path: Path) -> None:
    study = studies.Study(toy)
    for arm in TOY["arms"]:
        settings = parsed(study.settings(studies.Job(arm, 4, 0, 3e-3, False)), tmp_path)
        assert settings.lr == pytest.approx(3e-3)
        assert settings.run.batch_size * settings.masking.num_views == TOY["rows"]
        assert settings.run.steps == 4 * 16 / 8


def test_rate_jobs__go_on_past_an_edge_that_wins_until_both_neighbours_are_there(toy: Path) -> None:
    toy.write_text(yaml.safe_dump(TOY | {"rates": {"values": [5e-4, 1e-3, 2e-3], "budget": 1}}))
    study = studies.Study(toy)
    accuracy = {5e-4: 0.1, 1e-3: 0.2, 2e-3: 0.3, 4e-3: 0.5, 8e-3: 0.4}
    tried = []
    while not study.rate("two"):
        for job in [job for job in study.rate_jobs("two") if not study.result(job)]:
            put(study, job, accuracy[job.rate])
            tried.append(job.rate)
    assert study.rate("two") == 4e-3
    assert tried == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def test_missing__is_the_search_first_and_then_what_counts_without_what_is_there(toy: Path) -> None:
    toy.write_text(yaml.safe_dump(TOY | {"rates": {"values": [1e-3, 2e-3, 4e-3], "budget": 1}}))
    study = studies.Study(toy)
    assert [job.name for job in study.missing()] == [
        "untrained@0-0",
        *(f"rates/two@1-{rate}" for rate in ("0.001", "0.002", "0.004")),
        "untrained@0-1",
    ]
    for job, linear in zip(study.rate_jobs("two"), (0.1, 0.3, 0.2), strict=True):
        put(study, job, linear)
    put(study, studies.Job("untrained", 0, 1, 0.0, False), 0.1)
    assert [(job.name, job.rate) for job in study.missing()] == [
        ("untrained@0-0", 0.0),
        ("two@1-0", 2e-3),
        ("two@1-1", 2e-3),
    ]


def test_verdict__of_an_interval_and_a_margin() -> None:
    assert study_tables.verdict_of(0.1, 2.0, 1.0) == "better"
    assert study_tables.verdict_of(-0.9, 0.5, 1.0) == "as good"
    assert study_tables.verdict_of(-1.1, 0.5, 1.0) == "no difference shown"
    assert study_tables.verdict_of(-0.9, 0.5, None) == "no difference shown"
    assert study_tables.verdict_of(-0.9, -0.1, 1.0) == "worse, within the margin"
    assert study_tables.verdict_of(-3.0, -1.1, 1.0) == "worse"
    low, high = study_tables.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)  # t of 2 degrees: 4.303


@pytest.mark.long
def test_studies__of_the_project_name_arms_that_they_describe_and_dmjd_takes(tmp_path: Path) -> None:
    for path in sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")):
        study = studies.Study(path)
        cells = {f"{arm}@{budget:g}" for arm, budget, _ in study.cells()}
        named = {each[side] for each in study.asked.get("contrasts", ()) for side in ("of", "against")}
        assert set(study.arms) == set(study.asked["arms"]), path
        assert named <= cells, path
        for arm in study.arms:
            assert parsed(study.settings(studies.Job(arm, 1, 0, 1e-3, False)), tmp_path).lr == pytest.approx(1e-3)


def test_times__count_smaller_crops_as_less_work(toy: Path, tmp_path: Path) -> None:
    for number in range(16):
        path = tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)
    growing = {"two": TOY["arms"]["two"], "growing": TOY["arms"]["two"] | {"crop": {"progressive": [0.5]}}}
    toy.write_text(yaml.safe_dump(TOY | {"arms": growing, "runs": [{"cells": ["two@1", "growing@1"], "seeds": 1}]}))
    threads = torch.get_num_threads()
    study = studies.Study(toy)
    studies.measure_times(study, tmp_path / "images", "cpu")
    torch.set_num_threads(threads)
    arms = json.loads((study.folder / "times.json").read_text())["arms"]
    assert arms["growing"]["mflop_per_row"] / arms["two"]["mflop_per_row"] == pytest.approx((1 + 1 / 4) / 2, rel=0.1)


@pytest.mark.slow
def test_toy_study__runs_from_images_to_tables_and_does_not_run_twice(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for value, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(100, size=(16, 16, 3), dtype=np.uint8) + np.uint8(150 * value)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    toy.write_text(yaml.safe_dump(TOY | {"runs": [{"cells": ["two@1"], "seeds": 1}]}))
    site = tmp_path / "work" / "site"  # the copy of the program: here the one that is tested
    site.mkdir(parents=True)
    (site / "commit").write_text("0" * 40)
    study = studies.Study(toy)
    machine = studies.Machine(study, tmp_path / "images", tmp_path / "work", "cpu", until=time.monotonic() + 3600)
    machine.prepare()
    monkeypatch.setattr(studies.signal, "signal", lambda *_: None)
    machine.work_off(1)
    assert study.missing() == []
    result = study.result(studies.Job("two", 1, 0, 1e-3, False))
    assert result
    assert result["steps"] == 2
    assert result["rows"] == 16
    assert result["images"] == 8
    assert result["measures"]["linear"]["top1"] == 1.0  # dark and light
    assert result["measures"]["linear"]["images"] == 8
    studies.measure_times(study, tmp_path / "images", "cpu")
    study_tables.write(study)
    page = study.folder.with_suffix(".md").read_text()
    assert "| two | 1 | 1 | 0.001 | 2 | 8 |" in page
    assert "nothing" in capsys.readouterr().out
    machine.dmjd = None  # type: ignore[assignment]
    machine.work_off(1)


@pytest.mark.slow
def test_study__says_which_run_failed_and_where_its_log_is(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "site").mkdir(parents=True)
    (tmp_path / "work" / "site" / "commit").write_text("")
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
    words = ["run", toy, "--data", tmp_path / "images", "--work", tmp_path / "work"]
    command = [sys.executable, ROOT / "benchmarks" / "study.py", *words]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "exit 3: pretrain" in done.stderr
    assert "log.txt" in done.stderr
