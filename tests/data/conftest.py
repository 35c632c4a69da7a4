"""What tests of data share: folders of small images."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def write() -> Write:
    """Write images of noise, each another, into a folder; `size` is width and height."""

    def written(root: Path, *names: str, size: tuple[int, int] = (6, 4)) -> Path:
        for number, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return root

    return written


@pytest.fixture(scope="session")
def peak() -> Callable[[Callable[[], object]], int]:
    """Measure how many bytes Python and NumPy take while something is called, at most."""

    def measured(call: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measured


@pytest.fixture(scope="session")
def turn_file() -> Callable[..., Path]:
    """Write an image anew, in a format by its ending, with an EXIF orientation and the stored pixels as they are."""

    def turned(path: Path, orientation: int, ending: str = "png") -> Path:
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as image:
            image.load()
        path.unlink()
        image.save(path.with_suffix(f".{ending}"), exif=exif, quality=100)
        return path.with_suffix(f".{ending}")

    return turned


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, write: Write) -> Path:
    """Eleven images, of which 006.png does not decode."""
    root = write(tmp_path_factory.mktemp("images"), *(f"{number:03d}.png" for number in range(11)), size=(24, 20))
    (root / "006.png").write_bytes((root / "006.png").read_bytes()[:200])
    return root
