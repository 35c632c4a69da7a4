"""What is found out about a set of images: headers, faults, copies, values and speed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dmjd.data.builtin import ArrayImages
from dmjd.data.checkup import (
    Look,
    chosen,
    file_of,
    find_copies,
    headers,
    look_at,
    measure_speed,
    measure_values,
    open_as_most,
)
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.duplicates import exact_copies, near_copies, outline
from dmjd.data.folder import open_folder
from dmjd.data.peek import Peek, peek


def scene(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A picture of soft spots, unlike any of another seed."""
    spots = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


# -- headers -----------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Callable[[Path], object], Peek]] = {
    "colour.jpg": (lambda path: Image.fromarray(scene(0)).save(path), Peek(3, "uint8")),
    "grey.png": (lambda path: Image.fromarray(scene(0)[..., 0]).save(path), Peek(1, "uint8")),
    "clear.png": (lambda path: Image.fromarray(scene(0)).convert("RGBA").save(path), Peek(3, "uint8")),
    "palette.gif": (lambda path: Image.fromarray(scene(0)).save(path), Peek(3, "uint8")),
    "deep.png": (lambda path: Image.fromarray(scene(0)[..., 0].astype(np.uint16) * 9).save(path), Peek(1, "uint16")),
    "bands.tif": (
        lambda path: tifffile.imwrite(path, np.zeros((9, 8, 5), np.uint16), photometric="minisblack"),
        Peek(1, "uint16", pages=9),
    ),
    "planes.tif": (
        lambda path: tifffile.imwrite(
            path, np.zeros((5, 9, 8), np.float32), photometric="minisblack", planarconfig="separate"
        ),
        Peek(5, "float32"),
    ),
    "satellite.tif": (
        lambda path: tifffile.imwrite(
            path, np.zeros((9, 8, 4), np.uint8), photometric="rgb", extrasamples=["unspecified"]
        ),
        Peek(4, "uint8"),
    ),
    "clear.tif": (lambda path: Image.fromarray(scene(0)).convert("RGBA").save(path), Peek(3, "uint8")),
    "first.npy": (lambda path: np.save(path, np.zeros((12, 30, 40), np.int16)), Peek(12, "int16")),
    "last.npy": (lambda path: np.save(path, np.zeros((30, 40, 12), np.int16)), Peek(12, "int16")),
    "flat.npy": (lambda path: np.save(path, np.zeros((30, 40), np.float32)), Peek(1, "float32")),
}


@pytest.mark.parametrize("name", FILES)
def test_peek__says_channels_type_and_pages(name: str, tmp_path: Path) -> None:
    write, expected = FILES[name]
    write(tmp_path / name)
    assert peek(tmp_path / name) == expected


def test_peek__says_how_a_photograph_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene(0)).save(tmp_path / "turned.jpg", exif=exif)
    assert peek(tmp_path / "turned.jpg").turned == 6


@pytest.mark.parametrize("content", [b"", b"no image", b"II*\0 cut", b"\x93NUMPY cut"])
def test_peek__of_something_else_is_a_bad_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(BadImage):
        peek(tmp_path / "file.png")


# -- looking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six images, one that is cut off, one of twelve channels and one of two pages."""
    for number in range(6):
        Image.fromarray(scene(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:150])
    np.save(tmp_path / "twelve.npy", np.zeros((12, 30, 30), np.uint16))
    Image.fromarray(scene(0)).save(tmp_path / "two.tif", save_all=True, append_images=[Image.fromarray(scene(1))])
    return tmp_path


@pytest.mark.parametrize("workers", [1, 3])
def test_look_at__names_every_fault_and_goes_on(mixed: Path, workers: int) -> None:
    parts = open_folder(str(mixed), Wanted())
    looks = look_at(parts, chosen(parts, 100, 0), workers)
    assert [each.name for each in looks] == [
        *(f"{number}.png" for number in range(6)),
        "cut.png",
        "twelve.npy",
        "two.tif",
    ]
    cut, twelve, two = looks[6:]
    assert (cut.broken, twelve.broken, two.broken) == (True, False, False)
    assert "channels, not 3" in twelve.fault
    assert two.fault == "2 pages; say --data_pages bands or frames"
    good = looks[0]
    assert (good.fault, good.shape, good.dtype, good.header) == ("", (3, 60, 80), "uint8", Peek(3, "uint8"))
    assert good.file_bytes == (mixed / "0.png").stat().st_size


def test_headers__are_those_of_files_that_have_one(mixed: Path) -> None:
    parts = open_folder(str(mixed), Wanted())
    assert len(headers(parts)) == 9
    (mixed / "cut.png").write_bytes(b"no image")
    assert len(headers(parts)) == 8


def test_file_of__knows_pages_and_sets_without_files(mixed: Path) -> None:
    frames = open_folder(str(mixed), Wanted(pages="frames"))[""]
    names = [frames.name(index) for index in range(len(frames))]
    assert file_of(frames, names.index("two.tif#1")) == mixed / "two.tif"
    drawn = ArrayImages(
        address="set", pixels=torch.zeros(1, 3, 4, 4).byte(), labels=torch.zeros(1).long(), classes=("a",)
    )
    assert file_of(drawn, 0) is None


def test_chosen__is_a_sample_by_seed_over_all_parts(tmp_path: Path, write: Callable[..., Path]) -> None:
    write(tmp_path, *(f"train/{number}.png" for number in range(30)), *(f"val/{number}.png" for number in range(10)))
    parts = open_folder(str(tmp_path), Wanted())
    assert chosen(parts, 40, 0) == [
        *(("train", index) for index in range(30)),
        *(("val", index) for index in range(10)),
    ]
    few = chosen(parts, 12, 0)
    assert few == chosen(parts, 12, 0) == sorted(set(few))
    assert few != chosen(parts, 12, 1)
    assert {part for part, _ in few} == {"train", "val"}


# -- copies ------------------------------------------------------------------------------------------------------------


def test_exact_copies__are_groups_in_order_of_their_first() -> None:
    assert exact_copies([b"a", b"b", b"a", b"c", b"b", b"a"]) == [[0, 2, 5], [1, 4]]


@pytest.mark.parametrize(("shape", "channels"), [((4, 9, 8, 5), 5), ((4, 5, 9, 8), 5), ((4, 9, 8), 1)])
def test_open_as_most__knows_the_channels_of_an_array(shape: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    np.save(tmp_path / "cubes.npy", np.zeros(shape, np.uint16))
    parts, wanted = open_as_most(str(tmp_path / "cubes.npy"), None, None)
    assert wanted.in_chans == channels
    assert parts[""].read(0).shape == (channels, 9, 8)


@pytest.mark.parametrize("depth", [torch.uint8, torch.uint16, torch.float32])
def test_near_copies__are_found_at_other_sizes_and_brightnesses_and_nothing_else_is(depth: torch.dtype) -> None:
    images = [scene(seed) for seed in range(40)]
    smaller = [scene(seed, 30, 40) for seed in range(5)]
    brighter = [(scene(seed) * 0.8 + 30).astype(np.uint8) for seed in range(5, 10)]
    found = [outline(as_tensor(array).to(depth)) for array in [*images, *smaller, *brighter]]
    known = [each for each in found if each]
    bits = np.array([each.bits for each in known], dtype=np.uint64)
    pairs = sorted(near_copies(bits, np.stack([each.thumbnail for each in known])))
    assert len(known) == 50
    assert pairs == [(seed, 40 + seed) for seed in range(10)]


def test_near_copies__are_those_that_comparing_all_pairs_finds() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**63, 30, dtype=np.uint64)
    flips = [
        sum(1 << int(bit) for bit in generator.choice(63, count, replace=False)) for count in range(9) for _ in "abc"
    ]
    bits = np.concatenate([bits, bits[: len(flips)] ^ np.array(flips, dtype=np.uint64)])
    same = np.tile(np.float32([1.0, 0.0]), (len(bits), 1))
    all_pairs = [
        (one, other)
        for one in range(len(bits))
        for other in range(one + 1, len(bits))
        if int(bits[one] ^ bits[other]).bit_count() <= 5
    ]
    assert sorted(near_copies(bits, same)) == all_pairs
    assert len(all_pairs) >= 18


def test_outline__of_an_even_surface_is_none() -> None:
    assert outline(torch.full((3, 20, 20), 200, dtype=torch.uint8)) is None
    assert outline(torch.zeros(12, 20, 20)) is None
    assert outline(as_tensor(scene(0))) is not None


def test_find_copies__tells_leaks_from_copies_within_a_part() -> None:
    pictures = [("train", 0), ("train", 0), ("train", 1), ("val", 1), ("val", 2), ("val", 2)]
    looks = [
        Look(part=part, index=0, name="", digest=bytes([seed]), outline=outline(as_tensor(scene(seed))))
        for part, seed in pictures
    ]
    looks.append(Look(part="val", index=0, name="", digest=b"small", outline=outline(as_tensor(scene(0, 30, 40)))))
    copies = find_copies(looks)
    assert copies.exact == [[0, 1], [2, 3], [4, 5]]
    assert copies.near == [(0, 6)]
    assert copies.leaked == [(3, 2), (6, 0)]


# -- values ------------------------------------------------------------------------------------------------------------


def test_measure_values__knows_range_means_and_shares(tmp_path: Path) -> None:
    for number in range(4):
        array = np.zeros((12, 20, 20), np.uint16)
        array[number] = 4000
        np.save(tmp_path / f"{number}.npy", array)
    parts = open_folder(str(tmp_path), Wanted(in_chans=12))
    values = measure_values(parts, look_at(parts, chosen(parts, 9, 0), None))
    assert (values.statistics.levels.low, values.statistics.levels.high) == (0, 4095)
    assert values.statistics.mean[:5] == pytest.approx([0.2442] * 4 + [0.0], abs=1e-4)
    assert values.histograms.shape == (12, 64)
    assert values.histograms.sum(axis=1) == pytest.approx(np.ones(12))
    assert (values.histograms[0, 0], values.histograms[0, 62], values.histograms[11, 0]) == (0.75, 0.25, 1)
    assert values.filled == 2


def test_measure_speed__is_of_decoding_and_cropping(mixed: Path) -> None:
    parts = open_folder(str(mixed), Wanted())
    good = [each for each in look_at(parts, chosen(parts, 9, 0), 1) if not each.fault]
    speed = measure_speed(parts, good, 32)
    assert 0 < speed.decode < 1
    assert 0 < speed.crop < 1
