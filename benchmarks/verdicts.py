"""Is the verdict of `dmjd pretrain` right? Twelve runs that are made to succeed or fail, each in its own way.

    python benchmarks/verdicts.py CIFAR10 --out OUT [--only NAME ...]

CIFAR10 is a folder train/CLASS/IMAGE, of which 2,000 images are used, without their labels. The network is small (64
wide, 4 deep, 64 tokens of 4 px), so that all runs together take a quarter of an hour of one core. The table has the
expected verdict, the actual one, and the measures that it rests on: the explained variance of hidden tokens of training
and held-out images, and RankMe and spread of the features, untrained and trained.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dmjd.evaluation.verdict import judge

COMMON = """
    --device cpu --precision fp32 --model.image_size 32 --model.patch_size 4 --model.embed_dim 64 --model.depth 4
    --model.num_heads 4 --decoder.embed_dim 64 --decoder.depth 1 --decoder.num_heads 4 --decoder.mlp_ratio 4
    --batch_size 64 --masking.block 1 --monitor.evals 0 --monitor.saves 1 --optim.warmup_epochs 1
""".split()  # noqa: SIM905 (as it is typed)
MAE = ["--preset", "mae", "--model.size", "tiny", "--model.no-class_token", *COMMON]
DMJD = ["--preset", "dmjd", "--model.size", "tiny", "--model.backbone", "vit", *COMMON]
BROKEN = """
import sys, torch
from dmjd import cli, heads
forward = heads.Decoder.forward
heads.Decoder.forward = lambda self, *given: forward(self, *given).detach() * 0 + 3 * next(self.parameters()).mean()
sys.exit(cli.main(sys.argv[1:]))
"""
# Name: the expected verdict, the set, the settings.
RUNS = {
    "mae": ("learned", "photos", [*MAE, "--epochs", "60"]),
    "dmjd": ("learned", "photos", [*DMJD, "--epochs", "40"]),
    "grey": ("learned", "photos", [*MAE, "--epochs", "60", "--model.in_chans", "1"]),
    "short": ("too little", "photos", [*MAE, "--steps", "20"]),
    "rate 0": ("too little, nothing", "photos", [*MAE, "--epochs", "2", "--optim.blr", "0"]),
    "rate x 100": ("nothing, collapsed", "photos", [*MAE, "--epochs", "20", "--optim.blr", "0.4"]),
    "rate x 100 dmjd": ("nothing, collapsed", "photos", [*DMJD, "--epochs", "10", "--optim.blr", "0.4"]),
    "constant target": ("nothing", "plain", [*MAE, "--epochs", "20", "--model.in_chans", "1"]),
    "noise": ("nothing", "noise", [*MAE, "--epochs", "20"]),
    "broken decoder": ("nothing", "photos", [*MAE, "--epochs", "20"]),
    "equal images": ("collapsed", "equal", [*MAE, "--epochs", "20"]),
    "20 images": ("overfitted", "twenty", [*MAE, "--epochs", "3000", "--crop.scale", "1", "1", "--crop.no-flip"]),
}


def make_sets(cifar10: Path, folder: Path) -> None:
    """Make the sets that runs are trained on, flat folders of images."""
    names = sorted(cifar10.glob("train/*/*"))
    photos = [np.array(Image.open(path).convert("RGB")) for path in names[:: len(names) // 2000][:2000]]
    random = np.random.default_rng(0)
    sets = {
        "photos": photos,
        "plain": [np.full((32, 32, 3), random.integers(256), np.uint8) for _ in range(500)],
        "noise": [random.integers(256, size=(32, 32, 3), dtype=np.uint8) for _ in range(500)],
        "equal": photos[:1] * 500,
        "twenty": photos[::95][:21],
    }
    for name, images in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{number:04}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    given = parser.parse_args()
    make_sets(given.cifar10, given.out / "sets")
    print(
        "| run | should say | says | explained, training | held out | RankMe | spread |\n|---|---|---|---|---|---|---|"
    )
    for name in given.only:
        expected, data, settings = RUNS[name]
        out = given.out / name.replace(" ", "-")
        program = ["-c", BROKEN] if name == "broken decoder" else ["-m", "dmjd"]
        rate = [] if "--optim.blr" in settings else ["--optim.blr", "4e-3"]
        command = [sys.executable, *program, "pretrain", *settings, *rate, "--data", str(given.out / "sets" / data)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if not (out / "summary.json").exists():
            done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"| {name} | {expected} | exit {done.returncode}: {done.stderr.splitlines()[-1]} |", flush=True)
                continue
        summary = json.loads((out / "summary.json").read_text())
        before, after = summary["untrained"], summary["trained"]
        pairs = [
            f"{before[key]:.3g} -> {after[key]:.3g}"
            for key in ("explained_train", "explained", "rankme", "feature_std")
        ]
        print("|", " | ".join([name, expected, judge(before, after).kind, *pairs]), "|", flush=True)


if __name__ == "__main__":
    main()
