"""Any file becomes a uint8 image, or one reason why not."""

import io
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dmjd.data.decode import BadImage, decode

SIDES = (24, 40)  # height, width


def picture(mode: str) -> Image.Image:
    """A smooth picture with an edge, in a mode of Pillow."""
    rows, columns = np.mgrid[: SIDES[0], : SIDES[1]]
    colour = np.stack([rows * 8, columns * 6, np.full(SIDES, 90)], axis=-1).astype(np.uint8)
    image = Image.fromarray(colour)
    ImageDraw.Draw(image).rectangle((10, 6, 25, 15), fill=(250, 20, 60))
    return image.convert(mode)


def ramp(mode: str) -> Image.Image:
    steps = np.linspace(0, 1, SIDES[1], dtype=np.float32) * np.ones((SIDES[0], 1), np.float32)
    return Image.fromarray(steps if mode == "F" else (steps * 65535).round().astype(np.uint16))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animation() -> bytes:
    frames = [picture("RGB"), Image.new("RGB", SIDES[::-1], "white")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


SEEDS: dict[str, Callable[[], bytes]] = {
    "jpeg-rgb": lambda: encoded(picture("RGB"), "JPEG"),
    "jpeg-grey": lambda: encoded(picture("L"), "JPEG", progressive=True),
    "jpeg-cmyk": lambda: encoded(picture("CMYK"), "JPEG"),
    "png-rgb": lambda: encoded(picture("RGB"), "PNG"),
    "png-rgba": lambda: encoded(picture("RGBA"), "PNG"),
    "png-palette": lambda: encoded(picture("RGB").quantize(64), "PNG", transparency=bytes([0, 128])),
    "png-16-bit": lambda: encoded(ramp("I;16"), "PNG"),
    "bmp": lambda: encoded(picture("RGB"), "BMP"),
    "tiff": lambda: encoded(picture("RGB"), "TIFF", compression="tiff_lzw"),
    "tiff-16-bit": lambda: encoded(ramp("I;16"), "TIFF"),
    "tiff-float": lambda: encoded(ramp("F"), "TIFF"),
    "gif": animation,
    "ppm": lambda: encoded(picture("RGB"), "PPM"),
    "webp": lambda: encoded(picture("RGB"), "WEBP"),
}


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("name", SEEDS)
def test_decode__every_format_gives_bytes_of_the_wanted_channels(tmp_path: Path, name: str, in_chans: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(SEEDS[name]())
    image = decode(path, in_chans)
    assert image.dtype == torch.uint8
    assert image.shape == (in_chans, *SIDES)
    assert image.float().std() > 10  # neither white nor black


@pytest.mark.parametrize("name", ["png-rgb", "png-rgba", "bmp", "tiff", "ppm"])
def test_decode__lossless_formats_give_the_pixels_that_went_in(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(SEEDS[name]())
    expected = torch.from_numpy(np.array(picture("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(path, 3), expected)


def test_decode__an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "image.gif"
    path.write_bytes(animation())
    expected = torch.from_numpy(np.array(picture("RGB"))).permute(2, 0, 1)
    assert (decode(path, 3).float() - expected.float()).abs().mean() < 20


def assert_ramp(path: Path) -> None:
    expected = torch.linspace(0, 255, SIDES[1]).round().to(torch.uint8)
    for in_chans in (1, 3):
        image = decode(path, in_chans)
        assert (image.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode__sixteen_bit_ramp_stays_a_ramp(tmp_path: Path, kind: str) -> None:
    (tmp_path / "ramp").write_bytes(encoded(ramp("I;16"), kind))
    assert_ramp(tmp_path / "ramp")


def test_decode__float_ramp_of_0_to_1_stays_a_ramp(tmp_path: Path) -> None:
    (tmp_path / "ramp").write_bytes(encoded(ramp("F"), "TIFF"))
    assert_ramp(tmp_path / "ramp")


@pytest.mark.parametrize("value", [-1.0, 7.0, float("nan"), float("inf")])
def test_decode__floats_of_an_unknown_range_are_refused(tmp_path: Path, value: float) -> None:
    pixels = np.full(SIDES, 0.5, np.float32)
    pixels[0, 0] = value
    (tmp_path / "image").write_bytes(encoded(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(BadImage, match="values outside"):
        decode(tmp_path / "image", 3)


def bomb(side: int) -> bytes:
    """A black PNG, many pixels in few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    compress = zlib.compressobj(9)
    rows = b"".join(compress.compress(bytes(1 + 3 * side)) for _ in range(side)) + compress.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decode__a_decompression_bomb_is_refused_at_once_and_without_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(13_000))
    assert path.stat().st_size < 1_000_000
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(BadImage, match="Bomb"):
        decode(path, 3)
    assert time.process_time() - began < 0.2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KiB; the pixels would take 495,000


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


@pytest.mark.parametrize("mutate", [truncate, flip, delete, insert, header_integers, zero_run])
def test_decode__whatever_is_wrong_with_a_file_it_is_a_bad_image(
    tmp_path: Path, mutate: Callable[[bytearray, random.Random], bytes]
) -> None:
    path, rng = tmp_path / "image", random.Random(mutate.__name__)
    reasons = []
    for make in SEEDS.values():
        good = make()
        for repetition in range(40):
            path.write_bytes(mutate(bytearray(good), rng))
            try:
                image = decode(path, 3 if repetition % 2 else 1)
            except BadImage as error:
                reasons.append(str(error))
            else:
                assert image.dtype == torch.uint8
                assert image.shape[0] == (3 if repetition % 2 else 1)
                assert image.numel() > 0
    assert len(reasons) > 20
    assert all(reason.isprintable() and 0 < len(reason) <= 200 for reason in reasons)


@pytest.mark.parametrize("content", [b"", b"just a text\n", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_decode__a_file_that_is_no_image_is_a_bad_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"\w"):
        decode(path, 3)


def test_decode__a_missing_file_and_a_folder_are_bad_images(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="FileNotFoundError"):
        decode(tmp_path / "nowhere.png", 3)
    with pytest.raises(BadImage, match="IsADirectoryError"):
        decode(tmp_path, 3)
