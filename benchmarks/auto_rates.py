"""The learning rate of `--preset auto`: the same run at several multiples of the rate that it chooses.

    python benchmarks/auto_rates.py run DATA OUT --epochs 17 [--factors 1 3 6] [--seeds 1]
    python benchmarks/auto_rates.py table

DATA is a folder of labelled images in parts. The number of epochs is given, so that runs differ only in the learning
rate and do not depend on the speed of the machine. They are evaluated by logistic regression on the features of all
images of all parts, with five-fold cross-validation and the best of five penalties. Every result is a file in
docs/results/auto-rates, and docs/results/auto-rates.md is the table; results that exist are not computed again.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
FOLDER = RESULTS / "auto-rates"
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # scikit-learn's C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("data", type=Path)
    run.add_argument("out", type=Path)
    run.add_argument("--epochs", type=float, required=True)
    run.add_argument("--factors", type=float, nargs="*", default=[1, 3, 6])
    run.add_argument("--seeds", type=int, default=1)
    verbs.add_parser("table")
    given = parser.parse_args()
    if given.verb == "run":
        FOLDER.mkdir(parents=True, exist_ok=True)
        for seed, factor in itertools.product(range(given.seeds), given.factors):
            name = f"{given.data.stem}-{given.epochs:g}-x{factor:g}-{seed}"
            if not (FOLDER / f"{name}.json").exists():
                found = compare(given.data, given.out / name, given.epochs, factor, seed)
                (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
                write_table()
    write_table()


def dmjd(*words: object) -> str:
    """Run a command; return its output."""
    command = [sys.executable, "-m", "dmjd.cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(data: Path, out: Path, epochs: float, factor: float, seed: int) -> dict[str, Any]:
    """Pre-train at `factor` times the learning rate that auto chooses, and evaluate the features."""
    words = ("pretrain", "--preset", "auto", "--epochs", epochs, "--seed", seed, "--data", data)
    chosen = yaml.safe_load(dmjd(*words, "--print_config"))["optim"]["blr"]
    resumption = ["--resume"] if (out / "checkpoints").exists() else []
    dmjd(*words, "--optim.blr", factor * chosen, "--out", out, *resumption)
    features = out / "features.npy"
    dmjd("embed", "--backbone", out / "backbone.safetensors", "--data", data, "--out", features)
    with features.with_suffix(".csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    config, summary = yaml.safe_load((out / "config.yaml").read_text()), json.loads((out / "summary.json").read_text())
    return {
        "data": data.stem,
        "epochs": epochs,
        "factor": factor,
        "seed": seed,
        "rate": peak_rate(config),
        "rows": config["batch_size"] * config["masking"]["num_views"],
        "steps": summary["steps"],
        "linear": {str(penalty): accuracy(np.load(features), labels, penalty) for penalty in INVERSE_PENALTIES},
        "features": summary["trained"],
        "verdict": summary["verdict"]["kind"],
        "environment": summary["environment"],
    }


def peak_rate(config: Mapping[str, Any]) -> float:
    """Compute the peak learning rate from the base rate (section 4 of the paper)."""
    masking = config["masking"]
    return config["optim"]["blr"] * config["batch_size"] / 256 * masking["predict_ratio"] / masking["mask_ratio"]


def accuracy(features: np.ndarray, labels: list[str], inverse_penalty: float) -> float:
    """Cross-validate a logistic regression; return its accuracy in percent."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return round(100 * float(cross_val_score(probe, features, labels, cv=folds).mean()), 2)


def write_table() -> None:
    """Write existing results, a line for each set, length and factor: means over seeds."""
    found = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    head = ["set", "epochs", "steps", "rows a step", "times", "peak rate", "seeds", "linear", "explained", "RankMe"]
    lines = [head, ["---"] * len(head)]
    for data, epochs, factor in sorted({(each["data"], each["epochs"], each["factor"]) for each in found}):
        runs = [each for each in found if (each["data"], each["epochs"], each["factor"]) == (data, epochs, factor)]
        one = runs[0]
        scores = [max(run["linear"].values()) for run in runs]
        features = [statistics.mean(run["features"][key] for run in runs) for key in ("explained", "rankme")]
        lines.append(
            [
                *(data, f"{epochs:g}", str(one["steps"]), str(one["rows"]), f"{factor:g}"),
                *(f"{one['rate']:.2g}", str(len(runs)), f"{statistics.mean(scores):.1f}"),
                *(f"{features[0]:.2f}", f"{features[1]:.1f}"),
            ]
        )
    said = "Linear: percent of images, cross-validated; means over seeds.\n"
    said += "Written by `python benchmarks/auto_rates.py table` from the files of [auto-rates](auto-rates).\n"
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (RESULTS / "auto-rates.md").write_text(f"# Learning rates of preset auto\n\n{said}\n{table}\n")


if __name__ == "__main__":
    main()
