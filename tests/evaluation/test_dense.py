"""What a segmenter or a detector is shown, and what it calls what it writes of it."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dmjd.engine.distributed import Ranks
from dmjd.errors import DataError
from dmjd.evaluation.dense import images_to_predict, output_name
from dmjd.evaluation.features import FeatureExtractor


def shown(path, backbone, **images):
    extractor = FeatureExtractor(str(backbone), ranks=Ranks(torch.device("cpu")), **images)
    return [(name, None if image is None else tuple(image.shape)) for name, image in images_to_predict(path, extractor)]


def test_images_to_predict__an_array_of_four_dimensions_is_a_set_and_one_of_three_an_image(backbones, tmp_path):
    pixels = np.zeros((4, 9, 8, 3), np.uint8)
    np.save(tmp_path / "set.npy", pixels)
    np.save(tmp_path / "one.npy", pixels[0])
    np.save(tmp_path / "first.npy", pixels[0].transpose(2, 0, 1))
    found = [("set/0000000", (3, 9, 8)), ("set/0000001", (3, 9, 8)), ("set/0000002", (3, 9, 8))]
    assert shown(tmp_path / "set.npy", backbones["vit"]) == [*found, ("set/0000003", (3, 9, 8))]
    assert shown(tmp_path / "one.npy", backbones["vit"]) == [("one.npy", (3, 9, 8))]
    assert shown(tmp_path / "first.npy", backbones["vit"]) == [("first.npy", (3, 9, 8))]


def test_images_to_predict__pages_that_are_images_have_names_of_their_own(backbones, tmp_path):
    tifffile.imwrite(tmp_path / "scan.tif", np.zeros((3, 9, 8), np.uint8), photometric="minisblack")
    names = [name for name, _ in shown(tmp_path, backbones["grey"], pages="frames")]
    assert names == ["scan.tif#0", "scan.tif#1", "scan.tif#2"]
    assert [output_name(name) for name in names] == ["scan#0", "scan#1", "scan#2"]


def test_images_to_predict__two_of_the_same_name_but_for_the_ending_are_refused(backbones, tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.new("RGB", (8, 9)).save(tmp_path / name)
    with pytest.raises(DataError, match=r"the same name but for the ending: a\.bmp and a\.png; .*; rename one$"):
        shown(tmp_path, backbones["vit"])


def test_images_to_predict__where_none_decodes_it_says_why_and_else_names_those_that_do_not(
    backbones, tmp_path, capsys
):
    (tmp_path / "a.png").write_text("no image")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(DataError, match=r"^none of 1 images decodes; a.png: not an image of .*; check /.*"):
            shown(path, backbones["vit"])
    assert not capsys.readouterr().err
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    assert shown(tmp_path, backbones["vit"]) == [("a.png", None), ("b.png", (3, 9, 8))]
    assert capsys.readouterr().err == f"warning: not an image of a known format; a.png of {tmp_path}; left out\n"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("cat/a.b.png", "cat/a.b"),
        ("images/0000001", "images/0000001"),
        ("cat/scan.tif#12", "cat/scan#12"),
        ("no#1.png", "no#1"),
        ("/data/cat/a.png", "data/cat/a"),
        ("../../cat/a.png", "cat/a"),
        ("https://there/a.png", "https:/there/a"),
    ],
)
def test_output_name__stays_below_its_folder_and_keeps_the_page(name, written):
    assert output_name(name) == written
