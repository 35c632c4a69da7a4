"""The tables of `benchmarks/judge.sh`: one row a measure, untrained beside trained.

python benchmarks/judge_table.py docs/runs/judge/cifar10-vit docs/runs/judge/cifar10-hybrid
"""

import json
import sys
from pathlib import Path
from typing import Any

MEASURES = ["knn", *(f"{verb}-{fraction}" for verb in ("linear", "finetune") for fraction in ("0.01", "0.1", "1"))]
NAMES = {"knn": "k-NN", "linear": "linear", "finetune": "fine-tuned"}


def cell(result: dict[str, Any]) -> str:
    low, high = result["top1_low"], result["top1_high"]
    return f"{result['top1']:.1%} ({100 * low:.1f} .. {100 * high:.1f})"


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        print(
            f"\n**{folder.name}**\n\n| judged by | labels | untrained | pre-trained | minutes |\n|---|---|---|---|---|"
        )
        for measure in MEASURES:
            files = [folder / f"{weights}-{measure}" / "result.json" for weights in ("untrained", "trained")]
            if not all(file.is_file() for file in files):
                continue
            untrained, trained = (json.loads(file.read_text()) for file in files)
            minutes = (untrained["seconds"] + trained["seconds"]) / 120
            name = NAMES[measure.partition("-")[0]]
            print(f"| {name} | {trained['train_images']:,} | {cell(untrained)} | {cell(trained)} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
