"""The header of an image file, as stored: nothing is decoded, turned or converted."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import UnidentifiedImageError

from dmjd.data.decode import DICM, NUMPY, PNG, TIFF, BadImage, open_picture, open_regular, orientation, pages_of
from dmjd.errors import one_line

DEPTHS_OF_MODES = {"I": "int32", "F": "float32", "1": "bool"}  # modes of Pillow; those of 16 bits start with I;16


@dataclass(frozen=True)
class Peek:
    """Contents of a header.

    Attributes:
        channels: Channels of a page, without transparency and the black of CMYK, as after decoding.
        dtype: NumPy's name of the type that values are stored in.
        pages: Pages of a TIFF or frames of a medical image; 1 for any other file, animated ones included.
        turned: EXIF orientation, 1 (upright) to 8.
    """

    channels: int
    dtype: str
    pages: int = 1
    turned: int = 1


def peek(file: Path) -> Peek:
    """Read the header of an image file.

    Raises:
        BadImage: If it cannot be read.
    """
    try:
        with open_regular(file) as opened:
            head = opened.read(132)
        if head.startswith(TIFF):
            return _tiff(file)
        if head.startswith(NUMPY):
            return _array(file)
        if head[128:] == DICM:
            return _dicom(file)
        return _picture(file, head)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image of a known format") from None
    except Exception as error:  # decoders raise all kinds of errors
        raise BadImage(f"{type(error).__name__}: {one_line(error)}"[:200]) from None


def _picture(file: Path, head: bytes) -> Peek:
    with open_regular(file) as opened, open_picture(opened) as image:
        mode = image.mode
    deep = mode.startswith("I;16") or (head.startswith(PNG) and head[24] == 16)  # Pillow hides deep colour
    dtype = "uint16" if deep else DEPTHS_OF_MODES.get(mode, "uint8")
    grey = mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")
    return Peek(1 if grey else 3, dtype, turned=orientation(file))


def _tiff(file: Path) -> Peek:
    with open_regular(file) as opened, tifffile.TiffFile(opened) as tiff:
        pages = pages_of(tiff)
        page = pages[0]
        colour = page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED)
        alpha = page.photometric == tifffile.PHOTOMETRIC.RGB and page.samplesperpixel == 4 and page.dtype == np.uint8
        alpha = alpha and page.extrasamples != (tifffile.EXTRASAMPLE.UNSPECIFIED,)  # near infrared of a satellite
        return Peek(3 if colour or alpha else page.samplesperpixel, str(page.dtype), len(pages), orientation(file))


def _array(file: Path) -> Peek:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    # An image has fewer channels than rows or columns: they are first or last, whichever is smaller.
    channels = 1 if array.ndim == 2 else min(array.shape[0], array.shape[-1])
    return Peek(channels, str(array.dtype))


def _dicom(file: Path) -> Peek:
    import pydicom

    data = pydicom.dcmread(file, stop_before_pixels=True)
    dtype = f"{'int' if data.get('PixelRepresentation') else 'uint'}{data.BitsAllocated}"
    colour = data.get("PhotometricInterpretation") == "PALETTE COLOR"
    return Peek(3 if colour else int(data.get("SamplesPerPixel", 1)), dtype, int(data.get("NumberOfFrames", 1) or 1))
