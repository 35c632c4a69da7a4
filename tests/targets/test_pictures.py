"""Pictures of targets and of what is predicted of them."""

import math
from typing import get_args

import pytest
import timm
import torch

from dmjd.backbones.feature_maps import FeatureMaps
from dmjd.targets import HOG, Pixels
from dmjd.targets.hog import HogVariant
from dmjd.targets.pixels import patchify, unpatchify
from dmjd.targets.teacher import FeatureTarget

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_unpatchify__undoes_patchify():
    image = noise(3, 24, 40)
    assert torch.equal(unpatchify(patchify(image[None], 8)[0], (3, 5), 8), image)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
def test_pixels__picture_of_a_perfect_prediction_is_the_image(standardize, in_chans):
    image = noise(in_chans, 32, 48)
    image[:, :16, :16] = 77  # a flat patch has no contrast to divide by
    target = Pixels(16, mean=(*MEAN, 0.5)[:in_chans], std=(*STD, 0.3)[:in_chans], standardize=standardize)
    values = target(image[None])
    assert (target.picture(values[0], image, values).int() - image.int()).abs().max() <= 1


def test_pixels__picture_of_what_is_not_finite_is_a_picture():
    image = noise(3, 16, 16)
    values = torch.tensor([math.nan, math.inf, -math.inf]).repeat(256)[None]
    picture = Pixels(16, mean=MEAN, std=STD).picture(values, image, values[None])
    assert picture.unique().tolist() == [0, 255]


@pytest.mark.parametrize("variant", get_args(HogVariant))
def test_hog__star_of_its_picture_is_where_its_cell_is(variant):
    values = torch.zeros(2, 2, 2, 9, 3)  # token, cell row and column, bin, channel
    values[1, 0, 1] = 3.0
    if variant != "dmjd":
        values = values.permute(0, 4, 3, 1, 2)
    picture = HOG(variant=variant).picture(values.flatten(1), noise(3, 16, 32), values.flatten(1)[None])[0]
    size = len(picture) // 2
    assert picture.shape == (2 * size, 4 * size)
    picture = picture.int()
    assert picture.sum() == picture[:size, 3 * size :].sum() > 0


@pytest.mark.parametrize("variant", get_args(HogVariant))
@pytest.mark.parametrize("degrees", range(10, 180, 20))  # of the gradient, from the columns to the rows
def test_hog__strokes_of_its_picture_lie_along_the_edges_of_the_image(degrees, variant):
    angle = torch.tensor(math.radians(degrees))
    place = torch.arange(48.0) - 24
    ramp = (127 + 2 * (place * angle.cos() + place[:, None] * angle.sin())).expand(3, 48, 48)
    target = HOG(16, cell_size=16, variant=variant)
    values = target(ramp[None])[0]
    star = target.picture(values, ramp.byte(), values[None])[0].unflatten(0, (3, -1)).unflatten(2, (3, -1))[1, :, 1]
    size = len(star)
    row, column = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
    star, across = star.double(), (star * column * row).double().sum()
    moments = torch.stack([(star * column**2).sum(), across, across, (star * row**2).sum()]).view(2, 2)
    along = torch.linalg.eigh(moments)[1][:, 1]
    gradient = torch.stack([angle.cos(), angle.sin()]).double()
    assert abs(along @ gradient) < math.sin(math.radians(11))  # half a bin, and a degree of the drawing


def features():
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 0}
    network = timm.create_model("vit_tiny_patch16_224", **shape, pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    return FeatureTarget(FeatureMaps(network), (2, 3))


def test_features__picture_shows_tokens_of_one_kind_in_one_colour():
    truth = torch.eye(5)[torch.tensor([0, 1, 2, 0, 1, 2])].expand(2, 6, 5)
    image = noise(3, 32, 48)
    picture = features().picture(truth[0], image, truth)
    assert picture.shape == image.shape
    colours = picture.view(3, 2, 16, 3, 16)
    assert (colours == colours[:, :, :1, :, :1]).all()  # a colour a token
    first, second = colours[:, 0, 0, :, 0], colours[:, 1, 0, :, 0]
    assert torch.equal(first, second)  # both rows hold the kinds 0, 1, 2
    assert len(first.unique(dim=1).T) == 3


def test_features__picture_of_few_numbers_and_of_none_is_a_picture():
    values = torch.full((6, 2), math.nan)
    assert features().picture(values, noise(1, 16, 24), values[None]).shape == (3, 16, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pictures__of_values_of_any_precision(dtype):
    image = noise(3, 32, 48)
    for target in (HOG(), Pixels(16, mean=MEAN, std=STD), Pixels(16, mean=MEAN, std=STD, standardize=True), features()):
        values = torch.rand(6, target.dim)
        exact, other = (target.picture(each, image, each[None]) for each in (values, values.to(dtype)))
        assert (exact.int() - other.int()).abs().double().mean() < 3
