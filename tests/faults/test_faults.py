"""Whatever happens to a run, it says so in one line, and what is on the disk stays good."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from prefork import Dmjd
from safetensors.torch import load_file
from torch import nn

from dmjd.cli import main
from dmjd.config.pretrain import PretrainSettings
from dmjd.engine import checkpoint
from dmjd.engine.device import memory_errors
from dmjd.errors import CheckpointError, ConfigError

STEPS = 30
TINY = {
    "preset": "quick",
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "decoder.embed_dim": 16,
    "decoder.depth": 1,
    "decoder.num_heads": 2,
    "batch_size": 16,
    "steps": STEPS,
    "monitor.log_every": 1,
    "monitor.saves": 15,
    "monitor.evals": 1,
    "monitor.max_images": 32,
    "monitor.max_share": 100.0,
    "workers": 0,
    "device": "cpu",
}


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def flags(data: Path, out: Path, **changes: object) -> list[str]:
    """The command line of a tiny run; `optim__blr=1` stands for `--optim.blr 1`."""
    settings = TINY | {"data": data, "out": out} | {key.replace("__", "."): value for key, value in changes.items()}
    return ["pretrain", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def resumption(data: Path, out: Path) -> list[str]:
    return ["pretrain", "--data", str(data), "--out", str(out), "--resume"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return Dmjd(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def wait_for_save(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.endswith("saved\n"):
            return
    raise AssertionError("".join(seen))


def curve(out: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def backbone(out: Path) -> tuple[dict[str, object], bytes]:
    """The header, whose metadata safetensors writes in any order, and the tensors to the last bit."""
    content = (out / "backbone.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, the only one that is no progress, no warning and no traceback."""
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if not line.endswith(", saved") and not line.startswith(("warning: ", "training: "))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def run(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_pretrain__killed_again_and_again_it_ends_as_if_unbroken(data: Path, unbroken: Path, tmp_path: Path) -> None:
    out, delays, killed = tmp_path / "run", random.Random(0), 0
    for leg in range(3):
        process = start(resumption(data, out) if leg else flags(data, out))
        wait_for_save(process)
        time.sleep(delays.uniform(0, 0.15))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        assert checkpoint.latest(out / "checkpoints") is not None
    assert killed
    assert main(resumption(data, out)) == 0
    assert curve(out) == curve(unbroken)
    assert backbone(out) == backbone(unbroken)
    assert not list((out / "checkpoints").glob(".*"))


def test_pretrain__sigterm_saves_and_the_resumed_run_ends_as_if_unbroken(
    data: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(flags(data, out))
    wait_for_save(process)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert f"{out}; go on with --resume" in stderr
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert checkpoint.read_state(newest)["step"] == curve(out)[-1][0] < STEPS
    assert main(resumption(data, out)) == 0
    assert curve(out) == curve(unbroken)
    assert backbone(out) == backbone(unbroken)


def test_pretrain__resumed_from_an_older_checkpoint_it_writes_the_same_lines_once(
    data: Path, unbroken: Path, run: Path
) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "backbone.safetensors").unlink()
    assert main(resumption(data, run)) == 0
    assert curve(run) == curve(unbroken)
    assert backbone(run) == backbone(unbroken)


def test_pretrain__a_line_cut_off_by_the_kill_is_written_again(data: Path, unbroken: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-3]) + lines[-3][:25])
    assert main(resumption(data, run)) == 0
    assert curve(run) == curve(unbroken)


# -- crash points of a checkpoint --------------------------------------------------------------------------------------


class Breaker:
    """Lets file operations pass until the k-th, which fails; a write fails half done."""

    def __init__(self, fails_at: int, monkeypatch: pytest.MonkeyPatch):
        self.calls, self.fails_at = 0, fails_at
        for owner, name in (
            (checkpoint, "save_file"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "rename"),
            (os, "fsync"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.breaking(name, getattr(owner, name)))

    def breaking(self, name: str, original):
        def operation(*arguments, **options):
            self.calls += 1
            if self.calls != self.fails_at:
                return original(*arguments, **options)
            if name in ("save_file", "write_text"):
                path = arguments[1] if name == "save_file" else arguments[0]
                original(*arguments, **options)
                os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return operation


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, step: int) -> Path:
    model, optimizer = trained(step)
    return checkpoint.save(folder, checkpoint.collect(model, model, optimizer), {"step": step, "seen": step})


def assert_loads(path: Path | None, *steps: int) -> None:
    """`path` is the checkpoint of one of these steps, to the last bit."""
    assert path is not None
    step = checkpoint.read_state(path)["seen"]
    assert step in steps
    model, optimizer = trained(1)
    checkpoint.load(path, model=model, trained=model, optimizer=optimizer)
    expected, expected_optimizer = trained(step)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    moments, expected_moments = optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"]
    for parameter, entries in expected_moments.items():
        for key, value in entries.items():
            assert torch.equal(moments[parameter][key], value)


def test_save__whichever_file_operation_fails_the_latest_checkpoint_loads(tmp_path: Path) -> None:
    fails_at = 0
    while True:
        fails_at += 1
        folder = tmp_path / str(fails_at)
        for step in (1, 2):
            save(folder, step)
        with pytest.MonkeyPatch.context() as monkeypatch:
            breaker = Breaker(fails_at, monkeypatch)
            with suppress(OSError):
                save(folder, 3)
        assert_loads(checkpoint.latest(folder), 2, 3)
        save(folder, 4)
        assert_loads(checkpoint.latest(folder), 4)
        assert not list(folder.glob(".*"))
        if breaker.calls < fails_at:
            break
    assert fails_at > 12


def test_save__two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_save__broken_later_checkpoints_do_not_push_a_new_one_out(tmp_path: Path) -> None:
    for step in (8, 9):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        checkpoint.latest(tmp_path)
    assert_loads(save(tmp_path, 1), 1)
    assert_loads(save(tmp_path, 2), 2)
    assert_loads(checkpoint.latest(tmp_path), 2)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_latest__a_flipped_byte_or_a_missing_file_falls_back_to_the_older(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        newest = checkpoint.latest(tmp_path)
        if name == "MANIFEST.json" and newest == path.parent:
            continue  # a flipped space or bracket may leave what it says
        assert_loads(newest, 1)
    path.unlink()
    assert_loads(checkpoint.latest(tmp_path), 1)


def test_load__a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(path, model=model, trained=model, optimizer=optimizer)


# -- disk --------------------------------------------------------------------------------------------------------------


def test_pretrain__a_full_disk_is_one_line_and_exit_code_6(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert main(resumption(data, run)) == 6
    assert "No space left on device" in one_line(capsys)
    assert checkpoint.latest(run / "checkpoints") == run / "checkpoints" / f"step-{STEPS - 2:08d}"


def test_pretrain__a_limit_on_file_sizes_is_one_line_and_exit_code_6(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors' own writer reports the system's error in an exception of its own."""
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))  # Python ignores SIGXFSZ
    try:
        code = main(resumption(data, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 6
    assert "File too large" in one_line(capsys)
    assert checkpoint.latest(run / "checkpoints") == run / "checkpoints" / f"step-{STEPS - 2:08d}"


def test_pretrain__an_out_that_is_a_file_is_one_line_and_exit_code_6(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("")
    assert main(flags(data, tmp_path / "run")) == 6
    assert str(tmp_path / "run") in one_line(capsys)


# -- bad images --------------------------------------------------------------------------------------------------------


def skipped(out: Path) -> list[str]:
    rows = [line.split("\t") for line in (out / "skipped.tsv").read_text().splitlines()]
    assert all(len(row) == 2 and row[1] for row in rows)
    return [path for path, _ in rows]


def test_pretrain__more_than_one_percent_of_bad_files_stop_it_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images" / "train", 60)
    write_images(tmp_path / "images" / "val", 4, first=60)
    bad = ["007.png", "031.png"]
    for name in bad:
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    assert main(flags(tmp_path / "images", tmp_path / "run")) == 3
    assert "2 of 64 images do not decode" in one_line(capsys)
    assert skipped(tmp_path / "run") == bad


def test_pretrain__few_bad_files_are_named_and_it_finishes(tmp_path: Path, unbroken: Path) -> None:
    folder = write_images(tmp_path / "images" / "train", 198)
    write_images(tmp_path / "images" / "val", 4, first=198)
    (folder / "broken.png").write_text("not an image")
    (folder / os.fsdecode(b"not unicode \xff.png")).write_bytes(b"")
    out = tmp_path / "run"
    assert main(flags(tmp_path / "images", out, steps=2)) == 0
    assert skipped(out) == ["broken.png", "not unicode \\udcff.png"]
    assert json.loads((out / "summary.json").read_text())["skipped"] == 2
    assert (out / "backbone.safetensors").is_file()


def test_pretrain__a_bad_file_with_tabs_and_line_breaks_in_its_name_is_one_row(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images" / "train", 100)
    write_images(tmp_path / "images" / "val", 4, first=200)
    (folder / "a\tb\nc.png").write_text("not an image")
    assert main(flags(tmp_path / "images", tmp_path / "run", steps=1)) == 0
    assert skipped(tmp_path / "run") == ["a\\tb\\nc.png"]


def test_pretrain__skipped_tsv_is_there_and_empty_where_all_decode(unbroken: Path) -> None:
    assert (unbroken / "skipped.tsv").read_bytes() == b""


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_errors__running_out_becomes_one_line_and_other_errors_stay() -> None:
    with pytest.raises(ConfigError, match=r"out of memory .*; more of it"), memory_errors("more of it"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), memory_errors("more of it"):
        torch.ones(2).view(3)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 100])  # found by the loss, or by the weights before they are saved
@pytest.mark.parametrize("lr", [1e30, 1e12])
def test_pretrain__numbers_that_overflow_stop_it_and_every_checkpoint_is_finite(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lr: float,
    log_every: int,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(PretrainSettings, "lr", property(lambda _: lr))  # no setting permits it
    assert main(flags(data, out, monitor__saves=STEPS, monitor__log_every=log_every)) == 5
    assert "a lower blr" in one_line(capsys)
    for path in (out / "checkpoints").glob("step-*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


# -- resume ------------------------------------------------------------------------------------------------------------


def test_pretrain__an_existing_run_is_refused_and_left_as_it_is(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main(flags(data, run)) == 2
    assert "--resume" in one_line(capsys)
    assert contents(run) == before
    (run / "config.yaml").unlink()  # its checkpoints are worth as much without it
    assert main(flags(data, run)) == 2
    assert "--resume" in one_line(capsys)
    assert contents(run / "checkpoints")


@pytest.mark.parametrize("change", ["--optim.blr=1e-3", "--seed=1", "--batch_size=8", "--model.depth=1", "--steps=29"])
def test_pretrain__resumed_with_other_settings_it_is_refused(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main([*resumption(data, run), change]) == 4
    key, _, value = change.removeprefix("--").partition("=")
    assert re.search(rf"{key} \S+ -> {float(value):g}\b", one_line(capsys))
    assert {name: text for name, text in contents(run).items() if "tfevents" not in name} == {
        name: text for name, text in before.items() if "tfevents" not in name
    }


def test_pretrain__resumed_without_its_metrics_it_goes_on(data: Path, unbroken: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "metrics.jsonl").unlink()
    assert main(resumption(data, run)) == 0
    assert curve(run) == curve(unbroken)[-2:]


def test_pretrain__resumed_on_other_images_it_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(resumption(write_images(tmp_path / "others", 65), run)) == 4
    assert "images of --data have changed" in one_line(capsys)


def test_pretrain__resume_where_no_run_has_been_is_refused_and_leaves_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(data, tmp_path / "typo"), "--resume"]) == 2
    assert "no run to resume" in one_line(capsys)
    assert not (tmp_path / "typo").exists()


def test_pretrain__resumed_before_its_first_checkpoint_it_begins_again_and_keeps_what_was_written(
    data: Path, unbroken: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = curve(run)
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert main(resumption(data, run)) == 0
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert curve(run) == curve(unbroken)
    (run / "metrics-before.jsonl").rename(run / "metrics.jsonl")
    assert curve(run) == before


def test_pretrain__a_line_of_zeros_as_after_a_power_cut_is_left_out(data: Path, unbroken: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-2]) + b"\0" * 80 + b"\n" + lines[-1])
    assert main(resumption(data, run)) == 0
    assert curve(run) == curve(unbroken)


@pytest.mark.parametrize("missing", [["report.html"], ["report.html", "summary.json"]], ids=str)
def test_pretrain__a_report_that_was_not_written_is_written_when_the_run_is_resumed(
    data: Path, unbroken: Path, run: Path, capsys: pytest.CaptureFixture[str], missing: list[str]
) -> None:
    for name in missing:
        (run / name).unlink()
    capsys.readouterr()
    assert main(resumption(data, run)) == 0
    assert (run / "report.html").is_file()
    assert "training: steps" not in capsys.readouterr().err, "there are none"
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_pretrain__a_summary_that_a_power_cut_spoilt_is_written_anew(data: Path, unbroken: Path, run: Path) -> None:
    for spoilt in (b'{"trained": {"loss"', bytes(100), b""):
        (run / "summary.json").write_bytes(spoilt)
        assert main(["report", str(run)]) == 0
    assert main(resumption(data, run)) == 0
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (run, unbroken))
    assert ours["trained"] == theirs["trained"]


def test_pretrain__a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    data: Path, unbroken: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    capsys.readouterr()
    assert main(resumption(data, run)) == 0
    assert f"{newest}; step-{STEPS - 2:08d} is used" in capsys.readouterr().err
    assert curve(run) == curve(unbroken)
    assert backbone(run) == backbone(unbroken)


# -- other settings ----------------------------------------------------------------------------------------------------


def test_pretrain__a_change_that_is_allowed_by_name_is_said_and_kept(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    capsys.readouterr()
    assert main([*resumption(data, run), "--optim.blr", "1e-4", "--allow_change", "optim.blr"]) == 0
    assert "changed: optim.blr 0.003 -> 0.0001" in capsys.readouterr().err
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["optim"]["blr"] == 1e-4
    assert "allow_change" not in saved
    assert main([*resumption(data, run), "--optim.blr", "1e-2"]) == 4


def test_pretrain__an_optimizer_that_may_change_is_the_new_one(data: Path, run: Path) -> None:
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    shutil.rmtree(last)
    new = ["--optim.weight_decay", "0.5", "--optim.betas", "0.8", "0.9"]
    assert (
        main([*resumption(data, run), *new, "--allow_change", "optim.weight_decay", "--allow_change", "optim.betas"])
        == 0
    )
    groups = checkpoint.read_state(last)["optimizer"]["groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert [group["betas"] for group in groups] == [[0.8, 0.9]] * len(groups)


def test_pretrain__a_finished_run_goes_on_where_it_gets_more_steps(
    data: Path, unbroken: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*resumption(data, run), "--steps", str(STEPS + 4)]) == 0
    assert f"{STEPS + 4} steps instead of {STEPS}" in capsys.readouterr().err
    assert curve(run)[:STEPS] == curve(unbroken)
    assert len(curve(run)) == STEPS + 4
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS + 4
    assert backbone(run) != backbone(unbroken)


def test_pretrain__a_run_does_not_end_before_the_step_that_it_is_at(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main([*resumption(data, run), "--steps", "5", "--allow_change", "steps"]) == 4
    assert f"steps {STEPS} -> 5" in one_line(capsys)
    assert contents(run) == before


def test_pretrain__other_images_are_trained_on_where_that_is_allowed(data: Path, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    others = write_images(tmp_path / "others", 65)
    assert main([*resumption(others, run), "--allow_change", "data"]) == 0
    assert len(curve(run)) == STEPS


def test_pretrain__another_architecture_that_is_allowed_is_refused_by_its_first_keys(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*resumption(data, run), "--model.depth", "1", "--allow_change", "model.depth"]) == 4
    assert "blocks.1." in capsys.readouterr().err


def test_pretrain__leave_to_change_what_is_no_setting_names_the_nearest(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*resumption(data, run), "--allow_change", "optim.blrr"]) == 2
    assert "did you mean optim.blr?" in one_line(capsys)


# -- saved by time -----------------------------------------------------------------------------------------------------


def test_pretrain__a_checkpoint_is_written_when_its_minutes_are_over(data: Path, tmp_path: Path) -> None:
    arguments = flags(data, tmp_path / "run", monitor__saves=0, checkpoint_minutes=0)
    process = start(arguments)
    wait_for_save(process)
    process.kill()
    process.communicate()
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint.read_state(newest)["step"] < STEPS


def test_pretrain__accumulated_halves_give_the_same_losses(data: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(flags(data, out, optim__accumulation=2)) == 0
    np.testing.assert_allclose(curve(out), curve(unbroken), atol=1e-5, rtol=1e-4)
