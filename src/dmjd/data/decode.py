"""Safe decoding: any file becomes a uint8 tensor of the wanted channels, or one reason why not."""

import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = frozenset(
    [
        ".bmp",
        ".gif",
        ".jfif",
        ".jpeg",
        ".jpg",
        ".jp2",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
        ".avif",
    ]
)
SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})


class BadImage(Exception):
    """A file that does not decode; the message is the reason, in one line."""


def decode(path: Path | str, in_chans: int) -> UInt8[Tensor, "C H W"]:
    """Read an image as 3 (RGB) or 1 (grey) channels of 0..255.

    16-bit images are scaled down to 8 bits, and float images of 0..1 up, where Pillow's own conversion would clip them
    to white and to black. An animated image gives its first frame.

    Raises:
        BadImage: If the file is missing, broken, suspiciously large or of an unknown kind.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a decoder tolerates is not worth a line per file and epoch
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                array = to_8_bits(image, "RGB" if in_chans == 3 else "L")
    except UnidentifiedImageError:
        raise BadImage("not an image of a known format") from None
    except Exception as error:  # decoders fail in every way there is, and late: in `load` and `convert` as well
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from None
    return torch.from_numpy(array.reshape(*array.shape[:2], in_chans)).permute(2, 0, 1)


def to_8_bits(image: Image.Image, mode: str) -> np.ndarray:
    """Convert to `RGB` or `L` without losing the range of deeper images."""
    if image.mode in SIXTEEN_BIT or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        highest = 1.0 if image.mode == "F" else 65535.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= highest):
            raise BadImage(f"values outside 0..{highest:g} in an image of mode {image.mode}")
        image = Image.fromarray((values * (255 / highest)).round().astype(np.uint8))
    return np.array(image.convert(mode))
