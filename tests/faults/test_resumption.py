"""A resumed run is the unbroken one bit by bit: losses, weights, what the optimizer keeps, the order of the images."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_faults import Breaker, backbone, curve, flags, one_line, resumption, write_images

from dmjd.cli import main
from dmjd.data.masked import MaskedBatch
from dmjd.engine import checkpoint
from dmjd.engine.trainer import Trainer

STEPS = 12
EPOCH = 4  # steps: 64 images, 16 a step
SHORT = {"steps": STEPS, "monitor__evals": 0, "monitor__saves": 1, "monitor__max_images": 8}
Seen = list[tuple[list[int], list[int]]]  # indices and seeds of every micro-batch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = write_images(tmp_path_factory.mktemp("data") / "images", 64)
    os.utime(images, (1e9, 1e9))  # listings of young folders are made again
    return images


def train(words: list[str], *, stop_after: int | None = None) -> Seen:
    """Run a command, perhaps until a signal after a step; return what the steps that count have seen."""
    seen: Seen = []
    look_around, steps = Trainer.look_around, Trainer.steps

    def watched(self: Trainer, samples, collate, objective) -> Iterator:  # type: ignore[no-untyped-def]
        def noting(model, batch: MaskedBatch):  # type: ignore[no-untyped-def]
            seen.append((batch.indices.tolist(), batch.seeds.tolist()))
            return objective(model, batch)

        return steps(self, samples, collate, noting)

    def stopping(self: Trainer, step):  # type: ignore[no-untyped-def]
        if step.number == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return look_around(self, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "steps", watched)
        patched.setattr(Trainer, "look_around", stopping)
        assert main(words) == (143 if stop_after else 0)
    return seen


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Seen]]:
    """An unbroken run for every number of parts of a step."""
    runs = {}
    for parts in (1, 2):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        runs[parts] = out, train(flags(data, out, optim__accumulation=parts, **SHORT))
    return runs


def assert_same(out: Path, whole: Path) -> None:
    assert curve(out) == curve(whole)
    assert backbone(out) == backbone(whole)
    final = f"step-{STEPS:08d}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / final / name) for run in (out, whole))
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "step",
    [
        *(1, EPOCH - 1, EPOCH, 2 * EPOCH, STEPS - 1),
        *(pytest.param(step, marks=pytest.mark.slow) for step in (2, EPOCH + 1, STEPS - 2)),
    ],
)
def test_resume__after_any_step_it_is_the_unbroken_run_bit_by_bit(
    data: Path, unbroken: dict[int, tuple[Path, Seen]], tmp_path: Path, step: int, parts: int, workers: int
) -> None:
    whole, expected = unbroken[parts]
    out = tmp_path / "run"
    seen = train(flags(data, out, optim__accumulation=parts, workers=workers, **SHORT), stop_after=step)
    assert len(seen) == step * parts
    seen += train([*resumption(data, out), "--workers", str(workers)])
    assert seen == expected
    assert_same(out, whole)


@pytest.fixture(scope="module")
def writes(data: Path, unbroken: dict[int, tuple[Path, Seen]], tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many file operations a run has, after the first one, which also keeps the listing of the images."""
    with pytest.MonkeyPatch.context() as patched:
        breaker = Breaker(0, patched)
        assert main(flags(data, tmp_path_factory.mktemp("count") / "run", **SHORT)) == 0
    return breaker.calls


@pytest.mark.parametrize(
    "tenth", [pytest.param(tenth, marks=pytest.mark.slow) if tenth % 3 else tenth for tenth in range(10)]
)
def test_pretrain__a_disk_that_is_full_at_any_point_is_one_line_and_later_the_run_ends_as_if_unbroken(
    data: Path,
    unbroken: dict[int, tuple[Path, Seen]],
    writes: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tenth: int,
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        Breaker(1 + round(tenth * (writes - 2) / 9), patched)  # the first run made a folder more
        assert main(flags(data, out, **SHORT)) == 6
    assert "No space left on device" in one_line(capsys)
    begun = (out / "config.yaml").exists()
    assert main(resumption(data, out) if begun else flags(data, out, **SHORT)) == 0
    assert_same(out, unbroken[1][0])
    assert checkpoint.latest(out / "checkpoints") == out / "checkpoints" / f"step-{STEPS:08d}"


def test_pretrain__a_directory_that_may_not_be_written_is_one_line_and_exit_code_6(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere but where the system makes the files
        locked = Path("/sys")
    assert main(flags(data, locked / "run", **SHORT)) == 6
    assert f"; {locked / 'run'}; check disk and permissions" in one_line(capsys)
    assert not (locked / "run").exists()
