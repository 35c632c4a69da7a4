"""A new user's first steps, timed: from 300 unlabelled photographs to predictions for others.

    python benchmarks/walkthrough.py CLOTHING OUT [--minutes 5]

CLOTHING is a folder train/CLASS/IMAGE, test/CLASS/IMAGE. OUT gets `photos` (300 images without labels), `labelled`
(the same in class folders), `new` (100 images of the test part) and everything that the commands below write. Prints a
table, and stores it with the output of the commands in docs/results/walkthrough.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dmjd

ROOT = Path(__file__).resolve().parent.parent
PLAIN_TIMM = """
import sys, timm, torch
from pathlib import Path
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
{load}
model.eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
def features(folder):
    paths = sorted(Path(folder).glob("*/*.jpg"))
    with torch.no_grad():
        found = torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths])
    return found.numpy(), [path.parent.name for path in paths]
classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(*features("labelled"))
print(f"accuracy {{classifier.score(*features('new')):.3f}}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clothing", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True)
    copy(arguments.clothing / "train", 30, out / "labelled")
    copy(arguments.clothing / "test", 10, out / "new")
    (out / "photos").mkdir()
    for number, path in enumerate(sorted((out / "labelled").glob("*/*"))):
        shutil.copy(path, out / "photos" / f"{number:04d}.jpg")
    steps = []
    for words in commands(f"{arguments.minutes:g}"):
        began = time.perf_counter()
        done = subprocess.run(words, cwd=out, capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).strip().splitlines()
        shown = "python features.py" if words[-1] == "features.py" else " ".join(["dmjd", *words[1:]])
        steps.append(
            {"command": shown, "seconds": round(time.perf_counter() - began, 1), "exit": done.returncode, "said": said}
        )
        print(f"| `{shown}` | {steps[-1]['seconds']} s | {said[-1] if said else ''} |", flush=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        if "export" in words:  # it prints the call that loads the file
            call = next(line for line in reversed(said) if line.startswith("model = "))
            (out / "features.py").write_text(PLAIN_TIMM.format(load=call))
    result = {
        "steps": steps,
        "images": 300,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "version": dmjd.__version__,
    }
    (ROOT / "docs" / "results" / "walkthrough.json").write_text(json.dumps(result, indent=1) + "\n")


def copy(part: Path, count: int, to: Path) -> None:
    """Copy the first images of each class."""
    for folder in sorted(part.iterdir()):
        (to / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:count]:
            shutil.copy(path, to / folder.name)


def commands(minutes: str) -> list[list[str]]:
    """List the commands in the order in which they are typed."""
    program = str(Path(sys.executable).with_name("dmjd"))
    backbone = "runs/photos/backbone.safetensors"
    tuned = "runs/tuned/best.safetensors"
    return [
        [program, *line.split()]
        for line in (
            "doctor photos --out doctor",
            f"pretrain --data photos --out runs/photos --minutes {minutes}",
            "report runs/photos",
            f"embed --backbone {backbone} --data photos --out features.npy",
            "search --features features.npy --query photos/0007.jpg --out near",
            "export runs/photos --to timm --out photos.safetensors",
        )
    ] + [
        [sys.executable, "features.py"],
        [program, *f"finetune --backbone {backbone} --data labelled --out runs/tuned".split()],
        [program, *f"predict --backbone {tuned} --data new --out predicted".split()],
    ]


if __name__ == "__main__":
    main()
