"""Images of one array are what was saved, at its depth."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dmjd.data.decode import BadImage, Wanted
from dmjd.data.levels import Levels
from dmjd.data.source import Source, open_all, open_source
from dmjd.errors import DataError

WANTED = Wanted()


def saved(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def only(data: str, wanted: Wanted = WANTED) -> Source:
    (source,) = open_all(data, wanted)
    return source


def noise(*shape: int, kind: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(kind)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 8, 6, 1), (5, 1, 8, 6)])
def test_array__keeps_its_depth_and_repeats_grey(tmp_path, kind, shape):
    array = noise(*shape, kind=kind)
    source = only(saved(tmp_path / "x.npy", array))
    image = source.read(3)
    assert image.dtype == getattr(torch, kind)
    assert torch.equal(image, torch.from_numpy(array[3].reshape(1, 8, 6)).expand(3, -1, -1))
    assert (len(source), source.name(3), source.classes, source.in_memory) == (5, "x/0000003", (), False)


@pytest.mark.parametrize(
    ("kind", "kept"), [("bool", "uint8"), ("int8", "int16"), ("int64", "float32"), (">u2", "uint16")]
)
def test_array__other_types_become_the_nearest_depth(tmp_path, kind, kept):
    array = noise(2, 4, 4, kind="uint8") // 2
    array = array > 50 if kind == "bool" else array.astype(kind)
    image = only(saved(tmp_path / "x.npy", array), Wanted(in_chans=1)).read(1)
    assert image.dtype == getattr(torch, kept)
    expected = array[1].astype(np.float64) * (255 if kind == "bool" else 1)
    assert torch.equal(image[0].double(), torch.from_numpy(expected))


def test_array__channels_are_first_only_if_the_first_side_alone_has_their_number(tmp_path):
    array = noise(2, 5, 4, 6)
    assert torch.equal(only(saved(tmp_path / "x.npy", array), Wanted(in_chans=5)).read(0), torch.from_numpy(array[0]))
    assert only(saved(tmp_path / "x.npy", noise(2, 3, 6, 3))).read(0).shape == (3, 3, 6)
    assert only(saved(tmp_path / "x.npy", noise(2, 3, 6, 1)), Wanted(in_chans=1)).read(0).shape == (1, 3, 6)


def test_array__deep_values_are_scaled_and_those_that_are_no_numbers_refused(tmp_path):
    array = np.array([[[0.0, 50.0]], [[np.nan, 0.0]]], dtype=np.float32)
    source = only(saved(tmp_path / "x.npy", array), Wanted(in_chans=1, levels=Levels(0.0, 100.0)))
    assert source.read(0).tolist() == [[[0.0, 127.5]]]
    with pytest.raises(BadImage, match="no finite numbers"):
        source.read(1)


def test_array__a_list_beside_it_brings_labels_and_parts(tmp_path):
    array = noise(4, 5, 5, 3)
    data = saved(tmp_path / "x.npy", array)
    (tmp_path / "x.csv").write_text("label,split\n3,train\n10,test\n10,train\n3,train\n")
    train, held_out = open_source(data)
    assert train.classes == ("3", "10")
    assert [train.label(index) for index in range(3)] == [0, 1, 0]
    assert (held_out.name(0), held_out.label(0)) == ("x/0000001", 1)
    assert torch.equal(held_out.read(0), torch.from_numpy(array[1]).permute(2, 0, 1))


def test_array__only_its_path_travels(tmp_path):
    source = only(saved(tmp_path / "x.npy", noise(100, 50, 50, 3)))
    source.read(0)
    assert len(pickle.dumps(source)) < 10_000


BROKEN = {
    "no such array": None,
    r"7 channels, not 3; .*pretrain .* with --model.in_chans 7 \(prepare and doctor: --in_chans 7\), or": noise(
        2, 5, 5, 7
    ),
    r"no array of images but int64 of shape \(5,\)": np.arange(5),
    r"no array of images but uint8 of shape \(0, 4, 4\)": noise(0, 4, 4),
    "no array of images but complex64": np.zeros((2, 3, 3), dtype=np.complex64),
    "not an array that can be mapped": np.array([{}, None]),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_array__what_is_no_array_of_images_is_refused_in_one_line(tmp_path, reason):
    if BROKEN[reason] is not None:
        np.save(tmp_path / "x.npy", BROKEN[reason], allow_pickle=True)
    with pytest.raises(DataError, match=reason) as raised:
        open_all(str(tmp_path / "x.npy"))
    assert str(tmp_path / "x.npy") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_array__a_broken_file_or_a_list_that_does_not_fit_is_refused(tmp_path):
    data = saved(tmp_path / "x.npy", noise(4, 5, 5, 3))
    (tmp_path / "cut.npy").write_bytes(Path(data).read_bytes()[:300])
    with pytest.raises(DataError, match="not an array that can be mapped"):
        open_all(str(tmp_path / "cut.npy"))
    (tmp_path / "x.csv").write_text("label\na\nb\n")
    with pytest.raises(DataError, match="2 rows for 4 images"):
        open_all(data)
    (tmp_path / "x.csv").write_text("name\na\nb\na\nb\n")
    with pytest.raises(DataError, match="no column label or split"):
        open_all(data)
