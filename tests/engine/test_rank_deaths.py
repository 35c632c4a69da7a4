"""A run on several ranks that loses one, or torchrun, ends: soon, with a word about who it was, and leaving nobody."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dmjd.engine import checkpoint
from dmjd.engine.watch import _stop, this_process

GONE = 30.0  # seconds after which nobody is left
STARTED = 240.0  # of a busy machine
TINY = """
    --preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2
    --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --device cpu --precision fp32
    --data_on_device no --monitor.max_images 4 --monitor.evals 0
""".split()  # noqa: SIM905 (as it is typed)
ENDLESS = ["--steps", "1000000", "--monitor.saves", "10000", "--workers", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(number: int, *arguments: str) -> list[str]:
    return [*TORCHRUN, str(number), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


class Running:
    """A run on some ranks, each with a process that loads images, which has saved its first checkpoint."""

    def __init__(self, agent: subprocess.Popen[bytes], said: Path):
        self.agent, self.said = agent, said
        children = psutil.Process(agent.pid).children()
        self.ranks = sorted(children, key=lambda child: int(child.environ()["RANK"]))
        self.everybody = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]

    def seconds_until_all_are_gone(self) -> float:
        began = time.monotonic()
        self.agent.wait(GONE)
        gone, left = psutil.wait_procs(self.everybody, GONE - (time.monotonic() - began))
        assert not left, left
        assert len(gone) == len(self.everybody)
        return time.monotonic() - began


@contextmanager
def running(number: int, colours: Path, folder: Path) -> Iterator[Running]:
    """Start a run without end; whoever is left of it when the test is over is killed."""
    said = folder / "said"
    command = torchrun(number, "-m", "dmjd", "pretrain", *TINY, *ENDLESS, "--data", str(colours))
    with said.open("wb") as file:
        agent = subprocess.Popen(
            [*command, "--out", str(folder / "run")], stdout=file, stderr=subprocess.STDOUT, env=environment()
        )
    everybody: list[psutil.Process] = []
    try:
        began = time.monotonic()
        while "saved" not in said.read_text():
            assert agent.poll() is None and time.monotonic() - began < STARTED, said.read_text()  # noqa: PT018
            time.sleep(0.2)
        run = Running(agent, said)
        everybody = run.everybody
        assert len(run.ranks) == number
        assert len(everybody) >= 1 + 2 * number
        yield run
    finally:
        for each in [psutil.Process(agent.pid)] if agent.poll() is None else []:
            everybody = [*everybody, each, *each.children(recursive=True)]
        for each in everybody:
            if each.is_running():
                each.kill()
        agent.wait()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"(\[rank\d\]:)?error\b", line)]


# -- deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("culprit", [0, 1])
def test_rank__killed_or_stopped_it_is_named_and_all_processes_are_gone_in_30_s(
    culprit: int, number: signal.Signals, colours: Path, tmp_path: Path
) -> None:
    with running(2, colours, tmp_path) as run:
        pid = run.ranks[culprit].pid
        os.kill(pid, number)
        seconds = run.seconds_until_all_are_gone()
        said = run.said.read_text()
        assert run.agent.returncode != 0
        if number == signal.SIGSTOP:
            assert errors(said) == [
                f"error: rank {culprit} (process {pid}) was stopped for 10 s; all processes end; "
                f"{tmp_path / 'run'}; go on with --resume"
            ]
        else:  # torchrun says so
            assert re.search(rf"rank\s*: {culprit} \(local_rank: {culprit}\)\n\s*exitcode\s*: -9 \(pid: {pid}\)", said)
            assert not errors(said)
        assert not re.search(r"File .*dmjd/engine", said), "no traceback of ours"
        print(f"{number.name} of rank {culprit}: {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(2, signal.SIGUSR1), (1, signal.SIGKILL), (2, signal.SIGKILL)])
def test_torchrun__killed_or_ended_by_a_signal_the_ranks_save_and_all_are_gone_in_30_s(
    ranks: int, number: signal.Signals, colours: Path, tmp_path: Path
) -> None:
    with running(ranks, colours, tmp_path) as run:
        run.agent.send_signal(number)
        seconds = run.seconds_until_all_are_gone()
        said = run.said.read_text()
        assert f"warning: torchrun (process {run.agent.pid}) has ended; all processes stop\n" in said
        stops = re.findall(r"^stopped by SIGTERM at step (\d+); .*; go on with --resume$", said, re.MULTILINE)
        newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert newest is not None
        assert [checkpoint.read_state(newest)["step"]] == [int(step) for step in stops]
        assert not errors(said)
        print(f"{number.name} of torchrun with {ranks} ranks: {seconds:.1f} s")


@pytest.mark.slow
def test_torchrun__killed_and_a_rank_that_hangs_it_is_left_after_the_time_that_torchrun_has_for_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "6")  # before the 10 s after which a stopped rank is named
    with running(2, colours, tmp_path) as run:
        run.ranks[1].suspend()
        run.agent.kill()
        run.seconds_until_all_are_gone()
        assert errors(run.said.read_text()) == [
            f"error: torchrun (process {run.agent.pid}) has ended, and rank 0 did not stop within 6 s; "
            f"all processes end; {tmp_path / 'run'}; go on with --resume"
        ]


@pytest.mark.slow
def test_torchrun__stopped_by_a_scheduler_saves_and_all_are_gone_in_30_s(colours: Path, tmp_path: Path) -> None:
    with running(2, colours, tmp_path) as run:
        run.agent.terminate()
        seconds = run.seconds_until_all_are_gone()
        said = run.said.read_text()
        assert run.agent.returncode != 0
        assert len(re.findall(r"^stopped by SIGTERM at step \d+; .*; go on with --resume$", said, re.MULTILINE)) == 1
        assert not errors(said)
        print(f"SIGTERM of torchrun: {seconds:.1f} s")


@pytest.mark.slow
def test_ranks__stopped_and_continued_together_go_on(colours: Path, tmp_path: Path) -> None:
    with running(2, colours, tmp_path) as run:
        for rank in run.ranks:
            rank.suspend()
        time.sleep(15)
        for rank in run.ranks:
            rank.resume()
        lines = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        time.sleep(15)
        assert run.agent.poll() is None
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > lines


def test_is_stopped__tells_a_stopped_process_from_a_running_one_and_from_a_later_one_of_the_same_number() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        seen = this_process(0)._replace(pid=process.pid, started=started)
        assert not seen.is_stopped
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert seen.is_stopped
        assert not seen.runs
        assert not seen._replace(started="1").is_stopped
        process.kill()
    assert not seen.is_stopped
    assert not seen.runs
    assert not this_process(0).is_stopped
    assert this_process(0).runs


# -- errors ------------------------------------------------------------------------------------------------------------


def fails(command: list[str], code: int) -> str:
    """The one error line of a run on two ranks that ends with an exit code of ours."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=STARTED, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, "torchrun's own"
    assert re.search(rf"exitcode\s*: {code} \(pid", said), said
    assert len(errors(said)) == 1, said
    return errors(said)[0]


CASES = {  # exit code, flags that are wrong, how the line begins
    "settings": (2, {"--epochs": "nan"}, "error: epochs nan is out of range; choose 1e-06 to 1000000"),
    "names": (2, {"--size": "tiny"}, "error: Unknown option: --size."),
    "data": (3, {"--data": "nowhere"}, "error: no such data"),
    "directory": (2, {"--out": "taken"}, "error: there is a run already; taken"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_error__on_all_ranks_is_said_once_and_torchrun_reports_the_exit_code(
    case: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/config.yaml").write_text("{}")
    code, wrong, said = CASES[case]
    flags = {"--data": str(colours), "--out": "run", "--steps": "1", **wrong}
    words = [word for pair in flags.items() for word in pair]
    assert fails(torchrun(2, "-m", "dmjd", "pretrain", *TINY, *words), code).startswith(said)


@pytest.mark.slow
def test_error__of_another_rank_alone_is_said_with_its_number(colours: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    right = ["pretrain", *TINY, "--data", str(colours), "--out", str(tmp_path / "run"), "--steps", "1"]
    script.write_text(
        f"import os, sys\nfrom dmjd.cli import main\nbad = ['--epochs', 'nan'] * (os.environ['RANK'] == '1')\n"
        f"sys.exit(main([*{right!r}, *bad]))\n"
    )
    line = fails(torchrun(2, str(script)), 2)
    assert line == "error (process 1): epochs nan is out of range; choose 1e-06 to 1000000"


def test_stop__spares_a_process_that_only_has_the_number_of_a_rank() -> None:
    """Of a rank that has ended, or of one on another host of the same name."""
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other, subprocess.Popen(command, stdin=-1) as rank:
        started = Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[19]
        ranks = [this_process(0)._replace(pid=other.pid, started="1")]
        _stop([*ranks, this_process(1)._replace(pid=rank.pid, started=started)])
        assert rank.wait(10) == -signal.SIGTERM
        assert other.poll() is None
        other.communicate(b"\n", 10)
    assert other.returncode == 0
