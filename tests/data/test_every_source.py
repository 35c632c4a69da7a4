"""The same images give the same pixels and labels, whatever they are packed in."""

import csv
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dmjd.data.decode import Wanted
from dmjd.data.folder import open_folder
from dmjd.data.loader import read_batches
from dmjd.data.memory import in_memory
from dmjd.data.source import Source, fingerprint, open_all, open_source
from dmjd.errors import DataError

CLASSES = ("bird", "cat", "dog")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of noise: two parts, three classes, as CLASS/NUMBER.png."""
    root = tmp_path_factory.mktemp("every") / "animals"
    for number in range(60):
        part = "val" if number % 3 == 0 else "train"
        path = root / part / CLASSES[number % 5 % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setenv("DMJD_DATA", str(tmp_path_factory.mktemp("dmjd")))
        yield


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


def rows_of(images: Path) -> dict[str, list[str]]:
    paths = files(images)
    return {
        "path": [str(path.relative_to(images.parent)) for path in paths],
        "label": [path.parent.name for path in paths],
        "split": [path.parent.parent.name for path in paths],
    }


def write_rows(path: Path, rows: dict[str, list[str]], delimiter: str = ",") -> str:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([[*rows], *zip(*rows.values(), strict=True)])
    return str(path)


def to_csv(images: Path, out: Path) -> str:
    return write_rows(images.parent / "list.csv", rows_of(images))


def to_tsv(images: Path, out: Path) -> str:
    return write_rows(images.parent / "list.tsv", rows_of(images), "\t")


def to_absolute_csv(images: Path, out: Path) -> str:
    rows = rows_of(images)
    return write_rows(out / "list.csv", rows | {"path": [str(images.parent / name) for name in rows["path"]]})


def to_urls(images: Path, out: Path) -> str:
    rows = rows_of(images)
    return write_rows(out / "urls.csv", rows | {"path": [f"file://{images.parent / name}" for name in rows["path"]]})


def to_list_parquet(images: Path, out: Path) -> str:
    pq.write_table(pa.table(rows_of(images)), images.parent / "list.parquet")
    return str(images.parent / "list.parquet")


def to_text(images: Path, out: Path) -> str:
    (images.parent / "list.txt").write_text("\n".join(rows_of(images)["path"]))
    return str(images.parent / "list.txt")


def zipped(images: Path, path: Path, root: Path, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in reversed(files(images)):
            archive.write(file, file.relative_to(root))
    return str(path)


def to_zip(images: Path, out: Path) -> str:
    return zipped(images, out / "flat.zip", images)


def to_stored_zip_with_a_top_folder(images: Path, out: Path) -> str:
    return zipped(images, out / "top.zip", images.parent, zipfile.ZIP_STORED)


def to_tar(images: Path, out: Path) -> str:
    with tarfile.open(out / "all.tar", "w") as archive:
        archive.add(images, ".")
    return str(out / "all.tar")


def to_tar_with_a_top_folder(images: Path, out: Path) -> str:
    with tarfile.open(out / "top.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(images, "animals")
    return str(out / "top.tar")


def to_shards(images: Path, out: Path) -> str:
    paths = files(images)
    for shard in range(3):
        with tarfile.open(out / f"part-{shard:03d}.tar", "w") as archive:
            for path in paths[shard * 20 : shard * 20 + 20]:
                archive.add(path, f"{path.stem}.png")
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = len(path.parent.name)
                archive.addfile(label, io.BytesIO(path.parent.name.encode()))
    return str(out / "part-{000..002}.tar")


def to_glob_of_shards(images: Path, out: Path) -> str:
    to_shards(images, out)
    return str(out / "part-*.tar")


def to_array(images: Path, out: Path) -> str:
    np.save(out / "images.npy", np.stack([np.asarray(Image.open(path)) for path in files(images)]))
    write_rows(out / "images.csv", {key: cells for key, cells in rows_of(images).items() if key != "path"})
    return str(out / "images.npy")


def to_channels_first_array(images: Path, out: Path) -> str:
    pixels = np.stack([np.asarray(Image.open(path)) for path in files(images)])
    np.save(out / "channels.npy", pixels.transpose(0, 3, 1, 2))
    return str(out / "channels.npy")


def embedded(paths: list[Path]) -> dict[str, list]:
    return {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [path.parent.name for path in paths],
    }


def hub_set(paths: list[Path]) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    return datasets.Dataset.from_dict(embedded(paths), features=features)


def to_saved_set(images: Path, out: Path) -> str:
    parts = {part: hub_set(files(images / part)) for part in ("train", "val")}
    datasets.DatasetDict(parts).save_to_disk(out / "saved")
    return f"hf:{out / 'saved'}"


def to_parquet_folder(images: Path, out: Path) -> str:
    (out / "folder").mkdir()
    for part, name in (("train", "train"), ("val", "validation")):
        hub_set(files(images / part)).to_parquet(out / "folder" / f"{name}-00000-of-00001.parquet")
    return f"hf:{out / 'folder'}"


def to_embedded_parquet(images: Path, out: Path) -> str:
    pq.write_table(pa.table(embedded(files(images))), out / "embedded.parquet")
    return str(out / "embedded.parquet")


def to_embedded_parquet_with_labels(images: Path, out: Path) -> str:
    return f"hf:{to_embedded_parquet(images, out)}?image=image&label=label"


KINDS = [value for name, value in globals().items() if name.startswith("to_")]
WITHOUT_LABELS = (to_text, to_channels_first_array)
WITH_PARTS = (
    *(to_csv, to_tsv, to_absolute_csv, to_urls, to_list_parquet, to_zip, to_stored_zip_with_a_top_folder),
    *(to_tar, to_tar_with_a_top_folder, to_array, to_saved_set, to_parquet_folder),
)
every = pytest.mark.parametrize("pack", KINDS, ids=lambda pack: pack.__name__[3:])


def contents(source: Source) -> list[tuple[str | None, torch.Tensor]]:
    """Name of the class, and pixels, of every image in order."""
    labels = [source.label(index) for index in range(len(source))]
    names = [None if label is None else source.classes[label] for label in labels]
    return list(zip(names, (source.read(index) for index in range(len(source))), strict=True))


def same(ours: list, theirs: list, *, labels: bool) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(mine, other) and name == (label if labels else None)
        for (name, mine), (label, other) in zip(ours, theirs, strict=True)
    )


@every
def test_every_source__gives_the_pixels_and_labels_of_the_folder(images, tmp_path, pack: Callable[[Path, Path], str]):
    data = pack(images, tmp_path)
    folder = open_folder(str(images), Wanted())
    expected = [pair for part in folder.values() for pair in contents(part)]
    sources = open_all(data)
    labels = pack not in WITHOUT_LABELS
    assert same([pair for source in sources for pair in contents(source)], expected, labels=labels)
    names = [source.name(index) for source in sources for index in range(len(source))]
    assert len(set(names)) == 60
    train, held_out = open_source(data)
    if pack in WITH_PARTS:
        assert same(contents(train), contents(folder["train"]), labels=labels)
        assert same(contents(held_out), contents(folder["val"]), labels=labels)
    else:
        assert (len(train), len(held_out)) == (57, 3)


@pytest.mark.parametrize("pack", [to_zip, to_stored_zip_with_a_top_folder, to_tar, to_tar_with_a_top_folder])
def test_archive__has_the_names_of_the_folder(images, tmp_path, pack):
    packed, folder = open_all(pack(images, tmp_path)), open_all(str(images))
    assert [fingerprint(source) for source in packed] == [fingerprint(source) for source in folder]


@every
def test_every_source__survives_pickling_after_it_was_read(images, tmp_path, pack):
    source = open_all(pack(images, tmp_path))[0]
    first = source.read(0)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(0), first)
    assert (again.name(1), again.classes, again.label(1)) == (source.name(1), source.classes, source.label(1))


@pytest.mark.parametrize("pack", [each for each in KINDS if each is not to_channels_first_array])
def test_every_source__tells_grey_from_colour_and_refuses_other_channels(images, tmp_path, pack):
    data = pack(images, tmp_path)
    assert open_all(data, Wanted(in_chans=1))[0].read(0).shape == (1, 9, 7)
    with pytest.raises(DataError, match=r"3 channels, not 5; .*; .*--model.in_chans 3") as raised:
        open_all(data, Wanted(in_chans=5))[0].read(0)
    assert "\n" not in str(raised.value)


@every
def test_every_source__reads_the_same_in_many_threads(images, tmp_path, pack, monkeypatch):
    monkeypatch.setattr("dmjd.data.memory.CHUNK", 3)
    for source in open_all(pack(images, tmp_path)):
        held = in_memory(source)
        assert held.in_memory
        assert same(contents(held), contents(source), labels=pack not in WITHOUT_LABELS)


@pytest.mark.parametrize("pack", [to_shards, to_saved_set])
def test_every_source__reads_the_same_in_a_worker(images, tmp_path, pack):
    source = open_source(pack(images, tmp_path)).train
    source.read(0)  # what is open here must not travel
    batches = read_batches(source, range(6), torch.clone, batch_size=6, workers=1, pin_memory=False)
    read, numbers = next(batches)
    assert numbers == [*range(6)]
    assert torch.equal(read, torch.stack([source.read(index) for index in range(6)]))
