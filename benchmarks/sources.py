"""Every kind of source against the folder it was made from: names, labels, pixels, and images read per second.

python benchmarks/sources.py FOLDER OUT [--images 1000] [--shards 4]

FOLDER has images of one size as CLASS/IMAGE, and OUT is new. The given number of images, from all over FOLDER, is
copied to OUT/folder, and packed in every supported way. A name counts as the same if it is the folder's, with or
without the name of a shard before it; arrays and Hugging Face datasets have numbers instead. Speed is that of one
thread, on the second reading.
"""

import argparse
import csv
import io
import shutil
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.source import Source, open_all

WANTED = Wanted()


def copy_some(folder: Path, out: Path, count: int) -> list[str]:
    """Copy images from all over a folder; returns their paths below it."""
    images = folder_images(folder, WANTED)
    names = [images.name(index) for index in np.linspace(0, len(images) - 1, count, dtype=int).tolist()]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, out / name)
    return names


def write_lists(folder: Path, names: Sequence[str]) -> dict[str, str]:
    rows = {"path": list(names), "label": [name.partition("/")[0] for name in names]}
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"list.{ending}").open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([[*rows], *zip(*rows.values(), strict=True)])
    pq.write_table(pa.table(rows), folder / "list.parquet")
    (folder / "list.txt").write_text("\n".join(names))
    return {f"list, {ending}": str(folder / f"list.{ending}") for ending in ("csv", "tsv", "parquet", "txt")}


def write_archives(folder: Path, names: Sequence[str], out: Path) -> dict[str, str]:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(out / f"method-{method}.zip", "w", method) as archive:
            for name in names:
                archive.write(folder / name, f"set/{name}")
    with tarfile.open(out / "set.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, f"set/{name}")
    stored, deflated = (str(out / f"method-{method}.zip") for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return {"zip, stored": stored, "zip, deflated": deflated, "tar": str(out / "set.tar")}


def write_shards(folder: Path, names: Sequence[str], out: Path, count: int) -> dict[str, str]:
    """Write shards with about the same number of samples each."""
    for shard in range(count):
        with tarfile.open(out / f"{shard:03d}.tar", "w") as archive:
            for name in names[shard * len(names) // count : (shard + 1) * len(names) // count]:
                archive.add(folder / name, name)
                label = tarfile.TarInfo(str(Path(name).with_suffix(".cls")))
                content = name.partition("/")[0].encode()
                label.size = len(content)
                archive.addfile(label, io.BytesIO(content))
    return {f"{count} shards": str(out / f"{{000..{count - 1:03d}}}.tar")}


def write_array(images: Source, out: Path) -> dict[str, str]:
    np.save(out / "array.npy", torch.stack([images.read(index) for index in range(len(images))]).movedim(1, -1).numpy())
    labels = [images.classes[images.label(index)] for index in range(len(images))]
    (out / "array.csv").write_text("\n".join(["label", *labels]))
    return {"npy": str(out / "array.npy")}


def write_hub(images: Source, folder: Path, out: Path) -> dict[str, str]:
    names = [images.name(index) for index in range(len(images))]
    columns = {
        "image": [{"bytes": (folder / name).read_bytes(), "path": None} for name in names],
        "label": [images.label(index) for index in range(len(images))],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(images.classes)))
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(out / "saved")
    rows.to_parquet(out / "images.parquet")
    return {"hf, saved": f"hf:{out / 'saved'}", "parquet of images": str(out / "images.parquet")}


def class_of(source: Source, index: int) -> str | None:
    label = source.label(index)
    return None if label is None else source.classes[label]


def read_all(source: Source) -> tuple[list[Tensor], float]:
    """Read all images twice; returns them, and the images per second of the second time."""
    for _ in range(2):
        began = time.perf_counter()
        images = [source.read(index) for index in range(len(source))]
        seconds = time.perf_counter() - began
    return images, len(images) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=4)
    settings = parser.parse_args()
    out = settings.out
    shutil.rmtree(out, ignore_errors=True)
    folder = out / "folder"
    names = copy_some(settings.folder, folder, settings.images)
    images = folder_images(folder, WANTED)
    kinds = {"folder": str(folder), **write_lists(folder, names), **write_archives(folder, names, out)}
    kinds |= write_shards(folder, names, out, settings.shards) | write_array(images, out)
    kinds |= write_hub(images, folder, out)
    expected, _ = read_all(images)
    print("| source | images | same names | same labels | same pixels | images/s |\n|---|---|---|---|---|---|")
    for kind, data in kinds.items():
        (source,) = open_all(data)
        read, speed = read_all(source)
        numbers = range(min(len(source), len(images)))
        called = sum(f"/{source.name(index)}".endswith(f"/{images.name(index)}") for index in numbers)
        labelled = sum(class_of(source, index) == class_of(images, index) for index in numbers)
        same = sum(torch.equal(ours, theirs) for ours, theirs in zip(read, expected, strict=False))
        print(f"| {kind} | {len(source)} | {called} | {labelled} | {same} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
