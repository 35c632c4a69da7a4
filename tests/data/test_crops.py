"""Crops have the size asked for and show what they are said to show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from dmjd.data.crops import RandomCrop, center_crop, resampling
from dmjd.random import mix_all

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": False}


def draw_of(crop: RandomCrop, image: Tensor, seed: int) -> Tensor:
    return crop.of_one(image, crop.draws(mix_all(torch.tensor([seed])))[0])


def cropped(
    image: Tensor,
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    seed: int = 0,
) -> Tensor:
    return draw_of(RandomCrop(size, scale, ratio, flip), image, seed)


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def coordinates(height: int, width: int) -> Tensor:
    """An image that says where it is: rows in the first channel, columns in the second."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return torch.stack([rows.expand(height, width), columns.expand(height, width)]).byte()


sides = st.integers(1, 50)
sizes = st.tuples(st.integers(2, 50), st.integers(2, 50))  # torch 2.14 cannot resize to a single pixel


@given(height=sides, width=sides, size=sizes, channels=st.sampled_from([1, 3]), seed=sides)
@settings(max_examples=60, deadline=None)
def test_random_crop__has_the_size_asked_for_whatever_the_image(
    height: int, width: int, size: tuple[int, int], channels: int, seed: int
) -> None:
    image = noise(channels, height, width)
    crop = cropped(image, size, scale=(0.05, 1.0), ratio=(0.5, 2.0), flip=True, seed=seed)
    assert crop.shape == (channels, *size)
    assert crop.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (1, 1), (7, 2000)])
def test_crops__take_extreme_aspects(shape: tuple[int, int]) -> None:
    image = noise(3, *shape)
    assert cropped(image, (16, 16), scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=True).shape == (
        3,
        16,
        16,
    )
    assert center_crop(image, (16, 16)).shape == (3, 16, 16)


def test_random_crop__of_everything_at_the_same_size_is_the_identity() -> None:
    image = noise(3, 32, 32)
    assert torch.equal(cropped(image, (32, 32), **WHOLE), image)


def test_random_crop__of_channels_last_they_stay_last_whatever_the_box() -> None:
    image = noise(3, 40, 30).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for ratio in (0.5, 1.0, 2.0):  # the last box is as wide as the image
        crop = cropped(image, (16, 24), scale=(0.7, 0.7), ratio=(ratio, ratio), flip=False)
        assert crop.permute(1, 2, 0).is_contiguous()


def test_random_crop__leaves_the_image_as_it_is() -> None:
    image = noise(3, 20, 30)
    before = image.clone()
    cropped(image, (16, 16), scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=True)
    assert torch.equal(image, before)


def test_random_crop__a_flat_image_stays_flat() -> None:
    image = torch.full((3, 40, 30), 77, dtype=torch.uint8)
    for seed in range(10):
        crop = cropped(image, (16, 24), scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=True, seed=seed)
        assert (crop == 77).all()


def boxes(count: int, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Heights and widths of the boxes cut out of an image of 200 x 200, read off where its crops begin and end."""
    image = coordinates(200, 200)
    size = (100, 100)
    crops = torch.stack(
        [cropped(image, size, scale=scale, ratio=ratio, flip=False, seed=s) for s in range(count)]
    ).float()
    heights = (crops[:, 0, 89, 50] - crops[:, 0, 10, 50]) * 100 / 79  # the borders are bent by the resizing
    widths = (crops[:, 1, 50, 89] - crops[:, 1, 50, 10]) * 100 / 79
    return heights, widths


def test_random_crop__areas_fill_the_scale_and_shapes_the_ratio() -> None:
    heights, widths = boxes(400, scale=(0.2, 0.5), ratio=(0.75, 4 / 3))
    area, shape = heights * widths / 200**2, widths / heights
    slack = 0.03
    assert area.min() > 0.2 * (1 - 2 * slack)
    assert area.max() < 0.5 * (1 + 2 * slack)
    assert abs(area.mean() - 0.35) < 0.015  # uniform
    assert shape.min() > 0.75 * (1 - 2 * slack)
    assert shape.max() < 4 / 3 * (1 + 2 * slack)
    assert abs(shape.log().mean()) < 0.03  # upright as often as lying


def test_random_crop__boxes_lie_everywhere_in_the_image() -> None:
    image = coordinates(100, 200)
    crops = [
        cropped(image, (50, 50), scale=(0.25, 0.25), ratio=(1.0, 1.0), flip=False, seed=s).float() for s in range(300)
    ]
    middles = torch.stack([crop.mean(dim=(1, 2)) for crop in crops])
    assert (middles.mean(dim=0) - torch.tensor([49.5, 99.5])).abs().max() < 5
    side = (0.25 * 100 * 200) ** 0.5
    low, high = middles.min(dim=0).values, middles.max(dim=0).values
    assert torch.allclose(low, torch.tensor([side / 2, side / 2]), atol=3)
    assert torch.allclose(high, torch.tensor([100 - side / 2, 200 - side / 2]), atol=3)


def test_random_crop__a_box_lies_at_every_place_equally_often() -> None:
    crop = RandomCrop((8, 8), (0.81, 0.81), (1.0, 1.0), flip=False)
    box = crop.box(crop.draws(mix_all(torch.arange(4000))), 10, 10)  # of 9 x 9 pixels
    for starts in (box.top, box.left):
        assert torch.bincount(torch.from_numpy(starts), minlength=2).tolist() == pytest.approx([2000, 2000], abs=150)


def test_random_crop__mirrors_half_of_the_images() -> None:
    image = noise(3, 8, 8)
    whole = WHOLE | {"flip": True}
    crops = [cropped(image, (8, 8), **whole, seed=seed) for seed in range(400)]
    mirrored = sum(torch.equal(crop, image.flip(-1)) for crop in crops)
    assert mirrored + sum(torch.equal(crop, image) for crop in crops) == 400
    assert 150 < mirrored < 250


def test_random_crop__without_flip_the_box_is_the_same() -> None:
    image = coordinates(64, 64)
    options = {"scale": (0.3, 0.9), "ratio": (0.75, 4 / 3)}
    for seed in range(8):
        plain = cropped(image, (16, 16), **options, flip=False, seed=seed)
        other = cropped(image, (16, 16), **options, flip=True, seed=seed)
        assert torch.equal(plain, other) or torch.equal(plain, other.flip(-1))


def lines(height: int, width: int) -> Tensor:
    """An image of sharp edges, where a bicubic overshoots."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (255 * ((rows // 3 + columns // 2) % 2)).byte().expand(3, height, width).contiguous()


@given(height=sides, width=sides, size=sizes, seed=st.integers(0, 2**40), flip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_crop__of_a_batch_is_that_of_each_image_but_for_rounding(
    height: int, width: int, size: tuple[int, int], seed: int, flip: bool
) -> None:
    crop = RandomCrop(size, (0.1, 1.0), (0.75, 4 / 3), flip)
    images = torch.stack([noise(3, height, width), lines(height, width), torch.full((3, height, width), 9).byte()])
    draws = crop.draws(mix_all(seed, torch.arange(len(images))))
    together = crop.of_many(images, draws)
    alone = torch.stack([crop.of_one(image, each) for image, each in zip(images, draws, strict=True)])
    assert together.shape == alone.shape
    assert together.dtype == torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1


def test_resampling__is_torchs_antialiased_bicubic_of_the_box_alone() -> None:
    signal = noise(1, 1, 60).float()
    for start, length, size in ((0, 60, 60), (0, 60, 25), (7, 31, 64), (13, 40, 7), (59, 1, 5)):
        places = (torch.tensor([start]), torch.tensor([length]), torch.tensor([0]))
        matrix = resampling(*places, side=60, size=size)[0]
        box = signal[..., start : start + length]
        expected = resize(box, [1, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
        assert torch.allclose(matrix @ signal[0, 0], expected[0, 0], atol=1e-2)
        assert torch.allclose(matrix.sum(dim=1), torch.ones(size))
        assert (matrix[:, :start] == 0).all()
        assert (matrix[:, start + length :] == 0).all()


def test_random_crop__an_image_is_read_smaller_only_where_its_box_stays_larger_than_the_crop() -> None:
    crop = RandomCrop((32, 32), (0.005, 1.0), (0.75, 4 / 3), flip=False)
    seen = set()
    for number in range(200):
        draws = crop.draws(mix_all(torch.tensor([number])))[0]
        box = crop.box(draws, 400, 300)
        factor = crop.factor(draws, 400, 300)
        seen.add(factor)
        assert factor in (1, 2, 4, 8)
        assert factor == 1 or min(int(box.height), int(box.width)) >= 32 * factor
        assert factor == 8 or min(int(box.height), int(box.width)) < 64 * factor
    assert seen == {1, 2, 4, 8}


def test_crops__keep_the_depth_of_an_image() -> None:
    for kind in (torch.uint8, torch.uint16, torch.int16, torch.float32):
        image = torch.full((5, 12, 20), 200, dtype=torch.int32).to(kind)
        for crop in (cropped(image, (8, 8), **WHOLE), center_crop(image, (8, 8))):
            assert crop.dtype == kind
            assert torch.allclose(crop.float(), torch.full((5, 8, 8), 200.0), atol=1e-3)


@given(height=sides, width=sides, size=sizes)
@settings(max_examples=60, deadline=None)
def test_center_crop__has_the_size_asked_for_whatever_the_image(height: int, width: int, size: tuple[int, int]) -> None:
    assert center_crop(noise(3, height, width), size).shape == (3, *size)


def test_center_crop__is_the_middle_of_an_image_that_just_covers() -> None:
    image = noise(3, 16, 30)
    assert torch.equal(center_crop(image, (16, 16)), image[..., 7:23])
    assert torch.equal(center_crop(image, (16, 30)), image)


def test_center_crop__of_a_larger_image_it_is_the_middle_of_the_whole_image_made_smaller() -> None:
    image = noise(3, 40, 90)
    whole = resize(image, [16, 36], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(center_crop(image, (16, 16)), whole[..., 10:26])
