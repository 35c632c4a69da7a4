"""An image file is a set of one, an array a set, and all else what `--data` takes."""

import numpy as np
import pytest
from PIL import Image

from dmjd.data.decode import BadImage, Wanted
from dmjd.data.single import open_all_or_one
from dmjd.errors import DataError


def test_open_all_or_one__an_image_an_array_and_a_folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.PNG")
    (one,) = open_all_or_one(str(tmp_path / "folder" / "1.PNG"), Wanted())
    assert (len(one), one.name(0), one.classes) == (1, "1.PNG", ())
    np.testing.assert_array_equal(one.read(0).permute(1, 2, 0).numpy(), pixels[1])
    assert [len(*open_all_or_one(str(tmp_path / name), Wanted())) for name in ("folder", "images.npy")] == [3, 3]
    with pytest.raises(DataError, match="no such data"):
        open_all_or_one(str(tmp_path / "gone.png"), Wanted())


@pytest.mark.parametrize(
    ("shape", "in_chans", "count"),
    [
        ((9, 8), 3, 1),
        ((9, 8, 3), 3, 1),
        ((3, 9, 8), 3, 1),
        ((9, 8, 3), 1, 1),
        ((9, 8, 1), 3, 1),
        ((9, 8, 5), 5, 1),
        ((4, 9, 8), 3, 4),
        ((4, 9, 8), 1, 4),
        ((4, 9, 8, 3), 3, 4),
        ((4, 9, 8, 1), 1, 4),
    ],
)
def test_open_all_or_one__an_array_of_three_dimensions_is_an_image_unless_none_of_them_is_of_channels(
    shape, in_chans, count, tmp_path
):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    (found,) = open_all_or_one(str(tmp_path / "a.npy"), Wanted(in_chans=in_chans))
    assert len(found) == count
    assert found.read(0).shape == (in_chans, 9, 8)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_open_all_or_one__an_array_of_too_few_dimensions_is_a_bad_image(shape, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros(shape, np.uint8))
    (one,) = open_all_or_one(str(tmp_path / "few.npy"), Wanted())
    with pytest.raises(BadImage, match=f"{len(shape)} dimensions"):
        one.read(0)
