"""Signals, a second process, numbers that are none: what a run does then, and that nothing is lost."""

import errno
import fcntl
import json
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import STEPS, backbone, curve, flags, resumption, start, wait_for_save

import dmjd.tasks.pretrain
from dmjd import DMJD
from dmjd.cli import main
from dmjd.engine import checkpoint
from dmjd.engine.claim import claim
from dmjd.engine.distributed import Ranks
from dmjd.engine.loop import step_if
from dmjd.engine.trainer import Trainer
from dmjd.evaluation import monitor
from dmjd.method import Losses


def at_call(number: int, work: Callable[[], object], original: Callable[..., Any]) -> Callable[..., Any]:
    """Do something in the course of the n-th call of a function."""
    calls = 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            work()
        return original(*arguments, **options)

    return function


# -- signals -----------------------------------------------------------------------------------------------------------

NOTHING, RESUME = "there was nothing to save yet", "go on with --resume"
MOMENTS = {
    "images are looked for": (dmjd.tasks.pretrain, "find_images", 1, NOTHING),
    "the network is made": (dmjd.tasks.pretrain, "from_settings", 1, NOTHING),
    "untrained evaluation": (monitor, "extract", 1, NOTHING),
    "first step": (Trainer, "look_around", 1, RESUME),
    "later step": (Trainer, "look_around", 11, RESUME),
    "evaluation on the way": (monitor, "extract", 3, RESUME),
    "checkpoint is written": (checkpoint, "save_file", 3, RESUME),
    "checkpoint is read back": (checkpoint, "verify", 2, RESUME),
    "last step": (Trainer, "look_around", STEPS, RESUME),
    "last evaluation": (monitor, "extract", 5, RESUME),
    "backbone is written": (dmjd.tasks.pretrain, "save_backbone", 1, RESUME),
    "pictures are drawn": (dmjd.tasks.pretrain, "draw", 1, RESUME),
    "report is written": (dmjd.tasks.pretrain, "write_report", 1, RESUME),
}
SLOW = {"untrained evaluation", "later step", "checkpoint is read back", "last evaluation", "pictures are drawn"}


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=pytest.mark.slow) if moment in SLOW else moment for moment in MOMENTS]
)
def test_pretrain__a_signal_at_any_moment_ends_it_soon_and_it_ends_as_if_unbroken(
    data: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    owner, name, number, promise = MOMENTS[moment]
    out, sent = tmp_path / "run", []

    def stop() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, at_call(number, stop, getattr(owner, name)))
        assert main(flags(data, out)) == 143
    assert time.monotonic() - sent[0] < 10
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("stopped by SIGTERM")
    assert promise in said
    assert not (out / ".lock").exists()
    if promise == NOTHING:
        assert not out.exists() or "untrained" in moment
    assert main(resumption(data, out) if out.exists() else flags(data, out)) == 0
    assert curve(out) == curve(unbroken)
    assert backbone(out) == backbone(unbroken)
    evaluated = [[line for line in lines(each) if "loss" not in line] for each in (out, unbroken)]
    assert [line["step"] for line in evaluated[0]] == [line["step"] for line in evaluated[1]]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_pretrain__made_longer_it_is_done_only_at_its_later_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert main(flags(data, out, steps=4)) == 0
    longer = [*flags(data, out, steps=8), "--resume"]
    with monkeypatch.context() as patch:
        stop = at_call(1, lambda: os.kill(os.getpid(), signal.SIGTERM), dmjd.tasks.pretrain.save_backbone)
        patch.setattr(dmjd.tasks.pretrain, "save_backbone", stop)
        assert main(longer) == 143
    assert not (out / "summary.json").exists()
    assert "resume" not in (out / "config.yaml").read_text()
    assert main(longer) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGHUP"])
def test_pretrain__other_signals_that_end_runs_save_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    send = at_call(5, lambda: os.kill(os.getpid(), getattr(signal, name)), Trainer.look_around)
    monkeypatch.setattr(Trainer, "look_around", send)
    assert main(flags(data, tmp_path / "run")) == 143
    assert f"stopped by {name} at step 5; {tmp_path / 'run'}; go on with --resume" in capsys.readouterr().err
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint.read_state(newest)["step"] == 5


def test_pretrain__a_signal_between_the_parts_of_a_step_leaves_the_step_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"optim__accumulation": 4, "steps": 8, "monitor__saves": 1}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(flags(data, whole, **options)) == 0
    with monkeypatch.context() as patched:
        send = at_call(4 * 5 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM), DMJD.forward)
        patched.setattr(DMJD, "forward", send)
        assert main(flags(data, out, **options)) == 143
    assert "at step 5;" in capsys.readouterr().err
    assert main(resumption(data, out)) == 0
    assert curve(out) == curve(whole)
    assert backbone(out) == backbone(whole)


def test_pretrain__a_signal_in_the_first_step_has_nothing_to_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DMJD, "forward", at_call(1, lambda: os.kill(os.getpid(), signal.SIGTERM), DMJD.forward))
    assert main(flags(data, tmp_path / "run", optim__accumulation=4)) == 143
    assert NOTHING in capsys.readouterr().err


def test_pretrain__below_nohup_a_hangup_does_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send = at_call(2, lambda: os.kill(os.getpid(), signal.SIGHUP), Trainer.look_around)
        monkeypatch.setattr(Trainer, "look_around", send)
        assert main(flags(data, tmp_path / "run", steps=4)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
def test_pretrain__the_second_signal_acts_at_once(data: Path, tmp_path: Path) -> None:
    twice = (
        "import os, signal, sys\n"
        "from dmjd.cli import main\n"
        "from dmjd.engine.trainer import Trainer\n"
        "Trainer.look_around = lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", twice, *flags(data, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM


# -- a second process --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_pretrain__a_second_process_in_the_same_directory_is_refused_and_harms_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = start(flags(data, out, steps=4000))
    wait_for_save(first)
    for arguments in (flags(data, out), resumption(data, out)):
        assert main(arguments) == 2
        assert f"error: process {first.pid} on " in capsys.readouterr().err
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert (out / ".lock").exists()  # of a dead process: it holds nothing
    reached = checkpoint.latest(out / "checkpoints")
    assert reached is not None
    step = checkpoint.read_state(reached)["step"]
    assert main([*resumption(data, out), "--steps", str(step + 1), "--allow_change", "steps"]) == 0
    assert not (out / ".lock").exists()


def test_claim__where_nothing_can_be_locked_that_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claim(tmp_path / "run", resume=False, ranks=Ranks(torch.device("cpu"))):
        said = capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was written, and nothing is left"
    assert said == f"warning: files cannot be locked here; {tmp_path / 'run'}; start no second process in it\n"


# -- numbers that are none ---------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], bool], factor: float) -> None:
    """Multiply the loss of some steps."""
    number, original = 0, DMJD.forward

    def forward(self: DMJD, *arguments: Any) -> Losses:
        nonlocal number
        number += 1
        losses = original(self, *arguments)
        return losses._replace(total=losses.total * factor) if calls(number) else losses

    monkeypatch.setattr(DMJD, "forward", forward)


def assert_finite(out: Path) -> None:
    files = [*(out / "checkpoints").glob("step-*/*.safetensors")]
    assert all(bool(value.isfinite().all()) for path in files for value in load_file(path).values())


@pytest.mark.parametrize("log_every", [1, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30])
def test_pretrain__single_gradients_that_are_no_numbers_are_left_out_and_counted(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    log_every: int,
) -> None:
    out = tmp_path / "run"
    poison(monkeypatch, lambda number: number in (8, 12, 13), factor)
    assert main(flags(data, out, monitor__log_every=log_every)) == 0
    said = capsys.readouterr().err
    assert [f"not finite at step {step};" in said for step in (8, 12, 13)] == [True] * 3
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 3
    assert_finite(out)


@pytest.mark.parametrize("log_every", [1, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30])
def test_pretrain__three_in_a_row_go_back_to_a_good_checkpoint_and_the_run_ends_on_other_images(
    data: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    log_every: int,
) -> None:
    out = tmp_path / "run"
    poison(monkeypatch, lambda number: number in (12, 13, 14), factor)
    assert main(flags(data, out, monitor__log_every=log_every, monitor__saves=3, log_to="tensorboard")) == 0
    assert "at step 14; back to step 10, other images from there (rollback 1 of 2)" in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rollbacks"] == 1
    if log_every == 1:
        assert [step for step, *_ in curve(out)] == list(range(1, STEPS + 1))
        board = EventAccumulator(str(out / "tensorboard")).Reload()
        assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
        assert [*map(operator.eq, curve(out), curve(unbroken))] == [True] * 10 + [False] * (STEPS - 10)
    assert_finite(out)


def test_pretrain__made_longer_it_goes_back_to_a_checkpoint_of_the_shorter_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(flags(data, out, steps=4)) == 0
    poison(monkeypatch, lambda number: number <= 3, float("nan"))
    assert main([*flags(data, out, steps=8, monitor__saves=1), "--resume"]) == 0
    assert "at step 7; back to step 4, other images from there (rollback 1 of 2)" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize(("saves", "tried"), [(3, "after 2 rollbacks"), (1, "there is no checkpoint to go back to")])
@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_pretrain__where_going_back_does_not_help_it_ends_with_exit_code_5(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    saves: int,
    tried: str,
) -> None:
    out = tmp_path / "run"
    poison(monkeypatch, lambda number: number > 22, factor)
    assert main(flags(data, out, monitor__saves=saves)) == 5
    *before, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: 3 gradients in a row are not finite at step ")
    assert tried in said
    back = [line.partition("back to ")[2][:7] for line in before if "(rollback" in line]
    assert back == (["step 20", "step 10"] if saves == 3 else [])
    assert_finite(out)


def test_pretrain__a_run_that_went_back_resumes_as_if_unbroken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    for folder, stop_at in ((whole, None), (out, 20)):
        with monkeypatch.context() as patched:
            poison(patched, lambda number: number in (12, 13, 14), float("nan"))
            if stop_at:  # of all steps, those before the rollback included
                send = at_call(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM), Trainer.look_around)
                patched.setattr(Trainer, "look_around", send)
            assert main(flags(data, folder, monitor__saves=3)) == (143 if stop_at else 0)
    assert main(resumption(data, out)) == 0
    assert curve(out) == curve(whole)
    assert backbone(out) == backbone(whole)


@pytest.mark.parametrize("fused", [False, True])
def test_step_if__leaves_weights_and_optimizer_as_they_are_where_the_gradient_is_not_finite(fused: bool) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    seen = []
    for finite in (True, False, True):
        model(torch.ones(1, 3)).sum().backward()
        step_if(torch.tensor(finite), optimizer)
        seen.append((model.weight.detach().clone(), int(optimizer.state[model.weight]["step"])))
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[1][0], seen[2][0])
    assert [steps for _, steps in seen] == [1, 1, 2]
