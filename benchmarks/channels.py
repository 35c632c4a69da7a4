"""Check that deep images train like the same images in 8 bits, and that every verb takes images of twelve channels.

    python benchmarks/channels.py FOLDER [--images 1000] [--out results.json]

FOLDER has images of one size as CLASS/IMAGE. The given number of them, from all over FOLDER, is written again:

* as uint16 of 257 times the value, so that they range over 0..65535 as bytes do over 0..255; with three channels, and
  with four, the last of which is the mean of the others. The losses of 24 steps are compared with those of 8-bit
  images: "held" in one tensor, as a set of few and small images is; "packed", cropped one by one (--data_on_device no);
  and held but "uncropped". A resized crop of bytes is rounded to bytes, that of a deep image is not, or at its own
  depth: only uncropped images must agree to the last digit.
* as uint16 of twelve channels, random mixtures of red, green and blue in 12 bits. They train every kind of target, the
  last of which is a frozen teacher, the result of the first run; the other verbs then use that backbone.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from resume import RUN, difference, run, table, with_mean, write_tiffs
from sources import copy_some

from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.source import Source

TARGETS = ("hog", "pixels", "normalized_pixels", "ema")
WAYS = {
    "held": [],
    "packed": ["--data_on_device", "no"],
    "uncropped": ["--crop.scale", "1", "1", "--crop.ratio", "1", "1"],
}
DEPTHS = {  # location of each kind of images, and the 8-bit images that they are compared with
    "array of 3 x 16 bits": ("three.npy", "folder"),
    "array of 4 x 8 bits": ("four.npy", "four"),
    "TIFF of 4 x 16 bits": ("tiff", "four"),
}


def write_depths(images: Source, out: Path) -> None:
    """Write images of three and four channels, and 8 and 16 bits."""
    pixels = [images.read(index) for index in range(len(images))]
    np.save(out / "three.npy", torch.stack(pixels).movedim(1, -1).numpy().astype(np.uint16) * 257)
    np.save(out / "four.npy", np.stack([with_mean(image) for image in pixels]))
    write_tiffs(images, out / "tiff")
    for index, image in enumerate(pixels):
        path = (out / "four" / images.name(index)).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(with_mean(image), "RGBA").save(path)


def compare_depths(root: Path) -> Iterator[dict[str, object]]:
    """Train on all of these images in every way."""
    channels = {"folder": "3", "three.npy": "3", "four": "4", "four.npy": "4", "tiff": "4"}
    for way, flags in WAYS.items():
        for name, count in channels.items():
            data = ["--data", str(root / name), "--model.in_chans", count]
            run([[*RUN, *data, *flags, "--out", str(root / f"{way}-{name}")]], root / "caches")
        for kind, (name, like) in DEPTHS.items():
            differs = difference(root / f"{way}-{name}", root / f"{way}-{like}")
            yield {"images": kind, "images are": way, "differ from 8-bit files by": differs}


def write_twelve(images: Source, out: Path) -> None:
    """Write each image as an array H W 12 of 12 bits."""
    mixtures = np.random.default_rng(0).dirichlet((1, 1, 1), 12).T
    for index in range(len(images)):
        path = (out / images.name(index)).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = images.read(index).permute(1, 2, 0).numpy() @ mixtures
        np.save(path, (pixels * (4095 / 255)).round().astype(np.uint16))


def run_twelve(root: Path) -> Iterator[dict[str, object]]:
    """Run every verb on images of twelve channels; all numbers that they write must be finite."""
    data, caches = ["--data", str(root / "twelve")], root / "caches"
    backbone = root / "twelve-hog" / "backbone.safetensors"
    for target in (*TARGETS, str(backbone)):
        out = root / f"twelve-{target if target in TARGETS else 'teacher'}"
        run([[*RUN, *data, "--model.in_chans", "12", "--masked.target", target, "--out", str(out)]], caches)
        assert (out / "report.html").stat().st_size
        losses = losses_of(out)
        yield row(f"pretrain, {out.name.removeprefix('twelve-')}", losses, f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    seen = [*data, "--device", "cpu", "--backbone", str(backbone)]
    run([["embed", *seen, "--out", str(root / "features.npy")]], caches)
    features = np.load(root / "features.npy")
    yield row("embed", features.ravel().tolist(), f"{features.shape[0]} x {features.shape[1]}")
    top1 = json.loads(run([["knn", *seen]], caches).splitlines()[-1])["top1"]
    yield row("knn", [top1], f"top-1 {top1:.1%}")
    tuned = root / "tuned"
    steps = ["--steps", "5", "--batch_size", "64", "--log.log_every", "1"]
    run([["finetune", *seen, *steps, "--out", str(tuned)]], caches)
    losses, top1 = losses_of(tuned), json.loads((tuned / "result.json").read_text())["top1"]
    yield row("finetune", [*losses, top1], f"loss {losses[0]:.3f} to {losses[-1]:.3f}, top-1 {top1:.1%}")


def losses_of(out: Path) -> list[float]:
    """Read the loss of every step; losses that are not finite are stored as null."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [math.nan if line["loss"] is None else line["loss"] for line in lines if "loss" in line]


def row(verb: str, numbers: list[float], result: str) -> dict[str, object]:
    """Summarise the output of a verb."""
    return {"verb": verb, "numbers": len(numbers), "finite": sum(map(math.isfinite, numbers)), "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copy_some(settings.folder, root / "folder", settings.images)
        images = folder_images(root / "folder", Wanted())
        write_depths(images, root)
        write_twelve(images, root / "twelve")
        depths, verbs = [*compare_depths(root)], [*run_twelve(root)]
    if settings.out:
        settings.out.write_text(json.dumps({"depths": depths, "verbs": verbs}, indent=1))
    print(table(depths), table(verbs), sep="\n\n")


if __name__ == "__main__":
    main()
