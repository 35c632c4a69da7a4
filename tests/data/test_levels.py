"""Deep images are brought to 0..255 by the range that a set really uses, and normalised by what was measured of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmjd.data.annotated import AnnotatedSamples
from dmjd.data.decode import Wanted
from dmjd.data.folder import folder_images
from dmjd.data.labelled import LabelledSamples
from dmjd.data.levels import BYTES, Levels, levels_of
from dmjd.data.loader import read_batches
from dmjd.data.memory import PackedImages, stack_of
from dmjd.data.segmentation import open_segmentation
from dmjd.data.source import Scaled, measure_levels
from dmjd.data.statistics import Statistics, statistics_of
from dmjd.engine.distributed import Ranks
from dmjd.errors import ConfigError, DataError
from dmjd.evaluation.dense import decodable


def deep(*values: float, kind: torch.dtype = torch.uint16) -> Tensor:
    return torch.tensor(values).to(kind).view(1, 1, -1)


@pytest.mark.parametrize(
    ("images", "low", "high"),
    [
        ([deep(3, 4000)], 0, 4095),  # a camera of 12 bits
        ([deep(3, 100), deep(4095)], 0, 4095),
        ([deep(4096)], 0, 8191),
        ([deep(65535)], 0, 65535),
        ([deep(7)], 0, 255),  # never less than 8 bits
        ([deep(-1000, 3071, kind=torch.int16)], -1024, 4095),  # Hounsfield units
        ([deep(0.2, 0.9, kind=torch.float32)], 0, 1),
        ([deep(0.2, 200, kind=torch.float32)], 0, 255),
        ([deep(-3.5, 12, kind=torch.float32)], -3.5, 12),
        ([deep(0.25, 1.5, kind=torch.float32)], 0.25, 1.5),  # 0 to 255 would make all of it black
        ([deep(0, 0.125, kind=torch.float32)], 0, 0.125),
        ([deep(7, kind=torch.uint8)], 0, 255),
    ],
)
def test_levels_of__is_the_range_in_whole_bits_or_that_of_floats(images: list[Tensor], low: float, high: float) -> None:
    assert levels_of(images) == Levels(float(low), float(high))


def test_levels_of__one_value_everywhere_is_refused() -> None:
    with pytest.raises(DataError, match="all values of the images are -2"):
        levels_of([deep(-2, -2, kind=torch.float32)])


def test_scale__bytes_stay_and_multiples_of_257_come_back_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    levels = Levels(0.0, 65535.0)
    assert levels.scale(values) is values
    assert torch.equal(levels.scale((values.int() * 257).to(torch.uint16)), values.float())
    assert levels.scale(deep(-5.0, 70000.0, kind=torch.float32)).flatten().tolist() == [0.0, 255.0]
    assert torch.allclose(levels.scale(levels.widen(values)), values.float())


def write_arrays(root: Path, *arrays: np.ndarray) -> Path:
    root.mkdir()
    for number, array in enumerate(arrays):
        np.save(root / f"{number}.npy", array)
    return root


def test_measure_levels__none_where_there_is_nothing_to_scale(tmp_path: Path) -> None:
    flat = np.zeros((4, 4, 2), np.uint8)
    assert measure_levels(folder_images(write_arrays(tmp_path / "8", flat), Wanted(2))) is None
    images = folder_images(write_arrays(tmp_path / "16", flat, flat.astype(np.uint16) + 1000), Wanted(2))
    assert measure_levels(images) == Levels(0.0, 1023.0)
    scaled = Scaled(images, Levels(0.0, 1023.0))
    assert (scaled.read(0).dtype, scaled.read(1).dtype) == (torch.uint8, torch.float32)
    assert torch.allclose(scaled.read(1), torch.tensor(255 * 1000 / 1023))


def test_refuse_deep__wherever_unscaled_images_go_to_a_network(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, kind in (("a/0", np.uint8), ("b/1", np.uint16)):
            for folder in ("images", "annotations"):
                (tmp_path / folder / part / name).parent.mkdir(parents=True)
            values = np.arange(64).reshape(8, 8).astype(kind) * (3 if kind is np.uint8 else 300)
            Image.fromarray(values).save(tmp_path / "images" / part / f"{name}.png")
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2).save(
                tmp_path / "annotations" / part / f"{name}.png"
            )
    images = folder_images(tmp_path / "images" / "train", Wanted(1))
    train, held_out = open_segmentation(str(tmp_path), Wanted(1))
    options: dict[str, Any] = {"batch_size": 2, "workers": 0, "pin_memory": False}
    for read in (
        lambda: [*read_batches(images, [0, 1], Tensor.float, **options)],
        lambda: LabelledSamples(images, Tensor.float, 0)[0, 1],
        lambda: AnnotatedSamples(train, lambda *both: both, 0)[0, 1],
        lambda: [*decodable(held_out, Ranks(torch.device("cpu")))],
    ):
        with pytest.raises(DataError, match=r"a value of 18900, where .* 8 bits .*; b/1\.png; .*--data_range"):
            read()
    assert AnnotatedSamples(train, lambda *both: both, 0)[0, 0][0].dtype == torch.uint8


def test_statistics_of__are_those_of_all_pixels_whatever_the_depth() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8, generator=generator) for _ in range(5)]
    pixels = torch.stack(images).double() / 255
    found = statistics_of(images, BYTES)
    assert torch.allclose(torch.tensor(found.mean), pixels.mean(dim=(0, 2, 3)).float(), atol=1e-4)
    assert torch.allclose(torch.tensor(found.std), pixels.std(dim=(0, 2, 3), correction=0).float(), atol=1e-4)
    wide = [(image.int() * 257).to(torch.uint16) for image in images]
    assert statistics_of(wide, Levels(0.0, 65535.0)) == Statistics(found.mean, found.std, Levels(0.0, 65535.0))
    assert statistics_of([torch.zeros(2, 3, 3, dtype=torch.uint8)], BYTES).std == (0.001, 0.001)  # nothing to divide by
    with pytest.raises(DataError, match="no image of a sample decodes"):
        statistics_of([], BYTES)


def test_statistics__are_read_as_they_were_written(tmp_path: Path) -> None:
    written = Statistics((0.1, 0.2), (0.3, 0.4), Levels(0.0, 4095.0))
    written.write(tmp_path / "statistics.json")
    assert Statistics.read(tmp_path / "statistics.json") == written


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"mean": [1], "std": [0]}', '{"mean": [1, 2], "std": [1]}', '{"mean": "a", "std": "b"}'],
)
def test_statistics__of_anything_else_are_a_config_error_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "statistics.json").write_text(content)
    for path in (tmp_path / "statistics.json", tmp_path / "none.json"):
        with pytest.raises(ConfigError, match=r"no statistics \(.*\); .*\.json; give JSON") as refused:
            Statistics.read(path)
        assert "\n" not in str(refused.value)


def test_stack__is_there_where_images_have_one_size_and_depth(tmp_path: Path, write: Callable[..., Path]) -> None:
    images = np.random.default_rng(0).integers(0, 999, (5, 4, 6, 2), dtype=np.uint16)
    root = write_arrays(tmp_path / "same", *images)
    (root / "3.npy").write_bytes(b"broken")
    (root / "4.npy").write_bytes(b"broken")
    held = PackedImages(folder_images(root, Wanted(2)))
    stack = stack_of(held)
    assert stack is not None
    assert np.array_equal(stack.pixels.numpy(), images[:3].transpose(0, 3, 1, 2))
    assert stack.numbers.tolist() == [0, 1, 2, 0, 0]  # the next that decodes stands in
    assert torch.equal(stack.pixels[stack.rows[4]], held.read(0))
    assert [*held.broken] == ["3.npy", "4.npy"]
    assert stack.fits(torch.device("cpu"))
    other = write_arrays(tmp_path / "other", images[0], images[1, :3])
    assert stack_of(PackedImages(folder_images(other, Wanted(2)))) is None
    assert json.dumps(held.bad)  # plain reasons
