"""Classes and objects drawn over images."""

import numpy as np
import pytest
import torch

from dmjd.reports.overlays import class_colours, colour_pixels, legend_of, overlay_objects, overlay_pixels, rgb


def test_class_colours__are_distinct_stay_the_same_and_end_in_grey() -> None:
    colours = class_colours(30)
    assert len({tuple(colour) for colour in colours.tolist()}) == 31
    assert colours[-1].tolist() == [128, 128, 128]
    assert (class_colours(5)[:5] == colours[:5]).all()  # another class changes no colour


def test_legend__has_the_colours_as_css_writes_them() -> None:
    (first, second), colours = legend_of(["sky", "road"]), class_colours(2).tolist()
    assert (first[0], second[0]) == ("sky", "road")
    assert [int(first[1][place : place + 2], 16) for place in (1, 3, 5)] == colours[0]


@pytest.mark.parametrize(("channels", "shown"), [(1, [7, 7, 7]), (2, [7, 7, 7]), (3, [7, 8, 9]), (5, [7, 8, 9])])
def test_rgb__of_any_number_of_channels(channels: int, shown: list[int]) -> None:
    image = torch.arange(7, 7 + channels, dtype=torch.uint8)[:, None, None].expand(-1, 4, 6)
    picture = rgb(image)
    assert picture.shape == (4, 6, 3)
    assert picture[0, 0].tolist() == shown


def test_rgb__of_a_deep_image_is_rounded_and_kept_within_bounds() -> None:
    image = torch.tensor([-3.0, 99.6, 300.0])[:, None, None].expand(-1, 4, 6)
    assert rgb(image)[0, 0].tolist() == [0, 100, 255]


def test_pixels__have_the_colour_of_their_class_or_half_of_it() -> None:
    numbers = torch.tensor([[0, 1, 2]])
    assert (colour_pixels(numbers, 2)[0] == class_colours(2)).all()
    black = np.zeros((1, 3, 3), np.uint8)
    assert (overlay_pixels(black, numbers, 2)[0] == class_colours(2) // 2).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_objects__are_drawn_where_they_are(channels: int) -> None:
    image = torch.zeros(channels, 20, 30, dtype=torch.uint8)
    found = {"boxes": torch.tensor([[2.0, 3.0, 12.0, 13.0]]), "labels": torch.tensor([1])}
    picture = overlay_objects(image, found, ["a", "b"])
    assert picture[3, 7].tolist() == class_colours(2)[1].tolist()
    assert not picture[:, 16:].any()
    assert not picture[6:10, 6:9].any()
    inside = torch.zeros(1, 20, 30, dtype=torch.bool)
    inside[:, 6:10, 6:9] = True
    assert overlay_objects(image, found | {"masks": inside}, ["a", "b"])[6:10, 6:9].all(axis=2).any()
    assert not overlay_objects(image, {name: value[:0] for name, value in found.items()}, ["a", "b"]).any()
