"""Processes that load images: killed, stopped, orphaned or hit by a signal, they end in time and in one line."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from prefork import Dmjd

from dmjd.data.crops import RandomCrop, center_crop
from dmjd.data.decode import Reduce, Wanted
from dmjd.data.folder import folder_images
from dmjd.data.loader import read_batches, train_batches
from dmjd.data.masked import MaskedSamples
from dmjd.data.sampler import StepSampler
from dmjd.data.source import View
from dmjd.data.workers import LOOK
from dmjd.errors import ConfigError, DataError

IN_TIME = 30  # seconds
small = partial(center_crop, size=(8, 8))
TINY = """pretrain --preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1
--model.num_heads 2 --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --steps 100000
--monitor.saves 10000 --monitor.evals 0 --monitor.max_images 16 --workers 2 --device cpu"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two sizes, which worker processes load."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number % 2, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def batches_of(folder: Path) -> Iterator[object]:
    crop = RandomCrop((16, 16), (0.3, 1.0), (0.75, 1.33), flip=True)
    samples = MaskedSamples(folder_images(folder, Wanted(3)), crop, 0)
    sampler = StepSampler(len(samples.images), 4, 0, 1_000_000, 0)
    return iter(train_batches(samples, sampler, None, workers=2, pin_memory=False))


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = process.children(recursive=True)
    return [child for child in found if any("spawn_main" in word for word in child.cmdline())]


def wait_until(condition: Callable[[], object], seconds: float = IN_TIME) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "was killed by signal 9, perhaps out of memory"), (signal.SIGSTOP, "was stopped")],
)
def test_train_batches__a_worker_killed_or_stopped_is_named_in_time(
    data: Path, number: signal.Signals, said: str
) -> None:
    batches = batches_of(data)
    next(batches)
    workers = workers_of(psutil.Process())
    assert len(workers) == 2
    workers[1].send_signal(number)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{said}.*process {workers[1].pid}.*--workers") as raised:
        deque(batches, maxlen=0)
    assert time.monotonic() - began < IN_TIME
    assert "\n" not in str(raised.value)
    del batches, raised
    wait_until(lambda: not alive(workers))


@pytest.mark.slow
def test_train_batches__a_worker_stopped_for_a_moment_goes_on(data: Path) -> None:
    batches = batches_of(data)
    next(batches)
    worker = workers_of(psutil.Process())[0]
    worker.suspend()
    time.sleep(LOOK / 2)
    worker.resume()
    assert len([next(batches) for _ in range(20)]) == 20
    assert alive([worker])


class SlowDisk(View):
    """Images on a disk that takes longer than two looks at the workers for one of them."""

    def read(self, index: int, reduce: Reduce | None = None) -> torch.Tensor:
        if index == 3:
            time.sleep(2.5 * LOOK)
        return super().read(index, reduce)


@pytest.mark.long
def test_read_batches__a_worker_that_waits_for_its_disk_is_waited_for(data: Path) -> None:
    images = SlowDisk(folder_images(data, Wanted(3)))
    read = read_batches(images, range(8), small, batch_size=4, workers=2, pin_memory=False)
    assert [kept for _, kept in read] == [[0, 1, 2, 3], [4, 5, 6, 7]]


STARTS = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_workers import batches_of
if __name__ == "__main__":
    print("starts", flush=True)
    for batch in batches_of(Path({data!r})):
        print("batch", flush=True)
"""


@pytest.mark.parametrize("after", ["starts", pytest.param("batch", marks=pytest.mark.slow)])
def test_train_batches__no_worker_outlives_its_parent(data: Path, tmp_path: Path, after: str) -> None:
    script = tmp_path / "starts.py"
    script.write_text(STARTS.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], data=str(data)))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith(after))
        parent = psutil.Process(process.pid)
        wait_until(lambda: len(workers_of(parent)) == 2, 120)
        workers = workers_of(parent)
        process.kill()
    wait_until(lambda: not alive(workers))


FAILS = """
from dmjd.data.workers import load_batches

class Samples:
    def __getitem__(self, key):
        return 1 // key

if __name__ == "__main__":
    list(load_batches(Samples(), [[0], [1]], list, workers=2, pin_memory=False))
"""


def test_load_batches__after_an_error_of_ours_in_a_worker_no_process_is_left(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    line = [sys.executable, str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=2 * IN_TIME, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_train_batches__too_little_shared_memory_is_one_line(data: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # which is that of files in /dev/shm, too
    try:
        with pytest.raises(
            ConfigError, match=r"too little memory to share with --workers; /dev/shm; give 0, or docker"
        ):
            next(batches_of(data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_train_batches__a_users_error_in_a_worker_is_the_line_it_is_without_workers(tmp_path: Path) -> None:
    for number in range(120):
        (tmp_path / f"{number:03d}.png").write_bytes(b"no image")
    with pytest.raises(DataError) as raised:
        next(batches_of(tmp_path))
    assert str(raised.value).startswith("100 images in a row do not decode; ")
    assert "\n" not in str(raised.value)


def run_until_signal(data: Path, out: Path, number: signal.Signals, *, training: bool) -> tuple[int, str]:
    """Send a signal to a run's whole group while its workers start, or after a checkpoint; exit code and stderr."""
    words = [*TINY.split(), "--data", str(data), "--out", str(out)]
    with Dmjd(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        assert process.stderr is not None
        if training:
            next(line for line in process.stderr if line.endswith("saved\n"))
        else:
            wait_until(lambda: len(workers_of(psutil.Process(process.pid))) == 2, 120)
        workers = workers_of(psutil.Process(process.pid))
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=120)
        wait_until(lambda: not alive(workers))
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("number", "training"),
    [
        (signal.SIGTERM, True),
        (signal.SIGHUP, False),
        *(
            pytest.param(number, training, marks=pytest.mark.slow)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
            for training in (True, False)
        ),
    ],
)
def test_pretrain__a_signal_to_the_group_stops_it_in_one_line_and_leaves_no_process(
    data: Path, tmp_path: Path, number: signal.Signals, training: bool
) -> None:
    code, stderr = run_until_signal(data, tmp_path / "run", number, training=training)
    lines = [line for line in stderr.splitlines() if not line.endswith(", saved") and not line.startswith("training: ")]
    assert code == 143, stderr
    assert len(lines) == 1, stderr
    assert f"stopped by {number.name}" in lines[0]
    assert "Traceback" not in stderr


def test_pretrain__a_killed_worker_ends_the_run_with_exit_code_2_and_one_line(data: Path, tmp_path: Path) -> None:
    words = [*TINY.split(), "--data", str(data), "--out", str(tmp_path / "run")]
    with Dmjd(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.endswith("saved\n"))
        workers = workers_of(psutil.Process(process.pid))
        workers[0].kill()
        began = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - began < IN_TIME
    lines = [line for line in stderr.splitlines() if not line.endswith(", saved") and not line.startswith("training: ")]
    assert process.returncode == 2, stderr
    assert len(lines) == 1, stderr
    assert "was killed by signal 9" in lines[0]
    wait_until(lambda: not alive(workers))
