"""A path or a name becomes two parts: what is trained on, and what is held out."""

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor

from dmjd.data.decode import Reduce, Wanted, decode
from dmjd.data.folder import folder_images
from dmjd.data.source import (
    Opener,
    Readable,
    Source,
    Subset,
    evenly,
    fingerprint,
    has_labels,
    hold_out,
    labels_of,
    open_all,
    open_source,
    read_or_substitute,
    register_source,
    same_classes,
)
from dmjd.errors import DataError


def numbered(count: int, pattern: str = "{:03d}.png") -> list[str]:
    return [pattern.format(number) for number in range(count)]


def names(source: Readable) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def labels(source: Source) -> list[int]:
    return labels_of(source, range(len(source))).tolist()


@dataclass(frozen=True)
class Bare:
    """So many grey images, each of a class of its own."""

    count: int
    part: str = "bare"
    address: str = "bare"
    in_memory: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"{self.part} {number}" for number in range(self.count))

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index:06d}.png"

    def label(self, index: int) -> int | None:
        return index

    def read(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return torch.full((1, 2, 2), index % 256, dtype=torch.uint8)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_open__without_images_it_is_a_data_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_text("")
    for data, reason in (
        ("empty", "no images"),
        ("nowhere", "no such data"),
        ("file.png", "a file that is not a set of images"),
    ):
        for find in (open_source, open_all):
            with pytest.raises(DataError, match=f"{reason}.*{data}"):
                find(str(tmp_path / data))


def test_open__what_is_nothing_is_told_what_there_is():
    with pytest.raises(DataError, match=r"no such data; cifar; give a folder, .* or one of cifar10, fash.*shapes"):
        open_source("cifar")
    with pytest.raises(DataError, match="no such data; shapes:x"):
        open_source("shapes:x")
    for address in ("https://x.invalid/a.zip", "https://x.invalid/a.csv", "s3://x/a.npy", "s3://x/*.tar"):
        with pytest.raises(DataError, match=f"a set is not read over the network; {re.escape(address)}; download it"):
            open_source(address)


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test"])
def test_open__a_folder_that_brings_its_parts_keeps_them(tmp_path, write, part):
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", f"{part}/cat/c.png", f"{part}/dog/d.png")
    train, held_out = open_source(str(tmp_path))
    assert (names(train), names(held_out)) == (["cat/a.png", "dog/b.png"], ["cat/c.png", "dog/d.png"])
    assert labels(train) == labels(held_out) == [0, 1]


def test_open__val_comes_before_test(tmp_path, write):
    write(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    assert names(open_source(str(tmp_path)).held_out) == ["b.png"]


def test_open__a_train_part_alone_is_split(tmp_path, write):
    write(tmp_path, *numbered(20, "train/{:02d}.png"))
    parts = open_source(str(tmp_path))
    assert (len(parts.train), len(parts.held_out)) == (19, 1)


def test_open__held_out_classes_have_the_numbers_of_training_and_new_ones_come_after(tmp_path, write):
    write(tmp_path, "train/b/1.png", "train/d/2.png", "val/a/3.png", "val/d/4.png", "val/b/5.png")
    train, held_out = open_source(str(tmp_path))
    assert (train.classes, held_out.classes) == (("b", "d"), ("b", "d", "a"))
    assert (labels(train), labels(held_out)) == ([0, 1], [2, 0, 1])
    assert names(held_out) == ["a/3.png", "b/5.png", "d/4.png"]
    assert torch.equal(held_out.read(0), decode(tmp_path / "val/a/3.png", Wanted(3)))


def test_same_classes__compares_each_name_a_few_times_only():
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    @dataclass(frozen=True)
    class Named(Bare):
        classes: tuple[str, ...] = ()

    names = [Name(number) for number in range(400)]
    train, held_out = Named(400, classes=tuple(names)), Named(300, classes=tuple(names[:99:-1]))
    assert labels(same_classes(train, held_out, "val").held_out) == [*range(399, 99, -1)]
    assert compared < 4000


def test_open__a_folder_of_the_name_of_a_set_needs_its_path(tmp_path, write, monkeypatch):
    write(tmp_path, *numbered(4, "cifar10/{}.png"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DMJD_DATA", str(tmp_path / "downloads"))
    assert len(open_source("./cifar10").train) == 3


def test_open_all__names_are_relative_to_the_root_in_every_part(tmp_path, write):
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png", "test/e.png")
    parts = open_all(str(tmp_path))
    assert [names(images) for images in parts] == [
        ["train/cat/a.png", "train/dog/b.png"],
        ["val/cat/c.png", "val/dog/d.png"],
        ["test/e.png"],
    ]
    assert [images.classes for images in parts] == [("cat", "dog"), ("cat", "dog"), ()]
    for images in parts:
        assert images.address == str(tmp_path)
        for index, name in enumerate(names(images)):
            assert torch.equal(images.read(index), decode(tmp_path / name, Wanted(3)))


def test_open_all__a_folder_without_parts_is_one(tmp_path, write):
    write(tmp_path, *numbered(40))
    (images,) = open_all(str(tmp_path))
    assert names(images) == numbered(40)


# -- a source from elsewhere -------------------------------------------------------------------------------------------

STRIPES = """
from dataclasses import dataclass

import torch
from dmjd.data.source import Opener, register_source


@dataclass(frozen=True)
class Stripes:
    address: str
    in_chans: int
    in_memory = True
    classes = ("flat", "striped")

    def __len__(self):
        return 40

    def name(self, index):
        return f"{self.address}/{index}"

    def label(self, index):
        return index % 2

    def read(self, index, reduce=None):
        return torch.full((self.in_chans, 8, 8), index, dtype=torch.uint8)


def open_stripes(data, wanted):
    return {"": Stripes(data, wanted.in_chans)}


register_source("stripes")(Opener(lambda data: data == "stripes", open_stripes))
""".strip()


@pytest.mark.long
def test_register_source__a_file_of_another_distribution_is_enough(tmp_path):
    assert len([line for line in STRIPES.splitlines() if line]) < 30
    (tmp_path / "stripes.py").write_text(STRIPES)
    info = tmp_path / "stripes-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stripes\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dmjd.data]\nstripes = stripes\n")
    check = """
from dmjd.data.decode import Wanted
from dmjd.data.source import labels_of, open_source
train, held_out = open_source("stripes", Wanted(1))
print(len(train), len(held_out), train.read(0).shape[0], labels_of(held_out, range(2)).tolist(), train.name(0))
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("38 2 1 [")


def opened(parts: Iterable[str]) -> Opener:
    return Opener(lambda data: data.endswith(".tape"), lambda data, wanted: {part: Bare(10, part) for part in parts})


@pytest.fixture
def register(monkeypatch):
    """Register for one test."""
    register_source.names()
    monkeypatch.setattr(register_source, "_entries", dict(register_source._entries))
    return lambda name, opener: register_source(name)(opener)


def test_register_source__parts_go_by_their_names(register):
    register("tape", opened(["test", "validation", "train"]))
    train, held_out = open_source("a.tape")
    assert (train.classes[0], held_out.classes[10], len(held_out.classes)) == ("train 0", "validation 0", 20)
    assert [part.name(3) for part in open_all("a.tape")] == [
        f"{part}/000003.png" for part in ("test", "validation", "train")
    ]


def test_register_source__a_set_without_a_training_part_is_refused(register):
    register("tape", opened(["val", "test"]))
    with pytest.raises(DataError, match=r"no part to train on; a\.tape; .* has val, test"):
        open_source("a.tape")


def test_register_source__the_kind_named_is_asked_first_and_that_of_folders_last(register, tmp_path, write):
    write(tmp_path / "x.tape", *numbered(4))
    register("tape", opened([""]))
    assert open_source(str(tmp_path / "x.tape")).train.address == "bare"
    register("zebra", Opener(lambda data: True, lambda data, wanted: {"": Bare(2)}))
    assert len(open_all("zebra:x.tape")[0]) == 2
    assert len(open_all("x.tape")[0]) == 10


# -- held-out images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (39, 1), (40, 2), (1000, 50), (30_000, 1000)])
def test_hold_out__a_twentieth_disjoint_and_complete(count, held):
    train, held_out = hold_out(Bare(count), seed=0)
    assert len(held_out) == held
    assert sorted([*names(train), *names(held_out)]) == names(Bare(count))
    for part in (train, held_out):
        assert [int(name[:6]) for name in names(part)] == labels(part)
        assert names(part) == sorted(names(part))


def test_hold_out__the_seed_alone_decides():
    first, again, other = (names(hold_out(Bare(200), seed=seed).held_out) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert [int(name[:6]) for name in first] == [44, 89, 102, 109, 149, 160, 162, 189, 193, 199]


# -- subsets and questions ---------------------------------------------------------------------------------------------


def test_subset__shows_the_images_chosen_in_their_order():
    subset = Subset(Subset(Bare(9), [8, 3, 5, 1]), [2, 0, 0])
    assert isinstance(subset, Source)
    assert names(subset) == ["000005.png", "000008.png", "000008.png"]
    assert labels(subset) == [5, 8, 8]
    assert [int(subset.read(index)[0, 0, 0]) for index in range(3)] == [5, 8, 8]
    assert (subset.classes, subset.address, subset.in_memory) == (Bare(9).classes, "bare", True)


def test_subset__is_shared_with_workers():
    subset = Subset(Bare(100_000), range(100_000))
    assert subset.name(7) == "000007.png"
    assert len(ForkingPickler.dumps(subset)) < 2000
    assert subset.name(7) == "000007.png"


def test_subset__of_nothing_is_empty():
    subset = Subset(Bare(3), [])
    assert len(subset) == 0
    assert labels_of(subset, []).tolist() == []


def test_labels_of__are_those_of_the_images_asked_for(tmp_path, write):
    images = folder_images(write(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png"), Wanted(3))
    assert labels_of(images, [2, 0, 2]).tolist() == [1, 0, 1]
    assert has_labels(images)
    assert not has_labels(folder_images(tmp_path / "cat", Wanted(3)))


def test_evenly__reaches_from_the_first_to_the_last():
    assert evenly(10, 3) == [0, 4, 9]
    assert evenly(3, 10) == [0, 1, 2]
    assert evenly(1, 10) == [0]


def test_fingerprint__tells_names_and_their_order_apart_and_is_that_of_older_runs():
    prints = [fingerprint(Subset(Bare(3), indices)) for indices in ([0, 1, 2], [0, 2, 1], [0, 1])]
    assert len({*prints}) == 3
    assert fingerprint(Bare(3)) == prints[0] == "070beb9aae6d6f568618fcd3df37bb683db10e05c019f272e6976f69124494ed"


def test_read_or_substitute__the_last_image_is_followed_by_the_first(tmp_path, folder):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes((folder / "000.png").read_bytes() if name == "a.png" else b"")
    image, index, skipped = read_or_substitute(folder_images(tmp_path, Wanted(3)), 1)
    assert (index, list(skipped)) == (0, ["b.png", "c.png"])
    assert image.shape == (3, 20, 24)


def test_read_or_substitute__a_set_without_a_good_image_is_a_data_error(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 images in a row do not decode; b\.png"):
        read_or_substitute(folder_images(tmp_path, Wanted(3)), 1)
