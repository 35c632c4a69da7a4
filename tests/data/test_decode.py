"""Any file becomes an image of the wanted channels at its depth, or one reason why not."""

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageDraw, ImageOps

from dmjd.data.decode import BadImage, Wanted, decode, orientation
from dmjd.data.folder import folder_images
from dmjd.data.levels import Levels
from dmjd.data.peek import peek
from dmjd.errors import DataError

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


def deep_colour() -> bytes:
    return bytes(
        pytest.importorskip("cv2").imencode(".png", np.array(picture("RGB")).astype(np.uint16) * 257)[1].tobytes()
    )


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
    "png-16-bit-colour": deep_colour,
    "tiff-float": lambda: encoded(ramp("F"), "TIFF"),
    "gif": animation,
    "ppm": lambda: encoded(picture("RGB"), "PPM"),
    "webp": lambda: encoded(picture("RGB"), "WEBP"),
}


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("name", SEEDS)
def test_decode__every_format_gives_the_wanted_channels(tmp_path: Path, name: str, in_chans: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(SEEDS[name]())
    image = decode(path, Wanted(in_chans))
    assert image.dtype == {
        "png-16-bit": torch.uint16,
        "tiff-16-bit": torch.uint16,
        "png-16-bit-colour": torch.uint16,
        "tiff-float": torch.float32,
    }.get(name, torch.uint8)
    assert image.shape == (in_chans, *SIDES)
    assert Levels(0.0, 1.0 if image.is_floating_point() else 65535.0).scale(image).float().std() > 10  # a picture


@pytest.mark.parametrize("name", ["png-rgb", "png-rgba", "bmp", "tiff", "ppm"])
def test_decode__lossless_formats_give_the_pixels_that_went_in(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(SEEDS[name]())
    expected = torch.from_numpy(np.array(picture("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(path, Wanted(3)), expected)


def test_decode__an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "image.gif"
    path.write_bytes(animation())
    expected = torch.from_numpy(np.array(picture("RGB"))).permute(2, 0, 1)
    assert (decode(path, Wanted(3)).float() - expected.float()).abs().mean() < 20


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    ("mode", "kind", "high"), [("I;16", "PNG", 65535.0), ("I;16", "TIFF", 65535.0), ("F", "TIFF", 1.0)]
)
def test_decode__deep_images_keep_their_depth_until_they_are_scaled(
    tmp_path: Path, mode: str, kind: str, high: float, in_chans: int
) -> None:
    (tmp_path / "ramp").write_bytes(encoded(ramp(mode), kind))
    steps = torch.linspace(0, 1, SIDES[1]).expand(in_chans, *SIDES)
    assert torch.allclose(decode(tmp_path / "ramp", Wanted(in_chans)).float() / high, steps, atol=1e-4)
    scaled = decode(tmp_path / "ramp", Wanted(in_chans, levels=Levels(0.0, high)))
    assert torch.allclose(scaled, 255 * steps, atol=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_decode__values_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    pixels = np.full(SIDES, 0.5, np.float32)
    pixels[0, 0] = value
    (tmp_path / "image").write_bytes(encoded(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(BadImage, match="no finite numbers"):
        decode(tmp_path / "image", Wanted(3))


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_decode__tiffs_and_arrays_of_any_channels_give_the_values_that_went_in(kind: str, channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 120, (9, 13, channels)).astype(kind)
    first = np.moveaxis(array, -1, 0)
    for content in (
        tiff(array, photometric="minisblack", planarconfig="contig" if channels > 1 else None),
        tiff(first, photometric="minisblack", planarconfig="separate" if channels > 1 else None),
        saved(array),
        saved(np.ascontiguousarray(first)),
    ):
        image = decode(content, Wanted(channels))
        assert image.dtype == getattr(torch, kind)
        assert np.array_equal(image.numpy(), first)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("float32", {"byteorder": ">", "compression": "zlib"}),
        ("float32", {"compression": "lerc"}),
        ("uint16", {"compression": "jpeg2000"}),
        ("uint16", {"bitspersample": 14}),
        ("uint8", {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unspecified"]}),
    ],
)
def test_decode__tiffs_that_pillow_misreads_or_does_not_know(kind: str, options: dict[str, Any]) -> None:
    pytest.importorskip("imagecodecs")
    channels = 4 if "extrasamples" in options else 1
    array = np.random.default_rng(0).integers(0, 255, (channels, 32, 48)).astype(kind)
    image = decode(tiff(array if channels > 1 else array[0], **options), Wanted(min(channels, 3)))
    assert np.array_equal(image.numpy(), array[:3])


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_decode__of_a_tiff_whose_zero_is_white_bright_is_high(kind: str) -> None:
    pages = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (2, 9, 13)).astype(kind)
    for count in (1, 2):
        image = decode(tiff(pages[:count], photometric="miniswhite"), Wanted(count, pages="bands"))
        assert np.array_equal(image.numpy(), np.iinfo(kind).max - pages[:count])


def test_decode__a_tiff_with_slices_in_one_page_is_refused() -> None:
    content = tiff(np.zeros((16, 9, 13), np.uint8), photometric="minisblack", volumetric=True, tile=(16, 16, 16))
    with pytest.raises(BadImage, match="a volume of 16 slices in one page"):
        decode(content, Wanted(1))


def test_decode__types_that_are_no_depth_become_the_nearest_one() -> None:
    values = np.arange(12).reshape(3, 4)
    for kind, depth in (("int8", "int16"), ("uint32", "float32"), ("float64", "float32"), (">u2", "uint16")):
        image = decode(saved(values.astype(kind)), Wanted(1))
        assert image.dtype == getattr(torch, depth)
        assert np.array_equal(image[0].numpy(), values)
    assert decode(saved(values > 5), Wanted(1)).unique().tolist() == [0, 255]


def test_decode__sixteen_bit_colour_png_keeps_its_depth() -> None:
    cv2 = pytest.importorskip("cv2")
    array = np.random.default_rng(0).integers(0, 65536, (9, 13, 4), dtype=np.uint16)
    for channels in (3, 4):
        content = cv2.imencode(".png", array[..., [2, 1, 0, 3][:channels]])[1].tobytes()
        for in_chans in range(3, channels + 1):
            image = decode(content, Wanted(in_chans))
            assert np.array_equal(image.numpy(), array[..., :in_chans].transpose(2, 0, 1))


@pytest.mark.parametrize("ending", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode__images_are_turned_as_their_exif_says(ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if ending == "JPEG" else {"lossless": True} if ending == "WEBP" else {}
    content = encoded(picture("RGB"), ending, exif=exif, **options)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image = decode(content, Wanted(3))
    assert image.shape == (3, *(SIDES if orientation < 5 else SIDES[::-1]))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(shown.convert("RGB")))


@pytest.mark.parametrize("ending", ["JPEG", "PNG", "WEBP"])
def test_decode__an_image_whose_exif_is_broken_is_upright(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(picture("RGB"), ending, exif=b"Exif\0\0no EXIF at all"))
    with Image.open(path) as image:
        stored = np.array(image)
    assert np.array_equal(decode(path, Wanted(3)).permute(1, 2, 0).numpy(), stored)
    assert orientation(path) == 1


def test_decode__a_tiff_of_an_orientation_that_there_is_not_is_not_turned(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 60000, (9, 13, 5), dtype=np.uint16)
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(array, photometric="minisblack", planarconfig="contig", extratags=[(274, "H", 1, 9)]))
    assert np.array_equal(decode(path, Wanted(5)).numpy(), array.transpose(2, 0, 1))
    assert orientation(path) == 1


def test_decode__pages_are_bands_or_frames_as_asked_and_never_cut_silently() -> None:
    pages = np.random.default_rng(0).integers(0, 60000, (5, 9, 13), dtype=np.uint16)
    content = tiff(pages)
    with pytest.raises(DataError, match=r"5 pages; stack\.tif; say --data_pages bands or frames"):
        decode(content, Wanted(1), name="stack.tif")
    assert np.array_equal(decode(content, Wanted(5, pages="bands")).numpy(), pages)
    for number, page in enumerate(pages):
        assert np.array_equal(decode(content, Wanted(1, pages="frames"), frame=number).numpy(), page[None])


def test_decode__smaller_copies_among_the_pages_are_passed_over() -> None:
    pages = np.random.default_rng(0).integers(0, 255, (2, 32, 40), dtype=np.uint8)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            writer.write(page[::4, ::4], subfiletype=1, photometric="minisblack")
            writer.write(page, photometric="minisblack")
    for number, page in enumerate(pages):
        found = decode(buffer.getvalue(), Wanted(1, pages="frames"), frame=number)
        assert np.array_equal(found.numpy(), page[None])
    assert np.array_equal(decode(buffer.getvalue(), Wanted(2, pages="bands")).numpy(), pages)


def test_decode__frames_of_a_folder_are_images_of_their_own(tmp_path: Path) -> None:
    pages = np.random.default_rng(0).integers(0, 255, (3, 9, 13), dtype=np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff(pages, photometric="minisblack"))
    picture("RGB").save(tmp_path / "b.png")
    images = folder_images(tmp_path, Wanted(1, pages="frames"))
    assert [*images.names] == ["a.tif#0", "a.tif#1", "a.tif#2", "b.png"]
    for number, page in enumerate(pages):
        assert np.array_equal(images.read(number).numpy(), page[None])


def test_decode__channels_that_are_not_wanted_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(np.zeros((9, 13, 5), np.uint16), photometric="minisblack", planarconfig="contig"))
    with pytest.raises(
        DataError,
        match=r"5 channels, not 4; .*image.tif; pretrain .* with --model.in_chans 5 \(prepare and doctor: .*\), or",
    ) as refused:
        decode(path, Wanted(4))
    assert "\n" not in str(refused.value)


def test_decode__grey_and_colour_become_each_other() -> None:
    colour = np.random.default_rng(0).integers(0, 60000, (9, 13, 3), dtype=np.uint16)
    grey = decode(saved(colour), Wanted(1))
    assert np.allclose(grey[0].numpy(), colour @ np.array([0.299, 0.587, 0.114]), atol=1)
    assert (decode(saved(colour[..., 0]), Wanted(3)).numpy() == colour[..., 0]).all()


def test_decode__a_jpeg_is_read_smaller_only_as_far_as_asked() -> None:
    large = Image.fromarray(np.array(picture("RGB").resize((333, 200))))
    content = encoded(large, "JPEG", quality=95)
    whole = decode(content, Wanted(3))
    for factor in (1, 2, 4, 8):
        sizes: list[tuple[int, int]] = []

        def reduce(height: int, width: int, factor: int = factor, sizes: list[tuple[int, int]] = sizes) -> int:
            sizes.append((height, width))
            return factor

        image = decode(content, Wanted(3), reduce=reduce)
        assert sizes == [(200, 333)]
        assert image.shape == (3, -(-200 // factor), -(-333 // factor))
        assert abs(image.float().mean() - whole.float().mean()) < 2


def test_decode__a_jpeg_has_the_same_values_as_from_pillow() -> None:
    for mode, options in (("RGB", {}), ("RGB", {"subsampling": 0, "progressive": True}), ("L", {}), ("CMYK", {})):
        content = encoded(picture(mode), "JPEG", **options)
        expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(decode(content, Wanted(3)).permute(1, 2, 0).numpy(), expected)


def dicom(values: np.ndarray, **fields: object) -> bytes:
    """A DICOM file of grey values H W, or of frames in colour F H W C."""
    pydicom = pytest.importorskip("pydicom")
    bits, colours = 8 * values.itemsize, values.shape[3] if values.ndim == 4 else 1
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.Rows, data.Columns = values.shape[1:3] if colours > 1 else values.shape
    data.SamplesPerPixel, data.PixelRepresentation = colours, int(values.dtype.kind == "i")
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PhotometricInterpretation, data.PixelData = "RGB" if colours > 1 else "MONOCHROME2", values.tobytes()
    if colours > 1:
        data.NumberOfFrames, data.PlanarConfiguration = len(values), 0
    for name, value in fields.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_decode__dicom_has_its_units() -> None:
    values = np.random.default_rng(0).integers(0, 4000, (9, 13), dtype=np.uint16)
    signed, inverse = values.astype(np.int16) - 2000, {"PhotometricInterpretation": "MONOCHROME1"}
    of_12_bits = {"BitsStored": 12, "HighBit": 11}
    for content, expected in (
        (dicom(values, **of_12_bits), values),
        (dicom(values, **of_12_bits, RescaleSlope=1, RescaleIntercept=-1024), values.astype(int) - 1024),
        (dicom(values, **of_12_bits, **inverse), 4095 - values),
        (dicom(signed), signed),
        (dicom(signed, **inverse), -1 - signed),
    ):
        assert np.array_equal(decode(content, Wanted(1))[0].numpy(), expected)


def test_decode__a_dicom_with_a_palette_has_its_colours(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 4, (9, 13), dtype=np.uint8)
    colours = np.random.default_rng(1).integers(0, 255, (4, 3), dtype=np.uint8)
    named = [f"{name}PaletteColorLookupTable" for name in ("Red", "Green", "Blue")]
    palette = {f"{name}Data": column.tobytes() for name, column in zip(named, colours.T, strict=True)}
    palette |= {f"{name}Descriptor": [4, 0, 8] for name in named}
    path = tmp_path / "ultrasound.dcm"
    path.write_bytes(dicom(numbers, PhotometricInterpretation="PALETTE COLOR", **palette))
    assert np.array_equal(decode(path, Wanted(3)).permute(1, 2, 0).numpy(), colours[numbers])
    assert peek(path).channels == 3


def test_decode__frames_of_a_colour_dicom_are_images_or_bands() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 9, 14, 3), dtype=np.uint8)
    content = dicom(frames)
    assert np.array_equal(decode(content, Wanted(3, pages="frames"), frame=2).permute(1, 2, 0).numpy(), frames[2])
    bands = decode(content, Wanted(12, pages="bands")).unflatten(0, (4, 3)).permute(0, 2, 3, 1)
    assert np.array_equal(bands.numpy(), frames)


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
    with pytest.raises(BadImage, match="too many"):
        decode(path, Wanted(3))
    assert time.process_time() - began < 0.2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KiB; the pixels would take 495,000


# -- no images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"just a text\n", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_decode__a_file_that_is_no_image_is_a_bad_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"\w"):
        decode(path, Wanted(3))


def test_decode__a_missing_file_and_a_folder_are_bad_images(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="FileNotFoundError"):
        decode(tmp_path / "nowhere.png", Wanted(3))
    with pytest.raises(BadImage, match="IsADirectoryError"):
        decode(tmp_path, Wanted(3))
