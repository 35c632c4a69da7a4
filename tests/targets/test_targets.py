"""Targets are what their formulas say, for any size and any number of channels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.feature import hog as skimage_hog

from dmjd import hog
from dmjd.targets import HOG, Pixels
from dmjd.targets.hog import hog_cells
from dmjd.targets.pixels import patchify


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def slow_gradient(image, i, j, variant):
    """Both arguments of atan2 at one pixel, in Python's own doubles."""
    height, width = image.shape
    if variant == "dmjd":
        down = image[i + 1][j] - image[i - 1][j] if 0 < i < height - 1 else 0
        across = image[i][j + 1] - image[i][j - 1] if 0 < j < width - 1 else 0
        return float(down), float(across)

    def at(row, column):  # reflected at the border
        row, column = abs(row), abs(column)
        return image[2 * height - 2 - row if row >= height else row][
            2 * width - 2 - column if column >= width else column
        ]

    across = sum(weight * (at(i + k, j - 1) - at(i + k, j + 1)) for k, weight in ((-1, 1), (0, 2), (1, 1)))
    down = sum(weight * (at(i - 1, j + k) - at(i + 1, j + k)) for k, weight in ((-1, 1), (0, 2), (1, 1)))
    return float(across), float(down)


def slow_cells(image, cell, variant="dmjd"):
    """HOG of one channel by loops, in Python's own doubles."""
    height, width = image.shape
    pixels = image.double().numpy()
    cells = torch.zeros(height // cell, width // cell, 9, dtype=torch.float64)
    for i in range(height // cell * cell):
        for j in range(width // cell * cell):
            rising, running = slow_gradient(pixels, i, j, variant)
            angle = math.degrees(math.atan2(rising, running)) % 180
            weight = 1 / cell**2 if variant == "dmjd" else 1
            if variant == "mmpretrain":
                near = [((place % (2 * cell)) - (2 * cell - 1) / 2) / cell for place in (i, j)]
                weight = math.exp(-0.5 * (near[0] ** 2 + near[1] ** 2))
            cells[i // cell, j // cell, int(angle // 20) % 9] += math.hypot(rising, running) * weight
    return cells


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    channels=st.integers(1, 4),
    cell=st.sampled_from([2, 4, 8]),
    levels=st.sampled_from([1, 2, 256]),
    variant=st.sampled_from(["dmjd", "maskfeat", "mmpretrain"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_hog__equals_a_slow_loop(rows, columns, channels, cell, levels, variant, seed):
    image = noise(1, channels, rows * cell, columns * cell, seed=seed).float()
    image = (image * ((levels - 1) / 255)).round() * (255 // max(levels - 1, 1))  # flat, black and white, grey
    ours = hog_cells(image, cell, variant)[0]
    for channel in range(channels):
        slow = slow_cells(image[0, channel], cell, variant)
        torch.testing.assert_close(ours[channel].double(), slow, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("variant", ["maskfeat", "mmpretrain"])
def test_hog__other_variants_have_cells_of_norm_1_by_channel_bin_cell_row_cell_column(variant):
    images = noise(2, 3, 32, 48)
    cells = hog_cells(images, 8, variant)
    token = hog(images, variant=variant)[1, 4].view(3, 9, 2, 2)  # second row, middle column
    wanted = cells[1, 1, 3, 2]
    torch.testing.assert_close(token[1, :, 1, 0], wanted / wanted.norm())
    torch.testing.assert_close(hog(images * 0, variant=variant), torch.zeros(2, 6, 108))
    assert HOG(variant=variant)(images).equal(hog(images, variant=variant))


def test_hog__images_are_independent_of_the_batch_they_are_in():
    images = noise(7, 1, 16, 32)
    for variant in ("dmjd", "maskfeat", "mmpretrain"):
        alone = torch.cat([hog(image[None], variant=variant) for image in images])
        assert hog(images, variant=variant).equal(alone)


def test_hog__needs_less_than_five_times_the_memory_of_its_images():
    images = noise(32, 3, 64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        hog(images)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert images.numel() < peak < 5 * 4 * images.numel()  # bytes of float32


def test_hog__equals_scikit_image_without_block_normalisation():
    image = noise(1, 1, 32, 48)
    theirs = skimage_hog(
        image[0, 0].numpy().astype(float),
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        feature_vector=False,
    )  # L2-Hys over one cell's bins is a monotone rescaling: compare directions
    ours = hog_cells(image)[0, 0].double()
    theirs = torch.from_numpy(theirs).squeeze()
    clipped = (ours / ours.norm(dim=-1, keepdim=True)).clamp(max=0.2)
    torch.testing.assert_close(clipped / clipped.norm(dim=-1, keepdim=True), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("patch_size", "cell_size", "width"), [(16, 8, 108), (8, 8, 27), (32, 8, 432), (4, 2, 108)])
def test_hog__width_is_cells_times_bins_times_channels(patch_size, cell_size, width):
    images = noise(2, 3, 2 * patch_size, 3 * patch_size)
    assert hog(images, patch_size, cell_size=cell_size).shape == (2, 6, width)
    assert HOG(patch_size, cell_size=cell_size).dim == width


def test_hog__orders_cell_row_cell_column_bin_channel():
    images = noise(1, 3, 32, 32)
    cells = torch.nn.functional.layer_norm(hog_cells(images), (9,))
    token = hog(images)[0, 3].view(2, 2, 9, 3)  # the lower right token
    torch.testing.assert_close(token[1, 0, 5, 2], cells[0, 2, 3, 2, 5])


def test_hog__a_flat_image_has_no_direction():
    assert hog(torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)).abs().max() == 0


def test_hog__float_images_of_0_to_255_are_the_same_images():
    images = noise(2, 3, 32, 32)
    assert hog(images).equal(hog(images.float()))


@pytest.mark.parametrize(("size", "patch_size", "cell_size"), [(32, 12, 8), (30, 16, 8), (32, 4, 8)])
def test_hog__sizes_that_do_not_divide_are_refused(size, patch_size, cell_size):
    with pytest.raises(ValueError, match="whole"):
        hog(noise(1, 3, size, size), patch_size, cell_size=cell_size)


@given(
    patch=st.sampled_from([1, 2, 4, 7]), rows=st.integers(1, 3), columns=st.integers(1, 3), channels=st.integers(1, 5)
)
def test_patchify__token_holds_its_pixels_row_column_channel(patch, rows, columns, channels):
    images = noise(2, channels, rows * patch, columns * patch)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, rows * columns, patch * patch * channels)
    last = tokens[1, -1].view(patch, patch, channels)
    assert last.permute(2, 0, 1).equal(images[1, :, -patch:, -patch:])


def test_pixels__are_normalised_by_the_data():
    target = Pixels(4, mean=(0.5,), std=(0.25,))
    assert target(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)).unique().tolist() == [2.0]


def test_pixels__standardised_patches_have_mean_0_and_unbiased_variance_1():
    tokens = Pixels(8, mean=(0.5,) * 3, std=(0.25,) * 3, standardize=True)(noise(2, 3, 16, 16))
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(dim=-1), torch.ones(2, 4), atol=1e-4, rtol=0)


def test_pixels__a_flat_patch_is_zero_not_a_division_by_zero():
    flat = torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)
    assert Pixels(8, mean=(0.5,) * 3, std=(0.25,) * 3, standardize=True)(flat).abs().max() < 1e-2


def test_pixels__a_patch_flat_but_for_one_pixel_has_a_millionth_added_to_its_variance():
    spot = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    spot[..., 0, 0] = 1
    (token,) = Pixels(8, mean=(0.0,), std=(1.0,), standardize=True)(spot)[0]
    value = 1 / 255  # and its variance among 64 pixels is value^2 / 64
    expected = (value - value / 64) / (value**2 / 64 + 1e-6) ** 0.5  # 7.9 without it
    assert token[0].item() == pytest.approx(expected, rel=1e-4)
