"""How long to fine-tune with few labels: epochs x labels, with the preset `quick`.

    python benchmarks/tuning_length.py BACKBONE DATA OUT [--fractions 0.01 0.1] [--epochs 10 30 100 300] [--seeds 2]

DATA is a folder of labelled images with a held-out part. Every result is a file in docs/results/tuning_length, and
docs/results/tuning_length.md is the table; results that exist are not computed again.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
FOLDER = RESULTS / "tuning_length"
BATCH = 64  # of the preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.01, 0.1])
    parser.add_argument("--epochs", type=int, nargs="*", default=[10, 30, 100, 300])
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed, epochs, fraction in itertools.product(range(given.seeds), given.epochs, given.fractions):
        name = f"{given.data.name}-{fraction:g}-{epochs}-{seed}"
        if not (FOLDER / f"{name}.json").exists():
            settings = f"--preset quick --fraction {fraction:g} --epochs {epochs} --seed {seed} --log.evals 0"
            command = [sys.executable, "-m", "dmjd.cli", "finetune", *settings.split(), "--workers", "0"]
            paths = ["--backbone", given.backbone, "--data", given.data, "--out", given.out / name]
            done = subprocess.run([*command, *map(str, paths)], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            found |= {"data": given.data.name, "fraction": fraction, "epochs": epochs, "seed": seed}
            (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            write_table()


def write_table() -> None:
    """Write existing results, a line for each set and number of labels."""
    found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    columns = sorted({each["epochs"] for each in found})
    lines = [["set", "labels", *(f"{epochs} epochs" for epochs in columns)], ["---"] * (len(columns) + 2)]
    for data, labels in sorted({(each["data"], each["train_images"]) for each in found}):
        row = [data, str(labels)]
        for epochs in columns:
            scores = [
                100 * each["top1"]
                for each in found
                if (each["data"], each["train_images"]) == (data, labels) and each["epochs"] == epochs
            ]
            steps = max(round(epochs * labels / BATCH), 1)
            row.append(f"{statistics.mean(scores):.1f} ({steps} steps, {len(scores)} seeds)" if scores else "")
        lines.append(row)
    head = "# Length of fine-tuning\n\nTop-1 in percent, mean over seeds.\n"
    head += "Written by `python benchmarks/tuning_length.py`.\n\n"
    (RESULTS / "tuning_length.md").write_text(head + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


if __name__ == "__main__":
    main()
