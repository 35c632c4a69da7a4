"""Sets by name: `shapes` made to measure, and what is downloaded read from its files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from dmjd.data import builtin
from dmjd.data.decode import Wanted
from dmjd.data.shapes import CLASSES
from dmjd.data.source import labels_of, open_all, open_source
from dmjd.errors import DataError


def test_shapes__is_made_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "SHAPES_SIZES", {"train": 24, "val": 12})
    for in_chans, hw, side in ((3, (32, 48), 48), (1, (8, 8), 16)):
        parts = open_source("shapes", Wanted(in_chans, hw))
        assert (len(parts.train), len(parts.held_out)) == (24, 12)
        assert parts.train.read(3).shape == (in_chans, side, side)
        assert parts.train.classes == CLASSES
        assert labels_of(parts.train, range(24)).tolist() == [*range(12), *range(12)]
        assert parts.held_out.name(7) == "shapes/val/00007"
        assert parts.train.in_memory


def test_shapes__in_grey_has_the_brightness_of_its_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "SHAPES_SIZES", {"train": 4, "val": 2})
    colour, grey = (open_source("shapes", Wanted(in_chans, (16, 16))).train.read(3).float() for in_chans in (3, 1))
    assert torch.allclose(grey[0], torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), colour, 1), atol=0.51)


def test_shapes__has_5000_and_1000_images() -> None:
    assert builtin.SHAPES_SIZES == {"train": 5000, "val": 1000}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return tmp_path


@pytest.mark.parametrize("in_chans", [1, 3])
def test_fashion_mnist__reads_a_folder_of_idx_files(mnist: Path, in_chans: int) -> None:
    train, held_out = open_source(f"fashion-mnist:{mnist}", Wanted(in_chans))
    assert (len(train), len(held_out)) == (5, 3)
    assert labels_of(train, range(5)).tolist() == [0, 1, 2, 3, 4]
    assert len(train.classes) == 10
    pixels = np.random.default_rng(5).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    assert torch.equal(train.read(4), torch.from_numpy(pixels[4]).expand(in_chans, -1, -1))
    assert train.read(4).is_contiguous()
    parts = open_all(f"fashion-mnist:{mnist}")
    assert [(len(part), part.name(1)) for part in parts] == [
        (5, "fashion-mnist/train/00001"),
        (3, "fashion-mnist/t10k/00001"),
    ]


@pytest.mark.parametrize("harm", ["truncated", "text", "missing", "short", "empty"])
def test_fashion_mnist__broken_files_are_a_data_error(mnist: Path, harm: str) -> None:
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "text":
        path.write_text("<html>not found</html>")
    elif harm == "missing":
        path.unlink()
    elif harm == "short":
        write_idx(path, np.zeros(2, np.uint8))
    else:
        path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"download .* again"):
        open_source(f"fashion-mnist:{mnist}")


@pytest.mark.long
def test_builtin__sets_have_colour_or_are_grey() -> None:
    with pytest.raises(DataError, match=r"3 channels, not 4; shapes/train; .* --model.in_chans 3 or 1"):
        open_source("shapes", Wanted(4))
