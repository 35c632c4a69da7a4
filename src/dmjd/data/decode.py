"""Safe decoding: any file becomes a tensor with the wanted channels at its own depth, or gives one reason why not."""

import ctypes
import logging
import math
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import simplejpeg
import tifffile
import torch
from jaxtyping import Num
from PIL import Image, ImageFile, UnidentifiedImageError, _imaging
from torch import Tensor

from dmjd.data.levels import Levels
from dmjd.errors import DataError, one_line

EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("avif", "bmp", "dcm", "gif", "jfif", "jp2", "jpeg", "jpg", "npy"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
# A small file may claim any number of pixels. This is 8192 x 8192: more than full-frame cameras have.
MAX_PIXELS = 2**26
MAX_BYTES = 2**29  # of a file, and of all the values of an image
MAX_PAGES = 2**16  # of a TIFF
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # the only ones that Pillow may try
JPEG = b"\xff\xd8\xff"  # first bytes of its files
APPLICATION = frozenset([*range(0xE0, 0xF0), 0xFE])  # markers of segments before the image: of programs, and comments
PNG = b"\x89PNG"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NUMPY = b"\x93NUMPY"
DICM = b"DICM"  # after 128 arbitrary bytes
ORIENTATION = 0x0112  # number of the tag in EXIF and TIFF
WHITE_IS_ZERO = 0  # among the photometric interpretations of a TIFF, as are:
PLAIN = (2, 5, 6)  # RGB, CMYK and YCbCr among the photometric interpretations of a TIFF
DIRECT = (1, 2)  # grey with 0 as black, and RGB: stored values are shown as they are
DEPTHS = tuple(map(np.dtype, ("uint8", "uint16", "int16", "float32")))  # that an image may have
DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.float32)  # the same; prepared sets store indices into this

# We report one reason for a broken file: loggers, and libtiff, which writes to stderr itself, are silenced.
for _name in ("PIL", "tifffile"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
# Nor is what decoders tolerate worth a line per file. `catch_warnings` is not thread-safe.
for _name in ("PIL", "tifffile", "pydicom", r"dmjd\.data\.(decode|peek)"):
    warnings.filterwarnings("ignore", module=_name)
with suppress(OSError, AttributeError):  # not every system finds libtiff through Pillow's library
    _libtiff = ctypes.CDLL(_imaging.__file__)
    _libtiff.TIFFSetErrorHandler(None)
    _libtiff.TIFFSetWarningHandler(None)

Reduce = Callable[[int, int], int]  # from height and width to the factor by which an image may be smaller: 1, 2, 4 or 8


@dataclass(frozen=True)
class Wanted:
    """How to read the images of a set.

    Attributes:
        in_chans: Channels. Grey and colour are converted into each other (3 and 1); any other number must match.
        image_hw: Height and width, for sets that are drawn to size.
        levels: Range from which images deeper than 8 bits are scaled to 0..255 (float32); None leaves them as they are.
        pages: What the pages of a TIFF are: channels of one image, or frames, each an image. None accepts files with
            one page only.
    """

    in_chans: int = 3
    image_hw: tuple[int, int] = (64, 64)
    levels: Levels | None = None
    pages: Literal["bands", "frames"] | None = None


class BadImage(Exception):
    """A file that does not decode; the message is the reason, in one line."""


class _Refused(Exception):
    """An error that concerns a whole set, not one file: what is wrong, and what to do about it."""


def decode(
    file: Path | str | bytes, wanted: Wanted, *, name: str | None = None, frame: int = 0, reduce: Reduce | None = None
) -> Num[Tensor, "C H W"]:
    """Read an image at its depth, uint8, uint16, int16 or float32, upright by its EXIF data.

    Of an animated image the first frame is read; colours of PPM and JPEG 2000 with more than 8 bits are read at 8. The
    format is recognised by content, not by name. Only regular files are opened, and none of more than `MAX_BYTES`
    bytes, or with more than `MAX_PIXELS` pixels by its header, is decoded.

    Args:
        file: Its path or its content.
        wanted: How to read it: channels, range and pages.
        name: Its name in messages. Default: its path.
        frame: Page to read, where pages are frames.
        reduce: How much smaller the image may be decoded, if its format allows that, as JPEG does.

    Raises:
        BadImage: If the file is missing, broken, suspiciously large or of an unknown format, or has NaN or infinite
            values.
        DataError: If it does not have the wanted channels, or has several pages and `wanted.pages` is None.
    """
    try:
        if isinstance(file, bytes):
            content = file
        else:
            with open_regular(file) as opened:
                content = opened.read()
        array = _jpeg(content, wanted, reduce) if content.startswith(JPEG) else None
        array = _decode(content, wanted, frame) if array is None else array
        return as_wanted(at_known_depth(array), wanted)
    except _Refused as refused:
        reason, advice = refused.args
        where = name or ("an image" if isinstance(file, bytes) else file)
        raise DataError(f"{reason}; {where}; {advice}") from None
    except UnidentifiedImageError:
        raise BadImage("not an image of a known format") from None
    except BadImage:
        raise
    except Exception as error:  # decoders raise all kinds of errors, and late: in `load` and `convert` as well
        raise BadImage(f"{type(error).__name__}: {one_line(error)}"[:200]) from None


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file for reading; a pipe, device or socket may never end.

    Raises:
        BadImage: If it is not a regular file, or has more than `MAX_BYTES` bytes.
        OSError: If it does not open.
    """
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
        return file
    file.close()
    raise BadImage("a file of more than 512 MiB" if stat.S_ISREG(status.st_mode) else "a pipe or a device, not a file")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for a writer


def open_picture(file: BinaryIO | BytesIO, formats: tuple[str, ...] | None = None) -> ImageFile.ImageFile:
    """Let Pillow read the header of an image in one of the known formats; its other decoders never see the file.

    Raises:
        BadImage: If there are too many pixels by the header.
        UnidentifiedImageError: If the format is none of these.
    """
    try:
        image = Image.open(file, formats=formats or _formats())
    except Image.DecompressionBombError:  # Pillow's own limit, above ours
        raise BadImage(f"pixels are too many; at most {MAX_PIXELS:,}") from None
    refuse_bomb(image.height, image.width)
    return image


def refuse_bomb(height: int, width: int, bytes_per_pixel: int = 1) -> None:
    """Refuse an image that would take too much memory, before it is allocated; raises `BadImage`."""
    if height * width > MAX_PIXELS or height * width * bytes_per_pixel > MAX_BYTES:
        raise BadImage(f"{height}x{width} pixels are too many; at most {MAX_PIXELS:,}, and {MAX_BYTES:,} bytes")


@cache
def _formats() -> tuple[str, ...]:
    """List the formats that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def count_pages(path: Path) -> int:
    """Count the pages of a TIFF or a DICOM file; any other file, or one that does not open, counts as one page."""
    ending = path.suffix.lower()
    if ending not in (".tif", ".tiff", ".dcm"):
        return 1
    try:
        if ending == ".dcm":
            import pydicom

            with open_regular(path) as file:
                return int(pydicom.dcmread(file, stop_before_pixels=True).get("NumberOfFrames", 1) or 1)
        with open_regular(path) as file, tifffile.TiffFile(file) as tiff:
            return max(len(pages_of(tiff)), 1)
    except Exception:  # reading it says why
        return 1


def orientation(path: Path) -> int:
    """Read the EXIF orientation by which `decode` turns an image, 1 (upright) to 8."""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with open_regular(path) as file, tifffile.TiffFile(file) as tiff:
                return _known_or_upright(pages_of(tiff)[0].tags.valueof(ORIENTATION))
        with open_regular(path) as file, open_picture(file) as image:
            return _turned(image)
    except Exception:  # an array or a medical image has none
        return 1


def _known_or_upright(turned: Any) -> int:
    """Read the value of the tag of an orientation, which may be missing or be anything."""
    return int(turned) if turned in range(1, 9) else 1


def turn(array: np.ndarray, turned: int) -> np.ndarray:
    """Turn and mirror an array as viewers do by an EXIF orientation."""
    if turned >= 5:
        array = array.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        array = array[::-1]
    if turned in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


# -- by format ---------------------------------------------------------------------------------------------------------


def _deep_png(content: bytes) -> np.ndarray:
    """Decode a PNG of 16-bit colour, or grey with transparency."""
    try:
        import cv2
    except ImportError:
        raise _Refused("PNG of 16-bit colour needs OpenCV", "pip install 'dmjd[codecs]'") from None
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    refuse_bomb(height, width, 8)
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise BadImage("a PNG that does not decode")
    return array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array  # OpenCV has blue first


def _jpeg(content: bytes, wanted: Wanted, reduce: Reduce | None) -> np.ndarray | None:
    """Decode a JPEG to the same values as Pillow, four times as fast for small ones; None leaves it to Pillow."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(content)
        if colour not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        turned = _orientation(content)
        factor = (reduce(width, height) if turned >= 5 else reduce(height, width)) if reduce else 1
        array = simplejpeg.decode_jpeg(
            content,
            "GRAY" if wanted.in_chans == 1 else "RGB",
            min_height=math.ceil(height / factor),
            min_width=math.ceil(width / factor),
        )
    except ValueError:  # broken, or unusual
        return None
    return turn(array, turned)


def _decode(content: bytes, wanted: Wanted, frame: int) -> np.ndarray:
    """Decode a file, whose format its first bytes tell, into an array H W or H W C."""
    if content.startswith(PNG) and content[24:26] in (b"\x10\2", b"\x10\4", b"\x10\6"):  # Pillow drops half of it
        return _without_alpha(_deep_png(content), wanted)
    if content.startswith(TIFF):
        return _tiff(content, wanted, frame)
    if content.startswith(NUMPY):
        return _channels_last(np.load(BytesIO(content), allow_pickle=False), wanted)
    if content[128:132] == DICM:
        return _dicom(content, wanted, frame)
    with open_picture(BytesIO(content)) as image:
        return _pillow(image, wanted)


def _orientation(content: bytes) -> int:
    """Read the EXIF orientation of a JPEG, 1 to 8, without opening those that have none, which are most."""
    place = 2
    while content[place + 4 : place + 8] != b"Exif":
        if content[place] != 0xFF or content[place + 1] not in APPLICATION:  # the image itself begins
            return 1
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    with open_picture(BytesIO(content)) as image:
        return _turned(image)


def _turned(image: Image.Image) -> int:
    """Read the EXIF orientation of an open image; with EXIF data that are broken it is upright, as in viewers."""
    try:
        return _known_or_upright(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow raises all kinds of errors
        return 1


def _pillow(image: Image.Image, wanted: Wanted) -> np.ndarray:
    """Decode an image with Pillow, deep images of one channel as they are."""
    image.load()  # turns a TIFF, which then has no orientation any more
    return turn(_values(image, wanted), _turned(image))


def _values(image: Image.Image, wanted: Wanted) -> np.ndarray:
    """Copy the values of an image that Pillow has decoded, as stored."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        return np.array(image)
    if wanted.in_chans in (1, 3):
        mode = "RGB" if wanted.in_chans == 3 else "L"
    else:
        mode = image.mode if image.mode in ("L", "LA", "RGBA", "CMYK") else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))  # converting would copy in any case


def _tiff(content: bytes, wanted: Wanted, frame: int) -> np.ndarray:
    """Decode a TIFF: plain images with Pillow, which knows more palettes and compressions, others with tifffile."""
    with tifffile.TiffFile(BytesIO(content)) as tiff:
        pages = pages_of(tiff)
        if len(pages) > 1 and wanted.pages is None:
            raise _Refused(f"{len(pages)} pages", "say --data_pages bands or frames")
        page = pages[frame]
        bands = pages if wanted.pages == "bands" else [page]
        if page.imagedepth > 1:
            raise BadImage(f"a volume of {page.imagedepth} slices in one page; write each as a page of its own")
        refuse_bomb(page.imagelength, page.imagewidth)
        if (size := sum(each.nbytes for each in bands)) > MAX_BYTES:
            raise BadImage(f"{size:,} bytes of pixels are too many; at most {MAX_BYTES:,}")
        if len(bands) > 1:
            return np.concatenate([_page(page) for page in pages], axis=-1)
        coloured = page.dtype == np.uint8 and page.photometric in PLAIN and wanted.in_chans in (1, 3)
        plain = (1, 3, 4) if coloured else (1,)
        floats = [np.float32] if tiff.byteorder == "<" else []  # big-endian: Pillow swaps twice, if compressed
        inverted = page.dtype == np.uint16 and page.photometric == WHITE_IS_ZERO  # Pillow inverts up to 8 bits only
        known = page.dtype in (np.uint8, np.uint16, np.bool_, *floats) and not inverted
        if page.samplesperpixel not in plain or not known:
            return _page(page)
        try:
            with open_picture(BytesIO(content), ("TIFF",)) as image:
                image.seek(page.index)  # its index among all pages, including smaller copies
                return _pillow(image, wanted)
        except UnidentifiedImageError:  # LERC, JPEG 2000, channels apart, 14 bits
            if page.photometric not in DIRECT:
                raise
            return _without_alpha(_page(page), wanted)


def pages_of(tiff: tifffile.TiffFile) -> list[Any]:
    """List the pages of a TIFF that are not smaller copies of others.

    Raises:
        BadImage: If they never end, because one names an earlier one as its successor.
    """
    every: Any = tiff.pages
    pages, places = [], set[int]()
    for page in every:
        if page.offset in places or len(places) == MAX_PAGES:
            raise BadImage(f"more than {MAX_PAGES:,} pages, or pages in a circle")
        places.add(page.offset)
        if not page.is_reduced:
            pages.append(page)
    return pages


def _page(page: Any) -> np.ndarray:
    """Decode a page into H W C."""
    array = np.asarray(page.asarray())
    if page.photometric == WHITE_IS_ZERO and array.dtype in (np.uint8, np.uint16):
        array = (2**page.bitspersample - 1) - array
    if page.axes.startswith("S"):  # channel by channel
        array = np.moveaxis(array, 0, -1)
    return turn(array if array.ndim == 3 else array[..., None], _known_or_upright(page.tags.valueof(ORIENTATION)))


def _dicom(content: bytes, wanted: Wanted, frame: int) -> np.ndarray:
    """Decode a DICOM file into its physical units, such as Hounsfield units; bright is high."""
    try:
        import pydicom
    except ImportError:
        raise _Refused("DICOM needs pydicom", "pip install 'dmjd[dicom]'") from None
    data = pydicom.dcmread(BytesIO(content))
    count = int(data.get("NumberOfFrames", 1) or 1)
    values = count * int(data.get("SamplesPerPixel", 1))  # of one place, over all frames
    refuse_bomb(data.Rows, data.Columns, values * math.ceil(data.BitsAllocated / 8))
    array = data.pixel_array
    if data.get("PhotometricInterpretation") == "PALETTE COLOR":
        array = pydicom.pixels.apply_color_lut(array, data)[..., :3]
    if count > 1:
        if wanted.pages is None:
            raise _Refused(f"{count} frames", "say --data_pages bands or frames")
        array = array[frame] if wanted.pages == "frames" else _frames_as_bands(array)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        array = ~array if array.dtype.kind == "i" else (1 << int(data.BitsStored)) - 1 - array
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    if (slope, intercept) == (1.0, 0.0):
        return array
    scaled = array * slope + intercept
    whole = slope.is_integer() and intercept.is_integer() and abs(scaled).max() < 2**15
    return scaled.astype(np.int16 if whole else np.float32)


def _frames_as_bands(frames: np.ndarray) -> np.ndarray:
    """Turn the frames of an image, F H W or F H W C, into channels; for colour, frame by frame."""
    last = np.moveaxis(frames, 0, 2)
    return last.reshape(*last.shape[:2], -1)


# -- channels and depth ------------------------------------------------------------------------------------------------


def _without_alpha(array: np.ndarray, wanted: Wanted) -> np.ndarray:
    """Drop the transparency of a grey or colour image, unless that many channels are wanted."""
    channels = array.shape[-1]
    return array[..., :-1] if channels in (2, 4) and channels != wanted.in_chans else array


def _channels_last(array: np.ndarray, wanted: Wanted) -> np.ndarray:
    """Tell C H W from H W C: channels are at the end with the wanted number, last if both, else at the smaller end."""
    if array.ndim not in (2, 3):
        raise BadImage(f"an array of {array.ndim} dimensions; an image has 2 or 3")
    ends = array.shape[0], array.shape[-1]
    first = wanted.in_chans != ends[1] and (ends[0] == wanted.in_chans or ends[0] < ends[1])
    return np.moveaxis(array, 0, -1) if array.ndim == 3 and first else array


def at_known_depth(array: np.ndarray) -> np.ndarray:
    """Convert values to the smallest known type that holds all values of their own type, or to float32.

    Raises:
        BadImage: If they are not real numbers, or not finite.
    """
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "buif":
        raise BadImage(f"values of type {array.dtype}, which are not brightness values")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    depth = next((each for each in DEPTHS if np.can_cast(array.dtype, each)), DEPTHS[-1])
    array = np.ascontiguousarray(array, dtype=depth)  # in the byte order of this machine
    if depth == DEPTHS[-1] and not np.isfinite(array).all():
        raise BadImage("values that are no finite numbers")
    return array


def as_wanted(array: np.ndarray, wanted: Wanted) -> Num[Tensor, "C H W"]:
    """Make an image from an array H W or H W C of a known depth, with the wanted channels and range."""
    image = torch.from_numpy(fit_channels(array, wanted.in_chans)).permute(2, 0, 1)
    return image if wanted.levels is None else wanted.levels.scale(image)


def fit_channels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """Give an array H W or H W C the wanted channels: grey is repeated, colour is weighted as in Pillow (BT.601)."""
    array = array if array.ndim == 3 else array[..., None]
    if not array.size:
        raise BadImage("no pixels")
    channels = array.shape[-1]
    if channels == in_chans:
        return array
    if (channels, in_chans) == (1, 3):
        return np.repeat(array, 3, axis=-1)
    if (channels, in_chans) == (3, 1):
        grey = array @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        return (grey if array.dtype == np.float32 else grey.round().astype(array.dtype))[..., None]
    raise _Refused(f"{channels} channels, not {in_chans}", channels_advice(channels))


def channels_advice(channels: int) -> str:
    """Say what to do about images that do not have the wanted channels, of a backbone or of a new one."""
    flags = f"--model.in_chans {channels} (prepare and doctor: --in_chans {channels})"
    return f"pretrain a backbone for such images with {flags}, or leave them out"
