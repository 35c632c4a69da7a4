"""The program of the studies: what a run gets, which runs are missing, and a toy study from images to its tables."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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

from dmjd.cli import settings_of
from dmjd.masking import mask_counts
from dmjd.planning.work import count
from dmjd.tasks.plan import parts_of

PROJECT = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
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
    measures = {"linear": {"top1": linear}, "knn": {"top1": linear, "rankme": 1.0}}
    result = {"settings": study.settings(job), "measures": measures, "spent": {}, "device": "toy"}
    path.write_text(json.dumps({"study": study.name} | vars(job) | result | {"steps": 2, "images": 8, "rows": 16}))


def put_times(study: studies.Study, rounds: dict[str, list[float]]) -> None:
    """Write times as if arms had been timed as they are."""
    arms = {
        arm: {"ms_per_row": values, "mflop_per_row": 1.0, "settings": study.timed(arm)}
        for arm, values in rounds.items()
    }
    study.folder.mkdir(parents=True, exist_ok=True)
    (study.folder / "times.json").write_text(json.dumps({"arms": arms}))


def write_images(folder: Path, parts: dict[str, int]) -> Path:
    """Write so many images of noise for each part and class, one class dark, the other light."""
    generator = np.random.default_rng(0)
    for part, number_each in parts.items():
        for value, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for number in range(number_each):
                pixels = generator.integers(100, size=(16, 16, 3), dtype=np.uint8) + np.uint8(150 * value)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def machine_of(study: studies.Study, folder: Path) -> studies.Machine:
    """Make ready what runs a study on its images with the program that is tested, not a copy of it."""
    (folder / "work" / "site").mkdir(parents=True, exist_ok=True)
    (folder / "work" / "site" / "commit").write_text("0" * 40)
    machine = studies.Machine(study, folder / "images", folder / "work", "cpu")
    machine.prepare()
    return machine


def parsed(settings: dict[str, Any], folder: Path, verb: str = "pretrain") -> Any:
    """Read the settings of a run as a verb does by --config."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    return settings_of(verb, data="d", config=str(config))


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


def test_rate_jobs__of_an_arm_may_have_a_budget_of_their_own_which_the_table_names(toy: Path) -> None:
    rates = {"values": [1e-3, 2e-3, 4e-3], "budget": 1, "budgets": {"two": 2}}
    toy.write_text(yaml.safe_dump(TOY | {"rates": rates}))
    study = studies.Study(toy)
    for job in study.rate_jobs("two"):
        assert job.budget == 2
        put(study, job, 0.5 - abs(job.rate - 2e-3))
    assert study.rate("two") == 2e-3
    assert "| two, at 2 | 0.001: 49.9" in study_tables.table_of_rates(study)


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
    assert study_tables.verdict_of(-3.0, -0.5, 1.0) == "worse"
    low, high = study_tables.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)  # t of 2 degrees: 4.303


def test_result__of_another_rate_or_other_settings_stops_with_a_line_that_names_it(toy: Path) -> None:
    study = studies.Study(toy)
    job = studies.Job("two", 1, 0, 1e-3, False)
    put(study, job, 0.5)
    path = study.folder / "two@1-0.json"
    assert study.result(job)
    with pytest.raises(SystemExit, match=f"differs in optim, rate; {path};"):
        study.result(studies.Job("two", 1, 0, 2e-3, False))
    toy.write_text(yaml.safe_dump(TOY | {"arms": TOY["arms"] | {"two": {"masking": {"num_views": 2}}}}))
    for act in (studies.Study.missing, study_tables.write):
        with pytest.raises(SystemExit, match=f"differs in masking, optim; {path};"):
            act(studies.Study(toy))


def test_study__like_another_takes_what_that_one_has_of_the_same_settings_and_only_that(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"values": [1e-3, 2e-3, 4e-3], "budget": 1}
    toy.write_text(yaml.safe_dump(TOY | {"rates": rates}))
    first = studies.Study(toy)
    for job, linear in zip(first.rate_jobs("two"), (0.1, 0.3, 0.2), strict=True):
        put(first, job, linear)
    put(first, studies.Job("two", 1, 0, 2e-3, False), 0.5)
    put(first, studies.Job("untrained", 0, 0, 0.0, False), 0.1)
    path = toy.with_name("second.yaml")
    path.write_text(yaml.safe_dump({"question": "And now?", "like": "toy"} | {"runs": TOY["runs"]}))
    second = studies.Study(path)
    assert [job.name for job in second.missing()] == ["untrained@0-1", "two@1-1"]
    study_tables.write(second)
    assert "2 of 4 runs" in capsys.readouterr().out
    assert "2 of the runs that count are those of toy." in second.folder.with_suffix(".md").read_text()
    arms = TOY["arms"] | {"two": TOY["arms"]["two"] | {"hog": {"cell_size": 4}}}
    path.write_text(yaml.safe_dump({"question": "And now?", "like": "toy", "runs": TOY["runs"], "arms": arms}))
    assert len([job for job in studies.Study(path).missing() if job.searching]) == 3


def test_result__that_counts_is_refused_while_the_search_for_its_rate_goes_on(toy: Path) -> None:
    toy.write_text(yaml.safe_dump(TOY | {"rates": {"values": [1e-3, 2e-3, 4e-3], "budget": 1}}))
    study = studies.Study(toy)
    put(study, studies.Job("two", 1, 0, 1e-3, False), 0.5)
    with pytest.raises(SystemExit, match="differs in"):
        study_tables.runs_of(study)


RESULTS = studies.RESULTS
STUDIED = [path.stem for path in PROJECT if (RESULTS / path.stem).is_dir()]


@pytest.mark.parametrize("name", [*STUDIED, "auto", "auto-rates", "tuning_length"])
def test_pages__that_are_stored_are_what_their_programs_write_of_the_stored_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in STUDIED:
        path = ROOT / "benchmarks" / "studies" / f"{name}.yaml"
        for folder in studies.Study(path).folders:
            shutil.copytree(folder, tmp_path / folder.name)
        monkeypatch.setattr(studies, "RESULTS", tmp_path)
        study_tables.write(studies.Study(path))
    else:
        shutil.copytree(RESULTS / name, tmp_path / name)
        program = importlib.import_module(name.replace("-", "_"))
        monkeypatch.setattr(program, "RESULTS", tmp_path)
        monkeypatch.setattr(program, "FOLDER", tmp_path / name)
        program.write_table()
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


def test_results__that_are_stored_are_what_the_studies_ask_for() -> None:
    seen = 0
    for path in PROJECT:
        study = studies.Study(path)
        study.missing()
        study_tables.runs_of(study)
        for stored in study.folder.rglob("*@*.json"):
            found = studies.read(stored)
            job = studies.Job(*(found[name] for name in ("arm", "budget", "seed", "rate", "searching")))
            assert study.folder / f"{job.name}.json" == stored
            assert study.result(job)
            seen += 1
    assert seen


def test_tables__count_a_run_once_that_two_parts_ask_for(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.write_text(yaml.safe_dump(TOY | {"runs": [*TOY["runs"], {"cells": ["two@1"], "seeds": 3}]}))
    put(studies.Study(toy), studies.Job("two", 1, 0, 1e-3, False), 0.5)
    study_tables.write(studies.Study(toy))
    assert "1 of 5 runs" in capsys.readouterr().out


def test_tables__compare_times_round_by_round_and_ask_for_those_of_arms_that_have_changed(toy: Path) -> None:
    contrast = {"of": "two@1", "against": "untrained@0", "margin": 1.0, "says": "training"}
    contrasts = [contrast | {"time": wanted} for wanted in (2, 3, 5)]
    toy.write_text(yaml.safe_dump(TOY | {"contrasts": contrasts}))
    study = studies.Study(toy)
    for seed in (0, 1):
        put(study, studies.Job("two", 1, seed, 1e-3, False), 0.5)
        put(study, studies.Job("untrained", 0, seed, 0.0, False), 0.5)
    put_times(study, {"two": [1.0, 2.0, 4.0], "untrained": [4.0, 4.0, 16.0]})
    study_tables.write(study)
    page = study.folder.with_suffix(".md").read_text()
    assert "| 2 | 4.00x less (2.00 .. 4.00) |" in page
    verdicts = {
        wanted: f"as good; {wanted}x less time: {said} |" for wanted, said in ((2, "yes"), (3, "not shown"), (5, "no"))
    }
    assert all(verdict in page for verdict in verdicts.values())
    assert "Missing now: nothing." in page
    path = study.folder / "times.json"
    stored = json.loads(path.read_text())
    stored["arms"]["two"]["settings"]["decoder"]["depth"] = 2
    path.write_text(json.dumps(stored))
    study_tables.write(study)
    page = study.folder.with_suffix(".md").read_text()
    assert "as good; 3x less time: not measured |" in page
    assert "Missing now: time of two." in page


@pytest.mark.parametrize("path", PROJECT, ids=lambda path: path.stem)
def test_arms__of_the_project_hide_what_their_ratio_says(path: Path) -> None:
    study = studies.Study(path)
    for arm in study.arms:
        settings = study.settings(studies.Job(arm, 1, 0, 1e-3, False))
        masking = settings["masking"]
        side = settings["model"]["image_size"] // settings["model"]["patch_size"]
        for share in (1, *settings["crop"].get("progressive", ())):
            tokens = round(share * side) ** 2
            hidden, _ = mask_counts((round(share * side),) * 2, **masking)
            assert hidden == pytest.approx(masking["mask_ratio"] * tokens, abs=2), f"{arm}: {hidden} of {tokens}"


@pytest.mark.long
def test_studies__of_the_project_name_arms_that_they_describe_and_dmjd_takes(tmp_path: Path) -> None:
    for path in PROJECT:
        study = studies.Study(path)
        cells = {f"{arm}@{budget:g}" for arm, budget, _ in study.cells()}
        named = {each[side] for each in study.asked.get("contrasts", ()) for side in ("of", "against")}
        assert set(study.arms) <= set(study.asked["arms"]), path
        if "arms" in yaml.safe_load(path.read_text()):  # of its own: none is described in vain
            assert set(study.arms) == set(study.asked["arms"]), path
        assert named <= cells, path
        for arm in study.arms:
            assert parsed(study.settings(studies.Job(arm, 1, 0, 1e-3, False)), tmp_path).lr == pytest.approx(1e-3)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Undo that timing takes one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_times__keep_all_rounds_and_count_what_a_plan_counts_and_smaller_crops_as_less(
    toy: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "ROUNDS", 2)
    write_images(tmp_path / "images", {"train": 8})
    two = TOY["arms"]["two"]
    arms = {"two": two, "growing": two | {"crop": {"progressive": [0.5]}}, "hybrid": {"model": {"backbone": "convvit"}}}
    cells = [f"{arm}@1" for arm in arms]
    toy.write_text(yaml.safe_dump(TOY | {"arms": arms, "runs": [{"cells": cells, "seeds": 1}]}))
    study = studies.Study(toy)
    studies.measure_times(study, tmp_path / "images", "cpu")
    times = study_tables.times_of(study)
    assert [len(times[arm].rounds) for arm in arms] == [2, 2, 2]
    assert times["growing"].mflop / times["two"].mflop == pytest.approx((1 + 1 / 4) / 2, rel=0.1)
    for arm in ("two", "hybrid"):
        settings = parsed(study.timed(arm), tmp_path, "plan")
        work = count(parts_of(settings), precision="fp32", on_gpu=False)
        assert times[arm].mflop == pytest.approx(work.flops / settings.masking.num_views / 1e6, abs=0.005)


@pytest.mark.slow
def test_toy_study__runs_from_images_to_tables_and_does_not_run_twice(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", {"train": 12, "test": 4})
    toy.write_text(yaml.safe_dump(TOY | {"runs": [{"cells": ["two@1"], "seeds": 1}]}))
    study = studies.Study(toy)
    machine = machine_of(study, tmp_path)
    monkeypatch.setattr(studies.signal, "signal", lambda *_: None)
    studies.work_off([machine], 1, 60)
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
    studies.work_off([machine], 1, 60)


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Undo that a study handles signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_study__stopped_by_minutes_or_by_a_signal_goes_on_and_adds_up_what_it_spent(
    toy: Path, tmp_path: Path, own_handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", {"train": 12, "test": 4})
    common = studies.merge(TOY["common"], {"monitor": {"log_every": 5}})
    runs = [{"cells": ["two@150"], "seeds": 1}]
    toy.write_text(yaml.safe_dump(TOY | {"common": common, "judges": ["linear"], "runs": runs}))
    study = studies.Study(toy)
    run = tmp_path / "work" / "toy" / "two@150-0"
    metrics, spent = run / "pretrain" / "metrics.jsonl", run / "spent.json"

    machine = machine_of(study, tmp_path)
    studies.work_off([machine], 1, 0)
    assert machine.stopped.is_set()

    def stop_when_it_trains() -> None:
        while not metrics.is_file() or '"loss"' not in metrics.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_it_trains, daemon=True).start()
    studies.work_off([machine_of(study, tmp_path)], 1, 60)
    assert [job.name for job in study.missing()] == ["two@150-0"]
    begun, before = metrics.read_text(), studies.read(spent)["pretrain"]["cpu_seconds"]
    assert 0 < json.loads(begun.splitlines()[-1])["step"] < 300

    monkeypatch.setattr(studies.shutil, "rmtree", lambda _: None)  # to see how the run went
    studies.work_off([machine_of(study, tmp_path)], 1, 60)
    (result,) = study_tables.runs_of(study)["two", 150.0].values()
    assert result["spent"]["pretrain"]["cpu_seconds"] > before
    assert metrics.read_text().startswith(begun)  # with the seconds of then: it was not begun anew
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == 300


@pytest.mark.slow
def test_studies__share_their_places_so_that_a_later_one_begins_beside_the_last_run_of_the_first(
    toy: Path, tmp_path: Path, own_handlers: None
) -> None:
    write_images(tmp_path / "images", {"train": 12, "test": 4})
    made = []
    for name, budget in (("long", 150), ("short", 1)):
        runs = [{"cells": [f"two@{budget}"], "seeds": 1}]
        path = toy.with_name(f"{name}.yaml")
        path.write_text(yaml.safe_dump(TOY | {"judges": ["linear"], "runs": runs}))
        made.append(studies.Study(path))
    studies.work_off([machine_of(study, tmp_path) for study in made], 2, 60)
    long, short = (next(study.folder.glob("two*.json")).stat().st_mtime for study in made)
    assert short < long


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
