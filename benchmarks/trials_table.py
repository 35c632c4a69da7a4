"""The table and the curves of the trials, from what their runs recorded.

    python benchmarks/trials_table.py docs/runs docs/trials.png

Every folder below the first argument holds the `config.yaml`, `summary.json` and `metrics.jsonl` of a run.
"""

import argparse
import json
from pathlib import Path

import yaml
from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, neighbours = figure.subplots(1, 2)
    print("| run | effective epochs | minutes | k-NN, untrained | k-NN | linear, untrained | linear |")
    print("|---|---|---|---|---|---|---|")
    for run in sorted(path.parent for path in arguments.runs.glob("*/summary.json")):
        summary = json.loads((run / "summary.json").read_text())
        views = yaml.safe_load((run / "config.yaml").read_text())["masking"]["num_views"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        effective = views * lines[-1]["epoch"]
        row = [run.name, f"{effective:.0f}", f"{summary['seconds'] / 60:.0f}"]
        for measure in ("knn_top1", "linear_top1"):
            row += [f"{summary[when][measure]:.1%}" for when in ("untrained", "trained")]
        print(f"| {' | '.join(row)} |")
        training = [line for line in lines if "loss" in line]
        losses.plot(
            [views * line["epoch"] for line in training], [line["loss_masked"] for line in training], label=run.name
        )
        measured = [line for line in lines if "knn_top1" in line]
        neighbours.plot(
            [views * line["epoch"] for line in measured],
            [100 * line["knn_top1"] for line in measured],
            marker="o",
            label=run.name,
        )
    for axes, title in ((losses, "loss on hidden tokens"), (neighbours, "k-NN top-1, percent")):
        axes.set(title=title, xlabel="effective epochs")
        axes.spines[["top", "right"]].set_visible(False)
    neighbours.legend(fontsize=7, frameon=False)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
