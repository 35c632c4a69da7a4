"""Accuracy of the counts and times of `dmjd plan` against real steps: FLOP, peak memory, and time after a measurement.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --out docs/results/plan/cpu.json

Each case is counted, then trained on noise in its own process on the CPU. FLOP are those of torch's counter over a real
step. The peak is the growth of the process's own memory (VmHWM minus RssFile, minus its value before building the
network). Time is the CPU time of one thread: `plan`'s measurement fits a line through steps of two batch sizes, which
is compared with steps of a third size in another process.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmjd.cli import settings_of
from dmjd.planning.trial import Bench, Trial
from dmjd.planning.work import FORMULAS, count
from dmjd.tasks.plan import parts_of

CASES: dict[str, dict[str, Any]] = {  # settings, and the batch sizes of the three steps: two measured, one predicted
    "ViT small, mae": {"preset": "mae", "model__size": "small", "batches": (4, 16, 12)},
    "ViT base, dm": {"preset": "dm", "model__size": "base", "batches": (2, 8, 6)},
    "hybrid tiny, dmjd": {"preset": "dmjd", "model__size": "tiny", "batches": (2, 8, 6)},
    "hybrid small, dmjd": {"preset": "dmjd", "model__size": "small", "batches": (2, 8, 6)},
}
ROLES = ("measured", "foretold")


def work(name: str, role: str) -> dict[str, Any]:
    """Run the steps of a case in this process."""
    given = dict(CASES[name])
    few, many, between = given.pop("batches")
    made = parts_of(settings_of("plan", images=1, precision="fp32", device="cpu", **given))
    cpu = torch.device("cpu")
    counted = count(made, precision="fp32", on_gpu=False)
    bench = Bench(made, cpu, "fp32", clock=time.process_time)
    bench.step(1)
    if role == "foretold":
        return {"batch": between, "seconds": bench.timed(between, 0.0).seconds}
    small, large = (bench.timed(batch, 0.0) for batch in (few, many))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        bench.step(few)
    trial = Trial(small, large, many)
    return {
        "gflop": counter.get_total_flops() / few / 1e9,
        "gflop_counted": counted.flops / 1e9,
        "batch": many,
        "peak_mib": (large.memory or 0.0) / 2**20,
        "peak_mib_counted": counted.memory(many) / 2**20,
        "seconds_foretold": trial.step + between * trial.image,
    }


def line(name: str) -> dict[str, Any]:
    """Run a case in two processes, and combine their results."""
    found: dict[str, Any] = {"case": name}
    for role in ROLES:
        done = subprocess.run(
            [sys.executable, __file__, "--case", name, "--role", role], check=True, capture_output=True, text=True
        )
        found[role] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(found: dict[str, Any]) -> str:
    """Format a line of the table."""
    measured, foretold = found["measured"], found["foretold"]
    pairs = (
        (f"{measured['gflop']:.2f}", f"{measured['gflop_counted']:.2f}", measured["gflop_counted"] / measured["gflop"]),
        (
            f"{measured['peak_mib']:,.0f}",
            f"{measured['peak_mib_counted']:,.0f}",
            measured["peak_mib_counted"] / measured["peak_mib"],
        ),
        (
            f"{foretold['seconds']:.2f}",
            f"{measured['seconds_foretold']:.2f}",
            measured["seconds_foretold"] / foretold["seconds"],
        ),
    )
    cells = [cell for real, said, share in pairs for cell in (real, f"{said} ({share - 1:+.1%})")]
    return f"| {found['case']} | {measured['batch']} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--case", choices=CASES, help="do one case here")
    parser.add_argument("--role", choices=ROLES)
    arguments = parser.parse_args()
    if arguments.role:
        print(json.dumps(work(arguments.case, arguments.role)))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cases": []}
    print("| step | images | GFLOP an image | counted | peak, MiB | counted | CPU seconds | foretold |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in [arguments.case] if arguments.case else CASES:
        found["cases"].append(line(name))
        print(row(found["cases"][-1]), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
