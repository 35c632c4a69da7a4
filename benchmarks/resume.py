"""Train on every kind of source, kill the run in the middle of an epoch and resume it: are the losses the same?

    python benchmarks/resume.py FOLDER [--images 1000] [--only folder zip ...] [--out results.json]

FOLDER has images of one size as CLASS/IMAGE. The given number of them, from all over FOLDER, is packed in every
supported way. On each source a tiny network trains without interruption, and then again: a process is killed by SIGKILL
once its fifth step is saved, and another one resumes the run. Both must log the same losses and gradient norms, to the
last digit.

Images are "held" in one tensor, as a set of few and small images is; "packed" in memory and cropped one by one
(--data_on_device no); or "read" from the source by worker processes whenever a step needs them, as in a set that does
not fit into memory. The last column compares with the first kind of source in the table, held in the same way: sources
with the same pixels in the same order have the same losses. The TIFFs have a fourth channel, and so other losses.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
import torch
from sources import copy_some, write_archives, write_array, write_hub, write_lists, write_shards

from dmjd.cli import main as dmjd
from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.memory import MEMORY_LIMIT
from dmjd.data.source import Source
from dmjd.engine import checkpoint

STEPS, KILLED_AFTER = 24, 5  # 24 steps of 64 images are an epoch and a half of 950
TINY = """
    --model.image_size 32 --model.patch_size 8 --model.embed_dim 32 --model.depth 2 --model.num_heads 2
    --decoder.embed_dim 32 --decoder.depth 1 --decoder.num_heads 2 --batch_size 64 --device cpu --precision fp32
    --monitor.log_every 1 --monitor.evals 0 --monitor.max_images 64
""".split()  # noqa: SIM905 (as it is typed)
RUN = ("pretrain", *TINY, "--steps", str(STEPS), "--monitor.saves", str(STEPS))
PROGRAM = """
import json, sys
from dmjd.cli import main
from dmjd.data import memory
memory.MEMORY_LIMIT = int(sys.argv[1])
sys.exit(max((main(line) for line in json.loads(sys.argv[2])), default=0))
"""
PACKED = ("folder", "zip, stored")  # kinds that are also packed in memory image by image
DEEP = "TIFF, 4 x 16 bits"


def pack(folder: Path, names: Sequence[str], out: Path) -> dict[str, list[str]]:
    """Pack a folder in every way; the flags of each by its name."""
    images = folder_images(folder, Wanted())
    kinds = {"folder": str(folder), **write_lists(folder, names), **write_archives(folder, names, out)}
    kinds |= write_shards(folder, names, out, 4) | write_array(images, out) | write_hub(images, folder, out)
    if dmjd(["prepare", "--data", str(folder), "--out", str(out / "prepared")]):
        sys.exit("dmjd prepare failed")
    flags = {kind: ["--data", data] for kind, data in (kinds | {"prepared": str(out / "prepared")}).items()}
    write_tiffs(images, out / "tiff")
    return flags | {DEEP: ["--data", str(out / "tiff"), "--model.in_chans", "4"]}


def write_tiffs(images: Source, out: Path) -> None:
    """Write each image as a TIFF of four channels of 16 bits; the fourth is the mean of the others."""
    for index in range(len(images)):
        path = (out / images.name(index)).with_suffix(".tif")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = with_mean(images.read(index)).astype(np.uint16) * 257
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


def with_mean(image: torch.Tensor) -> np.ndarray:
    """Make an image C H W one of H W C + 1, whose last channel is the mean of the others."""
    pixels = image.permute(1, 2, 0).numpy()
    return np.concatenate([pixels, pixels.mean(axis=2, keepdims=True).round().astype(np.uint8)], axis=2)


def command(lines: Sequence[Sequence[str]], kept: str = "held") -> list[str]:
    """Make a process of some command lines, one after the other."""
    limit = 0 if kept == "read" else MEMORY_LIMIT
    return [sys.executable, "-c", PROGRAM, str(limit), json.dumps([*map(list, lines)])]


def environment(folder: Path) -> dict[str, str]:
    """Make an environment with one thread and its own caches."""
    return os.environ | {"OMP_NUM_THREADS": "1", "DMJD_DATA": str(folder), "HF_HOME": str(folder)}


def run(lines: Sequence[Sequence[str]], caches: Path, kept: str = "held") -> str:
    """Run command lines in their own process and return its output; if it fails, exit with its errors."""
    done = subprocess.run(command(lines, kept), env=environment(caches), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def kill(line: Sequence[str], caches: Path, kept: str) -> None:
    """Run a command line and kill it once a number of steps is saved."""
    with subprocess.Popen(
        command([line], kept), env=environment(caches), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        said = []
        assert process.stderr is not None
        for text in process.stderr:
            said.append(text)
            if text.startswith(f"step {KILLED_AFTER}/") and text.endswith("saved\n"):
                break
        process.kill()
    if process.returncode != -signal.SIGKILL:
        sys.exit(f"ended before it was killed, with {process.returncode}\n{''.join(said)[-3000:]}")


def curve(out: Path) -> list[tuple[float, ...]]:
    """Read the losses and the norm of the gradient of every step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in ("loss", "loss_masked", "grad_norm")) for line in lines if "loss" in line]


def difference(ours: Path, theirs: Path) -> float:
    """Find the largest difference between the curves of two whole runs."""
    mine, others = np.array(curve(ours)), np.array(curve(theirs))
    if not len(mine) == len(others) == STEPS:
        sys.exit(f"{len(mine)} and {len(others)} steps, not {STEPS}; {ours}; {theirs}")
    return float(abs(mine - others).max())


def measure(kinds: dict[str, list[str]], kept: str, root: Path) -> list[dict[str, object]]:
    """Run every kind of source, given by its flags, uninterrupted and killed; also compare all with the first one."""
    caches, more = root / "caches", ["--data_on_device", "no"] if kept == "packed" else []
    lines = [[*RUN, *flags, *more, "--out"] for flags in kinds.values()]
    whole, killed = ([root / f"{kept}-{end}-{place}" for place in range(len(kinds))] for end in ("whole", "killed"))
    run([[*line, str(out)] for line, out in zip(lines, whole, strict=True)], caches, kept)
    for line, out in zip(lines, killed, strict=True):
        kill([*line, str(out)], caches, kept)
    saved = [checkpoint.read_state(checkpoint.latest(out / "checkpoints"))["step"] for out in killed]
    run([[*line, str(out), "--resume"] for line, out in zip(lines, killed, strict=True)], caches, kept)
    return [
        {
            "source": kind,
            "images are": kept,
            "images": json.loads((whole[place] / "summary.json").read_text())["num_images"],
            "steps": STEPS,
            "killed after": saved[place],
            "resumed differs by": difference(whole[place], killed[place]),
            "differs from the first by": None if kind == DEEP else difference(whole[place], whole[0]),
        }
        for place, kind in enumerate(kinds)
    ]


def table(rows: Sequence[dict[str, object]]) -> str:
    """Write rows of the same keys in Markdown."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*map(cell, row.values())] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Write a value down: differences with two digits, and none as 0."""
    if isinstance(value, float):
        return f"{value:.1e}" if value else "0"
    return "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", nargs="+", help="kinds of sources, as the table names them; default: all")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "folder"
        names = copy_some(settings.folder, folder, settings.images)
        kinds = pack(folder, names, Path(root))
        chosen = {kind: words for kind, words in kinds.items() if kind in (settings.only or kinds)}
        rows = measure(chosen, "held", Path(root)) + measure(chosen, "read", Path(root))
        rows += measure({kind: words for kind, words in chosen.items() if kind in PACKED}, "packed", Path(root))
    if settings.out:
        settings.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
