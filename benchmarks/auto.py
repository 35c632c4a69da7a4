"""Results of `--preset auto` on various images: sets x minutes x seeds, against `quick` and an untrained network.

    python benchmarks/auto.py run IMAGES OUT [--minutes 5 15 60] [--seeds 2] [--cores 2] [--sets clothing camvid]
    python benchmarks/auto.py table

IMAGES holds cifar10/ and clothing/ (train/CLASS/IMAGE, test/CLASS/IMAGE), camvid/ (images/train/, annotations/train/)
and bccd/ (containing a Pascal VOC folder). A network is pre-trained on the training images of a set without their
labels, and evaluated with the program's defaults: a linear probe, fine-tuning with a tenth and with all of the labels,
mIoU of segmentation or AP of detection. Every result is a file in docs/results/auto, and docs/results/auto.md is the
table; results that exist are not computed again, so a run may be interrupted. Minutes are those of two cores: one core
gets twice as many.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
FOLDER = RESULTS / "auto"
# Number of training images per class of each set, in the order of their names; None for all.
CLASSES: dict[str, tuple[str, int | None]] = {
    "clothing": ("clothing", None),
    "clothing-1000": ("clothing", 100),
    "cifar10-10000": ("cifar10", 1000),
    "cifar10-50000": ("cifar10", None),
}
DENSE = {
    "camvid": ("segment --preset camvid --ignore_index 11", "miou"),
    "bccd": ("detect --preset bccd", "map"),
}
SETS = ("clothing", "camvid", "bccd", "cifar10-10000", "clothing-1000", "cifar10-50000")  # in the order of rows
FEATURES = {"explained": 2, "rankme": 1}  # and the digits that the table has of them
MEASURES = {"linear": "linear", "tuned-0.1": "tuned, 10 %", "tuned-1": "tuned, all", "dense": "mIoU or AP"}


class Bench:
    """Locations of images and runs, and the number of cores to use."""

    def __init__(self, images: Path, out: Path, cores: int):
        self.images, self.out, self.cores = images.resolve(), out.resolve(), cores

    def dmjd(self, words: str, out: Path, **paths: object) -> dict[str, Any]:
        """Run or resume a verb; return its results."""
        done = out / ("summary.json" if words.startswith("pretrain") else "result.json")
        if not done.exists():
            print(words, *paths.values(), flush=True)
            command = [sys.executable, "-m", "dmjd.cli", *words.split(), "--out", str(out)]
            command += ["--resume"] if (out / "checkpoints").exists() else []
            command += [word for name, path in paths.items() for word in (f"--{name}", str(path))]
            environment = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return dict(json.loads(done.read_text()))

    def training_images(self, name: str) -> Path:
        """Link the images allowed for pre-training into a flat folder, so that nothing reveals their classes."""
        folder = self.out / "images" / name
        if folder.exists():
            return folder
        part = folder.with_name(f"{name}.part")
        part.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(self.paths(name)):
            link = part / f"{number:05}{path.suffix}"
            if not link.exists():
                link.symlink_to(path)
        return part.rename(folder)

    def paths(self, name: str) -> list[Path]:
        """List the training images of a set."""
        if name == "camvid":
            return sorted((self.images / "camvid" / "images" / "train").iterdir())
        if name == "bccd":
            names = (self.voc / "ImageSets" / "Main" / "train.txt").read_text().split()
            return [self.voc / "JPEGImages" / f"{each}.jpg" for each in names]
        source, count = CLASSES[name]
        classes = sorted(each for each in (self.images / source / "train").iterdir() if each.is_dir())
        return [path for each in classes for path in sorted(each.iterdir())[:count]]

    @property
    def voc(self) -> Path:
        """Find the folder of BCCD's images and boxes."""
        return next((self.images / "bccd").rglob("JPEGImages")).parent

    def labelled(self, name: str) -> Path:
        """Find the set with its labels; for a part of a set, write a list of that part and of the held-out images."""
        if name in DENSE:
            return self.voc if name == "bccd" else self.images / name
        source, count = CLASSES[name]
        if count is None:
            return self.images / source
        table = self.out / "images" / f"{name}.csv"
        judged = [path for part in ("validation", "test") for path in (self.images / source / part).glob("*/*")]
        rows = [(path, "train") for path in self.paths(name)] + [(path, path.parent.parent.name) for path in judged]
        table.write_text("path,label,split\n" + "".join(f"{each},{each.parent.name},{part}\n" for each, part in rows))
        return table

    def pretrain(self, name: str, recipe: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """Pre-train by a recipe; return the folder of the run and its summary."""
        run = self.out / f"{name}-{recipe}-{seed}"
        preset, _, minutes = recipe.partition("-")
        words = f"pretrain --preset {preset} --seed {seed}"
        if minutes:
            words += f" --minutes {float(minutes) * 2 / self.cores:g}"
        summary = self.dmjd(words, run / "pretrain", data=self.training_images(name))
        return run, summary

    def judge(self, name: str, backbone: Path, run: Path, seed: int, more: str = "") -> dict[str, float]:
        """Evaluate a backbone on the tasks that its set has labels for, in percent."""
        labelled, start = self.labelled(name), f"--seed {seed} {more}"
        if name in DENSE:
            verb, measure = DENSE[name]
            found = self.dmjd(f"{verb} {start}", run / "dense", data=labelled, backbone=backbone)
            return {"dense": 100 * found[measure]}
        scores = {}
        for judged, words in (
            ("linear", "linear"),
            ("tuned-0.1", "finetune --log.evals 0 --fraction 0.1"),
            ("tuned-1", "finetune --log.evals 0"),
        ):
            found = self.dmjd(f"{words} {start}", run / judged, data=labelled, backbone=backbone)
            scores[judged] = 100 * found["top1"]
        return scores

    def do(self, name: str, recipe: str, seed: int, source: str) -> None:
        """Pre-train, evaluate and store one row; an untrained network has the shape that recipe `source` chooses."""
        run, summary = self.pretrain(name, source, seed)
        backbone, when = run / "pretrain" / "backbone.safetensors", "trained"
        if recipe == "untrained":
            run, when = run.with_name(f"{name}-{recipe}-{seed}"), "untrained"
        scores = self.judge(name, backbone, run, seed, "--untrained" if recipe == "untrained" else "")
        kept = ("seconds", "steps", "parameters", "verdict") if when == "trained" else ("parameters",)
        epochs = {"epochs": round(summary["images"] / summary["num_images"], 1)} if when == "trained" else {}
        found = {
            "set": name,
            "recipe": recipe,
            "seed": seed,
            "cores": self.cores,
            "scores": {key: round(value, 2) for key, value in scores.items()},
            "features": summary[when],
            **{key: summary[key] for key in kept},
            **epochs,
            "environment": summary["environment"],
        }
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{name}-{recipe}-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
        write_table()


def rows(sets: list[str], minutes: list[float], seeds: int) -> Iterator[tuple[str, str, int]]:
    """Iterate over the rows, the most informative first."""
    for seed, length in itertools.product(range(seeds), minutes):
        for name in sets:
            yield name, f"auto-{length:g}", seed
            if length == minutes[0]:
                yield name, "untrained", seed
                yield name, "quick", seed


def write_table() -> None:
    """Write existing results, a line for each set and recipe: means over seeds."""
    found = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    order = {name: place for place, name in enumerate(SETS)}
    keys = sorted({(each["set"], each["recipe"]) for each in found}, key=lambda key: (order[key[0]], place(key[1])))
    head = ["set", "recipe", "cores", "seeds", "epochs", "steps", "explained", "RankMe", *MEASURES.values(), "verdict"]
    lines = [head, ["---"] * len(head)]
    for name, recipe in keys:
        runs = [each for each in found if (each["set"], each["recipe"]) == (name, recipe)]
        features = [mean([run["features"].get(key) for run in runs], digits) for key, digits in FEATURES.items()]
        scores = [mean([run["scores"].get(key) for run in runs], 1) for key in MEASURES]
        lengths = [mean([run.get(key) for run in runs], 0) for key in ("epochs", "steps")]
        verdicts = ", ".join(sorted({run["verdict"]["kind"] for run in runs if "verdict" in run}))
        cores = ", ".join(sorted({str(run["cores"]) for run in runs}))
        lines.append([name, recipe, cores, str(len(runs)), *lengths, *features, *scores, verdicts])
    said = "Percent, means over seeds; `auto-5` had 5 minutes of two cores, or twice as many of one.\n"
    said += "Written by `python benchmarks/auto.py table` from the files of [auto](auto).\n"
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (RESULTS / "auto.md").write_text(f"# Preset auto\n\n{said}\n{table}\n")


def place(recipe: str) -> float:
    """Order recipes: untrained, quick, then auto by its minutes."""
    return {"untrained": -2.0, "quick": -1.0}.get(recipe) or float(recipe.partition("-")[2])


def mean(values: list[float | None], digits: int) -> str:
    """Format the mean of existing values, and their range."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    spread = f" ({min(there):.{digits}f}..{max(there):.{digits}f})" if len(there) > 1 else ""
    return f"{statistics.mean(there):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table")
    run = verbs.add_parser("run")
    run.add_argument("images", type=Path)
    run.add_argument("out", type=Path)
    run.add_argument("--minutes", type=float, nargs="*", default=[5, 15, 60])
    run.add_argument("--seeds", type=int, default=2)
    run.add_argument("--cores", type=int, choices=(1, 2), default=2)
    run.add_argument("--sets", nargs="*", choices=SETS, default=SETS)
    given = parser.parse_args()
    if given.verb == "table":
        write_table()
        return
    bench = Bench(given.images, given.out, given.cores)
    for name, recipe, seed in rows(given.sets, given.minutes, given.seeds):
        if not (FOLDER / f"{name}-{recipe}-{seed}.json").exists():
            bench.do(name, recipe, seed, f"auto-{given.minutes[0]:g}" if recipe == "untrained" else recipe)


if __name__ == "__main__":
    main()
