"""Does a long run leak? Training, evaluation and saving for hours, monitored from outside.

    python benchmarks/soak.py OUT [--minutes 120] [--data DATA] [--threads 2]

One `dmjd pretrain` of a tiny network with a loader process evaluates and saves every hundred steps until it is stopped
by SIGTERM. Sampled every ten seconds: resident memory of the process and of all its processes together, open files and
threads; the time of a step from metrics.jsonl; and its CPU time, which other work on the machine affects less: what the
process used in five minutes, divided by the steps in them, with their evaluations and checkpoints.

The table has the slope of each per hour (Theil and Sen: the median slope of all pairs of samples, with its 95 %
interval), after the first fifth of the time, in which pools fill. Consecutive samples are correlated, so the intervals
are somewhat too narrow. All samples are written to OUT/samples.csv.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from scipy.stats import theilslopes

EVERY = 10.0  # seconds
WARM = 0.2  # share of the time at the start that is ignored
STEPS, EACH = 1_000_000, 100  # more steps than fit the time; between two evaluations, and two checkpoints
STOPPED = 143  # exit code
TINY = """
    --preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 64 --model.depth 4 --model.num_heads 2
    --decoder.embed_dim 32 --decoder.depth 1 --decoder.num_heads 2 --batch_size 64 --device cpu --precision fp32
    --workers 1 --data_on_device no --monitor.log_every 20 --monitor.max_images 500 --monitor.max_share 100
""".split()  # noqa: SIM905 (as it is typed)
NAMES = {
    "rss_mib": "memory, MiB",
    "tree_rss_mib": "memory of all processes, MiB",
    "open_files": "open files",
    "threads": "threads",
    "processes": "processes",
}
COLUMNS = ("seconds", *NAMES, "cpu_seconds", "steps")
WINDOW = 30  # number of samples over which the CPU time of a step is averaged


def start(out: Path, data: str, threads: int) -> subprocess.Popen[bytes]:
    """Start a run that does not end by itself."""
    counts = ["--steps", str(STEPS), "--monitor.evals", str(STEPS // EACH), "--monitor.saves", str(STEPS // EACH)]
    command = [sys.executable, "-m", "dmjd", "pretrain", *TINY, "--data", data, "--out", str(out), *counts]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines(out: Path) -> list[dict[str, float]]:
    """Read the metrics of a run, except for a line that is being written."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def look(process: psutil.Process, began: float, out: Path) -> tuple[float, ...]:
    """Take one sample; the resident memory of several processes counts shared memory more than once."""
    with process.oneshot():
        rss, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
        times = process.cpu_times()
    children = process.children(recursive=True)
    tree = rss
    for child in children:
        try:
            tree += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    steps = max((values["step"] for values in lines(out)), default=0)
    used = times.user + times.system
    return time.monotonic() - began, rss / 2**20, tree / 2**20, files, threads, 1 + len(children), used, steps


def watch(run: subprocess.Popen[bytes], minutes: float, out: Path) -> list[tuple[float, ...]]:
    """Take a sample every ten seconds until the time is over, then stop the run."""
    samples, began, process = [], time.monotonic(), psutil.Process(run.pid)
    while time.monotonic() - began < 60 * minutes:
        time.sleep(EVERY)
        if run.poll() is not None:
            sys.exit(f"the run has ended by itself; exit code {run.returncode}")
        samples.append(look(process, began, out))
    run.terminate()
    if run.wait() != STOPPED:
        sys.exit(f"the run did not stop as it should; exit code {run.returncode}")
    return samples


def row(name: str, hours: Sequence[float], values: Sequence[float]) -> str:
    """Write a line of the table: the slope with its interval, after the warm-up."""
    hours, values = np.array(hours), np.array(values)
    steady = hours >= WARM * hours[-1]
    slope, _, low, high = theilslopes(values[steady], hours[steady], 0.95)
    middle = np.median(values[steady])
    return (
        f"| {name} | {middle:.4g} | {values[steady].min():.4g} | {values[steady].max():.4g} | "
        f"{slope:+.3g} ({low:+.3g} .. {high:+.3g}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    samples = watch(start(options.out, options.data, options.threads), options.minutes, options.out)
    with (options.out / "samples.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *samples])
    metrics = lines(options.out)
    steppings = [values for values in metrics if "loss" in values]
    by_name = dict(zip(COLUMNS, zip(*samples, strict=True), strict=True))
    hours = [seconds / 3600 for seconds in by_name.pop("seconds")]
    print(f"{hours[-1] * 60:.1f} minutes, {steppings[-1]['step']} steps,", end=" ")
    print(f"{len(metrics) - len(steppings)} evaluations, {len(samples)} samples\n")
    print("| | median | lowest | highest | slope per hour (95 %) |\n|---|---|---|---|---|")
    for key, name in NAMES.items():
        print(row(name, hours, by_name[key]))
    milliseconds = [64e3 / values["images_per_second"] for values in steppings]
    print(row("a step, ms", [values["seconds"] / 3600 for values in steppings], milliseconds))
    if len(samples) < 3 * WINDOW:
        return
    used, steps = (np.array(by_name[key])[::WINDOW] for key in ("cpu_seconds", "steps"))
    print(row("a step, ms of CPU time", hours[::WINDOW][1:], 1000 * np.diff(used) / np.diff(steps)))


if __name__ == "__main__":
    main()
