"""Targets and views at equal time: pre-trains a small ViT on CIFAR-10 once per target, number of views and seed.

python benchmarks/packaged_teacher.py TEACHER.safetensors
python benchmarks/targets.py TEACHER.safetensors CIFAR10 OUT [--seconds 150] [--seeds 0 1 2] [--only RUN ...]

CIFAR10 is a folder train/CLASS/IMAGE and test/CLASS/IMAGE; every run takes one core. First the time of a step is
measured for every configuration in turns (OUT/times.json); it turns seconds into the steps of each run,
so that runs are comparable even if the machine is busy later. Runs that are there are not repeated; the table is
OUT/table.md, settings and results of every run are a line of OUT/runs.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import yaml

BATCH, EFFECTIVE_EPOCHS = 64, 2
COMMON = f"""--preset dm --model.size tiny --model.embed_dim 128 --model.depth 6 --model.num_heads 4
--model.image_size 32 --model.patch_size 4 --decoder.embed_dim 96 --decoder.depth 2 --decoder.num_heads 3
--decoder.mlp_ratio 4 --masking.block 1 --crop.scale 1 1 --crop.ratio 1 1
--optim.blr 2e-3 --optim.warmup_epochs 0.5 --batch_size {BATCH} --workers 0 --device cpu"""
TEACHER = "--masked.target {teacher} --teacher.layers 3"
EMA = "--masked.target ema --teacher.layers -1 --teacher.layers -2 --teacher.layers -3 --teacher.decay 0.99 0.999"
TARGETS = {
    "pixels": "--masked.target normalized_pixels",
    "hog": "--masked.target hog",
    "teacher": TEACHER,
    "ema": EMA,
}
AT_EQUAL_TIME = (
    {name: f"{flags} --visible.weight 0" for name, flags in TARGETS.items()}
    | {f"{name}-visible": f"{flags} --visible.weight 1" for name, flags in TARGETS.items()}
    | {
        "pixels-visible-teacher": "--masked.target normalized_pixels --visible.target {teacher} "
        "--teacher.layers 3 --visible.weight 1",
        "teacher-visible-misaligned": f"{TEACHER} --visible.weight 1 --visible.no-aligned",
    }
)
VIEWS = {
    "1": "--masking.num_views 1 --masking.predict_ratio 0.6",
    "2": "",
    "4": "--masking.num_views 4",
    "4-of-0.75": "--masking.num_views 4 --masking.mask_ratio 0.75",
}
OF_VIEWS = {f"teacher-views-{views}": f"{TEACHER} --visible.weight 0 {flags}" for views, flags in VIEWS.items()}


def pretrain(data: str, out: Path, flags: str, **more: object) -> None:
    """Run `dmjd pretrain` on one core."""
    words = [*COMMON.split(), *flags.split(), "--data", data, "--out", str(out)]
    words += [word for key, value in more.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "dmjd.cli", "pretrain", *words, "--resume"], check=True, env=environment)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measure_times(data: str, out: Path, configurations: dict[str, str]) -> dict[str, float]:
    """Time a step of every configuration: the median over three short runs of each, in turns."""
    if (out / "times.json").exists():
        return json.loads((out / "times.json").read_text())
    seconds: dict[str, list[float]] = {name: [] for name in configurations}
    for turn in range(3):
        for name, flags in configurations.items():
            run = out / "times" / f"{name}-{turn}"
            pretrain(data, run, flags, steps=12, monitor__log_every=1, monitor__max_images=20, monitor__evals=0)
            at = [line["seconds"] for line in lines(run) if "loss" in line]
            seconds[name] += [after - before for before, after in pairwise(at)]
    times = {name: statistics.median(values) for name, values in seconds.items()}
    (out / "times.json").write_text(json.dumps(times, indent=1))
    return times


def main() -> None:
    """Measure, train, and write the table after every run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=150, help="of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*AT_EQUAL_TIME, *OF_VIEWS], help="at equal time; default: all")
    given = parser.parse_args()
    data, out = given.data, given.out
    out.mkdir(parents=True, exist_ok=True)
    fill = {name: flags.format(teacher=given.teacher) for name, flags in (AT_EQUAL_TIME | OF_VIEWS).items()}
    times = measure_times(data, out, fill)
    images = sum(1 for _ in Path(data, "train").rglob("*.*"))
    chosen = given.only or [name for name in fill if name != "teacher-views-2"]  # which is the same as `teacher`
    for seed in given.seeds:
        for name in chosen:
            run(data, out / f"{name}-{seed}", fill[name], seed, round(given.seconds / times[name]))
            write_table(out, times)
        for views, number in (("1", 1), ("2", 2), ("4", 4), ("4-of-0.75", 4)) if not given.only else ():
            steps = round(EFFECTIVE_EPOCHS * images / number / BATCH)
            name = f"teacher-views-{views}"
            run(data, out / f"{name}-equal-epochs-{seed}", fill[name], seed, steps)
            write_table(out, times)


def run(data: str, out: Path, flags: str, seed: int, steps: int) -> None:
    if not (out / "summary.json").exists():
        print(out.name, steps, "steps", flush=True)
        more = {"monitor__max_images": 5000, "monitor__evals": 0, "monitor__saves": 2, "monitor__log_every": 20}
        pretrain(data, out, flags, seed=seed, steps=steps, **more)


def write_table(out: Path, times: dict[str, float]) -> None:
    """Write mean and standard deviation over the seeds that are done."""
    done: dict[str, list[dict]] = {}
    kept = []
    for summary in sorted(out.glob("*/summary.json")):
        name = summary.parent.name.rpartition("-")[0]
        shares = [line["target_share"] for line in lines(summary.parent) if "target_share" in line]
        found = json.loads(summary.read_text())
        done.setdefault(name, []).append(found | {"target_shares": shares})
        settings = yaml.safe_load((summary.parent / "config.yaml").read_text())
        kept.append({"run": summary.parent.name, "summary": found, "target_shares": shares, "settings": settings})
    (out / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    rows = [
        "| run | seeds | step, s | steps | seconds | effective epochs | k-NN | linear | share of targets |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in done.items():
        step = times[name.replace("-equal-epochs", "")]
        views = int(name.split("-")[2]) if "-views-" in name else 2
        first = runs[0]
        epochs = first["images"] * views / first["num_images"]
        knn, linear = (spread_of([run["trained"][key] for run in runs]) for key in ("knn_top1", "linear_top1"))
        share = statistics.median(share for run in runs for share in run["target_shares"])
        seconds = step * first["steps"]
        cells = [name, len(runs), f"{step:.3f}", first["steps"], f"{seconds:.0f}", f"{epochs:.1f}", knn, linear]
        rows.append(f"| {' | '.join(map(str, cells))} | {share:.0%} |")
    before = [run["untrained"] for runs in done.values() for run in runs]
    knn, linear = (spread_of([run[key] for run in before]) for key in ("knn_top1", "linear_top1"))
    rows.append(f"| untrained | | | 0 | 0 | 0 | {knn} | {linear} | |")
    (out / "table.md").write_text("\n".join(rows) + "\n")


def spread_of(shares: list[float]) -> str:
    """Write mean and standard deviation in percent."""
    deviation = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{deviation}"


if __name__ == "__main__":
    main()
