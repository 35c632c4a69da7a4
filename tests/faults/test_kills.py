"""Killed at random moments and resumed, a run of every verb that trains ends as if nobody had killed it."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefork import Dmjd

sys.path.insert(0, str(Path(__file__).parents[1] / "equality"))
from runs import COMMANDS, paint, read

from dmjd.cli import main
from dmjd.engine import checkpoint

STEPS = 24
SAVES = {"ema": "--monitor.saves", "finetune": "--log.saves", "segment": "--log.saves", "detect": "--log.saves"}
SPAN = 2.5  # seconds after which a run that has claimed its directory is killed at the latest


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    paint(root)
    return root


def line(verb: str, drawn: Path, out: Path) -> list[str]:
    words = [word.replace("{}", str(drawn)) for word in COMMANDS[verb]]
    words += ["--steps", str(STEPS), SAVES[verb], "8", "--out", str(out)]
    return [*words, "--device", "cpu", "--workers", "0", "--precision", "fp32"]


def kill_at_random(words: list[str], out: Path, delay: float) -> int:
    """Start a run, kill it so long after it has claimed its directory, and return its exit code."""
    process = Dmjd(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    owner = f"process {process.pid} "
    while process.poll() is None and not ((out / ".lock").exists() and owner in (out / ".lock").read_text()):
        time.sleep(0.02)
    time.sleep(delay)
    process.kill()
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


def killed_and_resumed(verb: str, drawn: Path, folder: Path, kills: int) -> int:
    """Kill a run until it is done, again and again until there were so many kills; return how many there were."""
    whole = folder / "whole"
    assert main(line(verb, drawn, whole)) == 0
    expected, done, chain, random_delay = read(whole / "metrics.jsonl"), 0, 0, random.Random(verb)
    while done < kills:
        out, newest = folder / f"chain-{chain}", 0
        chain += 1
        while done < kills:
            words = line(verb, drawn, out) + ["--resume"] * out.exists()
            if kill_at_random(words, out, random_delay.uniform(0, SPAN)) == 0:
                break
            done += 1
            kept = checkpoint.latest(out / "checkpoints")
            reached = checkpoint.read_state(kept)["step"] if kept else 0
            assert reached >= newest
            newest = reached
        assert main([*line(verb, drawn, out), "--resume"]) == 0
        assert read(out / "metrics.jsonl") == expected
        assert not list((out / "checkpoints").glob(".*"))
    return done


@pytest.mark.parametrize(
    "verb", ["detect", *(pytest.param(verb, marks=pytest.mark.long) for verb in ("ema", "finetune", "segment"))]
)
def test_verbs__killed_at_random_and_resumed_they_end_as_if_unbroken(drawn: Path, tmp_path: Path, verb: str) -> None:
    assert killed_and_resumed(verb, drawn, tmp_path, kills=4) == 4


@pytest.mark.slow
@pytest.mark.parametrize("verb", SAVES)
def test_verbs__killed_75_times_each(drawn: Path, tmp_path: Path, verb: str) -> None:
    assert killed_and_resumed(verb, drawn, tmp_path, 75) == 75
