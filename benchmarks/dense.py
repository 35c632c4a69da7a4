"""The benefit of pre-training for segmentation and detection on two cores: CamVid and BCCD, three starts, four seeds.

    python benchmarks/dense.py CAMVID BCCD CLOTHING OUT

CAMVID has images/ and annotations/, BCCD is a Pascal VOC folder, CLOTHING has a larger set of photographs. A small ViT
is pre-trained for the same number of steps on the training images of each task and on the photographs; then every task
is trained for the same number of steps from random weights, from weights of its own images and from weights of the
photographs. Every run takes one core. Runs that exist are not repeated. The table is OUT/table.md; each line of
OUT/runs.jsonl has the settings, results and results by class of a run; the pictures are OUT/TASK.jpg.
"""

import argparse
import base64
import csv
import io
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image

PRETRAIN = """--preset mae --model.size tiny --model.embed_dim 128 --model.depth 6 --model.num_heads 4
--model.image_size 128 --model.patch_size 8 --decoder.embed_dim 96 --decoder.depth 2 --decoder.num_heads 3
--batch_size 64 --steps 900 --optim.blr 2e-3 --optim.warmup_epochs 1 --workers 0"""
TASKS = {
    "camvid": ("segment --preset camvid --ignore_index 11 --precision bf16", ("miou", "pixel_accuracy")),
    "bccd": ("detect --preset bccd --precision bf16", ("map", "map50")),
}
STARTS = ("random", "own", "clothing")
SEEDS = (0, 1, 2, 3)
SHOWN = (1, 4, 6)  # of the eight held-out images of a report


def dmjd(words: str, out: Path, **paths: Path) -> dict:
    """Run a verb on one core unless its results exist; return its results."""
    done = out / ("summary.json" if words.startswith("pretrain") else "result.json")
    if not done.exists():
        print(words, paths, flush=True)
        command = [sys.executable, "-m", "dmjd.cli", *words.split(), "--out", str(out), "--device", "cpu"]
        command += ["--resume"] if (out / "checkpoints").exists() else []
        command += [word for name, path in paths.items() for word in (f"--{name}", str(path))]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return json.loads(done.read_text())


def training_images(bccd: Path, folder: Path) -> Path:
    """Link the images of the training part into a folder, since pre-training must not see the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (bccd / "ImageSets" / "Main" / "train.txt").read_text().split():
        if not (folder / f"{name}.jpg").exists():
            (folder / f"{name}.jpg").symlink_to((bccd / "JPEGImages" / f"{name}.jpg").resolve())
    return folder


def lines(folder: Path) -> list[dict]:
    """Read the metrics that a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spread_of(values: list[float]) -> str:
    """Format mean and standard deviation, and the values themselves."""
    each = " ".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({each})"


def keep(out: Path) -> None:
    """Write settings and results of all runs to one file."""
    kept = []
    for config in sorted(out.glob("*/config.yaml")):
        folder = config.parent
        done = next(folder / name for name in ("summary.json", "result.json") if (folder / name).exists())
        run = {
            "run": folder.name,
            "settings": yaml.safe_load(config.read_text()),
            "found": json.loads(done.read_text()),
        }
        run["evaluations"] = [line for line in lines(folder) if "lr" not in line]
        if (folder / "per_class.csv").exists():
            with (folder / "per_class.csv").open(newline="") as file:
                run["classes"] = list(csv.DictReader(file))
        kept.append(json.dumps(run) + "\n")
    (out / "runs.jsonl").write_text("".join(kept))


def draw(task: str, out: Path) -> None:
    """Draw some held-out images in rows: image, truth, and the predictions from every start (seed 0)."""
    rows: list[list[Image.Image]] = [[] for _ in SHOWN]
    for start in STARTS:
        page = (out / f"{task}-{start}-0" / "report.html").read_text()
        pictures = [base64.b64decode(each) for each in re.findall(r'data:image/jpeg;base64,([^"]+)', page)]
        for row, number in zip(rows, SHOWN, strict=True):
            shown = pictures[3 * number : 3 * number + 3]
            row += [Image.open(io.BytesIO(each)) for each in (shown[2:] if row else shown)]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", ((width + 6) * len(rows[0]) - 6, (height + 6) * len(rows) - 6), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            sheet.paste(picture, (left * (width + 6), top * (height + 6)))
    sheet.save(out / f"{task}.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("camvid", "bccd", "clothing", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    out, sets = given.out, {"camvid": given.camvid, "bccd": given.bccd}
    images = {
        "clothing": given.clothing,
        "camvid": given.camvid / "images" / "train",
        "bccd": training_images(given.bccd, out / "bccd-train"),
    }
    for name, folder in images.items():
        dmjd(f"pretrain {PRETRAIN}", out / f"pretrain-{name}", data=folder)
    rows = ["| task | start | seeds | minutes | | |", "|---|---|---|---|---|---|"]
    for task, (words, measures) in TASKS.items():
        for start in STARTS:
            pretrained = out / f"pretrain-{'clothing' if start == 'clothing' else task}" / "backbone.safetensors"
            untrained = " --untrained" if start == "random" else ""
            folders = [out / f"{task}-{start}-{seed}" for seed in SEEDS]
            runs = [
                dmjd(f"{words}{untrained} --seed {seed}", folder, data=sets[task], backbone=pretrained)
                for seed, folder in zip(SEEDS, folders, strict=True)
            ]
            found = (f"{name} {spread_of([100 * run[name] for run in runs])}" for name in measures)
            minutes = statistics.mean(lines(folder)[-1]["seconds"] for folder in folders) / 60
            rows.append(f"| {task} | {start} | {len(runs)} | {minutes:.1f} | {' | '.join(found)} |")
            (out / "table.md").write_text("\n".join(rows) + "\n")
        keep(out)
        draw(task, out)


if __name__ == "__main__":
    main()
