"""Images from anywhere: whatever a file is, it decodes or is skipped by name, in time and in bounded memory."""

import gzip
import io
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch
from PIL import Image

from dmjd.data.annotated import turn_of
from dmjd.data.archive import open_archive
from dmjd.data.decode import MAX_PIXELS, BadImage, Wanted, count_pages, decode, orientation
from dmjd.data.peek import peek
from dmjd.errors import DataError

TINY = """pretrain --preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1
--model.num_heads 2 --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 16 --steps 3
--monitor.evals 0 --monitor.max_images 16 --device cpu"""
IN_TIME = 5.0  # seconds an image
GROWTH = 400 * 2**20  # bytes
SIDES = (24, 40)  # height, width


def picture(mode: str) -> Image.Image:
    rows, columns = np.mgrid[: SIDES[0], : SIDES[1]]
    colour = np.stack([rows * 8, columns * 6, np.full(SIDES, 90)], axis=-1).astype(np.uint8)
    return Image.fromarray(colour).convert(mode)


def deep() -> np.ndarray:
    return (np.mgrid[: SIDES[0], : SIDES[1]][1] * 1600).astype(np.uint16)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(values: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values), allow_pickle=True)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    return encoded(picture("RGB"), kind, save_all=True, append_images=[Image.new("RGB", SIDES[::-1], "white")])


SEEDS: dict[str, Callable[[], bytes]] = {
    "jpeg-rgb": lambda: encoded(picture("RGB"), "JPEG"),
    "jpeg-grey": lambda: encoded(picture("L"), "JPEG", progressive=True),
    "jpeg-cmyk": lambda: encoded(picture("CMYK"), "JPEG"),
    "png-rgb": lambda: encoded(picture("RGB"), "PNG"),
    "png-rgba": lambda: encoded(picture("RGBA"), "PNG"),
    "png-palette": lambda: encoded(picture("RGB").quantize(64), "PNG", transparency=bytes([0, 128])),
    "png-16-bit": lambda: encoded(Image.fromarray(deep()), "PNG"),
    "bmp": lambda: encoded(picture("RGB"), "BMP"),
    "tiff": lambda: encoded(picture("RGB"), "TIFF", compression="tiff_lzw"),
    "gif": lambda: animated("GIF"),
    "ppm": lambda: encoded(picture("RGB"), "PPM"),
    "webp": lambda: encoded(picture("RGB"), "WEBP"),
}


# -- mutations ---------------------------------------------------------------------------------------------------------


def truncate(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.randrange(len(content))])


def flip(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def delete(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    del content[start : start + rng.randint(1, 16)]
    return bytes(content)


def insert(content: bytearray, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    content[place:place] = rng.randbytes(rng.randint(1, 16))
    return bytes(content)


def header_integers(content: bytearray, rng: random.Random) -> bytes:
    place, value = rng.randrange(min(len(content) - 4, 64)), rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**32 - 1])
    content[place : place + 4] = value.to_bytes(4, rng.choice(["big", "little"]))
    return bytes(content)


def zero_run(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    length = min(rng.randint(1, 64), len(content) - start)
    content[start : start + length] = bytes(length)
    return bytes(content)


MUTATORS = (truncate, flip, delete, insert, header_integers, zero_run)


def peak() -> int:
    """The most memory that this process has had since `forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.long
@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_decode__mutated_files_are_images_or_bad_images_in_time_and_memory(tmp_path: Path, count: int) -> None:
    path, rng, reasons = tmp_path / "image", random.Random(count), set[str]()
    seeds = [make() for make in SEEDS.values()]
    for seed in seeds:
        decode(seed, Wanted(3))  # what is imported late is no growth
    pairs = [(seed, mutate) for seed in seeds for mutate in MUTATORS]
    assert len(pairs) == 72
    before = psutil.Process().memory_info().rss
    forget_peak()
    bad = 0
    for number in range(count):
        seed, mutate = pairs[number % len(pairs)]
        wanted = Wanted(3 if rng.random() < 0.5 else 1)
        content = mutate(bytearray(seed), rng)
        path.write_bytes(content)
        began = time.monotonic()
        try:
            image = decode(path, wanted)
        except (BadImage, DataError) as error:  # a header may say anything, such as two pages
            bad += 1
            reasons.add(str(error))
        else:
            assert image.dtype in (torch.uint8, torch.uint16, torch.int16, torch.float32)
            assert image.shape[0] == wanted.in_chans
            assert 0 < image[0].numel() <= MAX_PIXELS
        assert time.monotonic() - began < IN_TIME, f"{mutate.__name__} {content.hex()}"
    assert 0.2 * count < bad < count
    assert all(reason.isprintable() and 0 < len(reason) <= 300 for reason in reasons)
    assert peak() - before < GROWTH


# -- by hand -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, *, channels: int, rows: int | None = None) -> bytes:
    """A black PNG, many pixels in few bytes; of fewer rows than its header says, if wanted."""
    compress = zlib.compressobj(9)
    row = bytes(1 + width * channels * depth // 8)
    body = b"".join(compress.compress(row) for _ in range(height if rows is None else rows)) + compress.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff_that_bites_its_tail() -> bytes:
    """A TIFF whose directory says that the next one is itself."""
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 64)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8) + bytes(64)


def named_pickle() -> bytes:
    return pickle.dumps({"model": [1, 2, 3]})


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", SEEDS["png-rgb"]())
    return buffer.getvalue()


def text_bomb() -> bytes:
    """A PNG with 200 MB of compressed text before its pixels."""
    whole = SEEDS["png-rgb"]()
    return whole[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))) + whole[33:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"
UNKNOWN = "not an image of a known format"
MANY = "pixels are too many; at most 67,108,864"
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    **{f"empty.{ending}": (lambda: b"", UNKNOWN) for ending in ("jpg", "png", "tif", "npy", "dcm", "webp")},
    **{
        f"half-{name}.{ending}": (lambda name=name: SEEDS[name]()[: len(SEEDS[name]()) // 2], ".")
        for name, ending in (
            *(("jpeg-rgb", "jpg"), ("jpeg-cmyk", "jpg"), ("png-rgb", "png"), ("png-16-bit", "png"), ("bmp", "bmp")),
            *(("ppm", "ppm"), ("webp", "webp"), ("tiff", "tif")),
        )
    },
    "bomb.png": (lambda: png(13_000, 13_000, 8, 2, channels=3, rows=40), f"13000x13000 {MANY}"),
    "bomb-16-bit.png": (lambda: png(9_450, 9_450, 16, 0, channels=1, rows=40), MANY),
    "bomb-16-bit-colour.png": (lambda: png(9_450, 9_450, 16, 2, channels=3, rows=40), MANY),
    "bomb.ppm": (lambda: b"P6 60000 60000 255\n" + bytes(99), MANY),
    "bomb.bmp": (lambda: SEEDS["bmp"]()[:18] + struct.pack("<ii", 40_000, 40_000) + SEEDS["bmp"]()[26:], MANY),
    "bomb.gif": (lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + SEEDS["gif"]()[10:], MANY),
    "bomb.tif": (lambda: tiff(np.zeros((9_000, 9_000), np.uint8), compression="zlib"), MANY),
    "bomb.npy": (lambda: array(np.zeros((2, 3)))[:-48].replace(b"(2, 3)", b"(90000, 90000)"), "."),
    "bomb-of-text.png": (text_bomb, "."),
    "eps.jpg": (lambda: EPS, UNKNOWN),
    "eps.png": (
        lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(EPS), 0, 0, 0, 0) + bytes(4) + EPS,
        UNKNOWN,
    ),
    "pdf.jpg": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", UNKNOWN),
    "svg.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', UNKNOWN),
    "page.jpg": (lambda: b"<!DOCTYPE html><title>404</title>", UNKNOWN),
    "icon.png": (lambda: encoded(picture("RGB"), "ICO"), UNKNOWN),
    "targa.bmp": (lambda: encoded(picture("RGB"), "TGA"), UNKNOWN),
    "pcx.png": (lambda: encoded(picture("RGB"), "PCX"), UNKNOWN),
    "silicon.png": (lambda: encoded(picture("RGB"), "SGI"), UNKNOWN),
    "fits.tif": (lambda: b"SIMPLE  =                    T".ljust(2880), UNKNOWN),
    "photoshop.jpg": (lambda: b"8BPS\0\1" + bytes(40), UNKNOWN),
    "zip.jpg": (zipped, UNKNOWN),
    "gzip.png": (lambda: gzip.compress(SEEDS["png-rgb"]()), UNKNOWN),
    "pickle.jpg": (named_pickle, UNKNOWN),
    "pickle.npy": (named_pickle, UNKNOWN),
    "pickle.tif": (named_pickle, UNKNOWN),
    "objects.npy": (lambda: array(np.array([[{}, {}]], dtype=object)), "pickle"),
    "words.npy": (lambda: array([["a", "b"], ["c", "d"]]), "not brightness values"),
    "complex.npy": (lambda: array(np.ones((4, 4), np.complex64)), "not brightness values"),
    "four-dimensions.npy": (lambda: array(np.zeros((2, 2, 2, 3), np.uint8)), "an array of 4 dimensions"),
    "no-pixels.npy": (lambda: array(np.zeros((0, 4, 3), np.uint8)), "no pixels"),
    "nan.npy": (lambda: array(np.full((4, 4), np.nan, np.float32)), "no finite numbers"),
    "infinite.tif": (lambda: tiff(np.full(SIDES, np.inf, np.float32)), "no finite numbers"),
    "medical.dcm": (lambda: bytes(128) + b"DICM" + bytes(20), "."),
    "checksum.png": (lambda: SEEDS["png-rgb"]()[:-20] + bytes(8) + SEEDS["png-rgb"]()[-12:], "."),
    "no-data.png": (lambda: SEEDS["png-rgb"]()[:33] + chunk(b"IEND", b""), "."),
    "only-begun.jpg": (lambda: b"\xff\xd8\xff\xe0", "."),
    "no-frame.gif": (lambda: b"GIF89a" + struct.pack("<HH", 8, 8) + b"\0\0\0;", "."),
    "noise.jpg": (lambda: b"\xff\xd8\xff" + random.Random(0).randbytes(500), "."),
    "tail.tif": (tiff_that_bites_its_tail, "pages in a circle"),
    "many-entries.tif": (lambda: b"II*\0" + struct.pack("<IH", 8, 65_535) + bytes(90), "."),
}
GOOD: dict[str, Callable[[], bytes]] = {
    **{f"{name}.img.png": make for name, make in SEEDS.items()},  # formats are told by content, not by name
    "alpha.webp": lambda: encoded(picture("RGBA"), "WEBP"),
    "animated.webp": lambda: animated("WEBP"),
    "one-bit.png": lambda: encoded(picture("1"), "PNG"),
    "float.tif": lambda: tiff(deep().astype(np.float32) / 65_535),
    "big-endian.tif": lambda: tiff(np.array(picture("RGB")), byteorder=">"),
    "pixel.png": lambda: encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
    "pixel.jpg": lambda: encoded(Image.new("L", (1, 1)), "JPEG"),
    "strip.png": lambda: encoded(Image.new("RGB", (20_000, 1)), "PNG"),
    "turned.jpg": lambda: encoded(
        picture("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0"
    ),
    "half-exif.jpg": lambda: encoded(picture("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\3"),
    "UPPER.JPG": SEEDS["jpeg-rgb"],
    "array.npy": lambda: array(np.array(picture("RGB"))),
    "spaces and ünïcode 图.png": SEEDS["png-rgb"],
    "<b>alert(1)&.png": SEEDS["png-rgb"],
}


def special_files(folder: Path) -> dict[str, str]:
    """What is no file, below names of images; returns the reasons."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zeros.jpg").symlink_to("/dev/zero")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.jpg").mkdir()  # looked into, and empty
    here = os.getcwd()
    os.chdir(folder)  # a socket's path may not be long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.jpg")
    finally:
        os.chdir(here)
    reasons = dict.fromkeys(["pipe.jpg", "zeros.jpg", "null.png"], "a pipe or a device, not a file")
    if os.geteuid():  # root reads everything
        (folder / "secret.png").write_bytes(SEEDS["png-rgb"]())
        (folder / "secret.png").chmod(0)
        reasons["secret.png"] = "PermissionError"
    return reasons | {"dangling.png": "FileNotFoundError", "loop.png": "OSError", "socket.jpg": "OSError"}


@pytest.mark.parametrize("name", BAD)
def test_decode__a_bad_file_has_its_reason_in_time_and_memory(tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(make())
    forget_peak()
    before, began = peak(), time.monotonic()
    with pytest.raises(BadImage, match=reason) as raised:
        decode(path, Wanted(3))
    assert time.monotonic() - began < IN_TIME
    assert peak() - before < GROWTH / 4
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", GOOD)
def test_decode__an_unusual_file_decodes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD[name]())
    image = decode(tmp_path / name, Wanted(3))
    assert image.shape[0] == 3
    assert image.numel() > 0


def test_decode__only_regular_files_are_opened(tmp_path: Path) -> None:
    for name, reason in special_files(tmp_path).items():
        began = time.monotonic()
        with pytest.raises(BadImage, match=reason):
            decode(tmp_path / name, Wanted(3))
        with pytest.raises(BadImage, match=reason):
            peek(tmp_path / name)
        assert count_pages((tmp_path / name).with_suffix(".tif")) == 1
        assert orientation(tmp_path / name) == turn_of(tmp_path / name, (2, 3), (3, 2)) == 1
        assert time.monotonic() - began < IN_TIME
    os.mkfifo(tmp_path / "pipe.tif")
    assert count_pages(tmp_path / "pipe.tif") == orientation(tmp_path / "pipe.tif") == 1


def test_decode__the_largest_image_allowed_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    """As the documentation says: ten bytes a pixel and some more, whatever the format."""
    path = tmp_path / "large.png"
    path.write_bytes(png(8_192, 8_192, 8, 2, channels=3))
    forget_peak()
    before = peak()
    assert decode(path, Wanted(3)).shape == (3, 8_192, 8_192)
    assert peak() - before < 2**30


def test_open_archive__a_bomb_in_a_zip_file_is_a_bad_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", SEEDS["png-rgb"]())
        with archive.open("b.png", "w") as member:
            for _ in range(600):
                member.write(bytes(2**20))
    images = open_archive(str(tmp_path / "images.zip"), Wanted(3))[""]
    images.read(0)
    with pytest.raises(BadImage, match="more than 512 MiB"):
        images.read(1)


@pytest.mark.long
def test_pretrain__every_bad_file_of_a_folder_is_named_with_its_reason_and_the_run_ends_well(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "images" / "val").mkdir()
    for number in range(304):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32 + number % 3, 3), dtype=np.uint8)
        place = folder if number < 300 else folder.with_name("val")
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
    reasons = special_files(folder) | {name: reason for name, (_, reason) in BAD.items()}
    for name, (make, _) in BAD.items():
        (folder / name).write_bytes(make())
    for name, make in GOOD.items():
        (folder / name).write_bytes(make())
    assert len(reasons) >= 60
    arguments = ["--data", str(folder.parent), "--out", str(tmp_path / "run"), "--max_bad", "0.5"]
    run = [sys.executable, "-m", "dmjd.cli", *TINY.split(), *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("\t") for line in (tmp_path / "run" / "skipped.tsv").read_text().splitlines())
    assert rows.keys() == reasons.keys()
    assert all(rows.values())
