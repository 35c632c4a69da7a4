"""Four maps of any backbone."""

import math

import pytest
import timm
import torch

from dmjd.backbones.convvit import create_convvit
from dmjd.backbones.pyramid import Pyramid
from dmjd.backbones.vit import create_vit
from dmjd.backbones.windows import Windows

SHAPE = {"image_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
BACKBONES = {
    **{
        f"vit, {patch} px": lambda patch=patch: create_vit("tiny", patch_size=patch, **SHAPE).backbone
        for patch in (16, 8, 4)
    },
    **{
        f"convvit, {patch} px": lambda patch=patch: create_convvit("tiny", patch_size=patch, **SHAPE).backbone
        for patch in (16, 8, 4)
    },
    "vit, 14 px, class and register tokens": lambda: timm.create_model(
        "vit_tiny_patch16_224", patch_size=14, embed_dim=32, depth=1, num_heads=2, reg_tokens=2
    ),
    "resnet10t": lambda: timm.create_model("resnet10t"),
    "convnext_atto": lambda: timm.create_model("convnext_atto"),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(97, 131), (64, 96), (33, 250)])
def test_pyramid__strides_are_what_they_claim(name, size):
    torch.manual_seed(0)
    pyramid = Pyramid(BACKBONES[name]()).eval()
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 3, *size))
    assert pyramid.strides == (4, 8, 16, 32)
    for features, stride, width in zip(maps, pyramid.strides, pyramid.channels, strict=True):
        assert features.shape == (1, width, math.ceil(size[0] / stride), math.ceil(size[1] / stride))


@pytest.mark.parametrize("name", ["vit, 16 px", "convvit, 16 px", "resnet10t"])
def test_pyramid__strides_hold_for_large_images(name):
    with torch.no_grad():
        maps = Pyramid(BACKBONES[name]()).eval()(torch.zeros(1, 3, 512, 640))
    assert [tuple(features.shape[-2:]) for features in maps] == [(128, 160), (64, 80), (32, 40), (16, 20)]


@pytest.mark.parametrize("name", BACKBONES)
def test_pyramid__places_stay_where_they_are(name):
    torch.manual_seed(0)
    pyramid = Pyramid(BACKBONES[name]()).eval()
    images = torch.zeros(1, 3, 96, 160)
    changed = images.clone()
    changed[..., 64:, 128:] = 3.0  # the lower right
    with torch.no_grad():
        before, after = pyramid(images), pyramid(changed)
    for one, other in zip(before, after, strict=True):
        strength = (one - other).abs().mean(dim=(0, 1))
        rows, columns = strength.shape
        assert strength[rows // 2 :, columns // 2 :].mean() > strength[: rows // 2, : columns // 2].mean()


@pytest.mark.parametrize(("name", "full"), [("vit, 16 px", (48, 96)), ("resnet10t", (64, 96))])
def test_pyramid__of_an_image_that_is_no_multiple_of_a_stride_what_is_missing_lies_below_and_to_the_right(name, full):
    pyramid, images = Pyramid(BACKBONES[name]()).eval(), torch.randn(1, 3, 40, 90)
    whole = torch.zeros(1, 3, *full)
    whole[..., :40, :90] = images
    with torch.no_grad():
        for features, expected in zip(pyramid(images), pyramid(whole), strict=True):
            rows, columns = features.shape[-2:]
            torch.testing.assert_close(features, expected[..., :rows, :columns])


def test_pyramid__a_hybrid_gives_the_maps_of_its_own_stages():
    backbone = BACKBONES["convvit, 16 px"]()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        own = backbone.forward_intermediates(images, intermediates_only=True)
        maps = Pyramid(backbone)(images)
    assert all(mine.equal(theirs) for mine, theirs in zip(maps, own, strict=True))


def test_pyramid__a_model_without_maps_is_a_value_error():
    with pytest.raises(ValueError, match="no feature maps"):
        Pyramid(torch.nn.Linear(2, 2))


def windowed_vit(**options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", patch_size=4, embed_dim=32, depth=8, num_heads=2, img_size=32, **options
    ).eval()


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_windows__as_large_as_the_image_change_nothing(options):
    plain, windowed = (Pyramid(windowed_vit(**options), window=window) for window in (None, 8))
    windowed.load_state_dict(plain.state_dict())  # the names of the weights stay
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for expected, found in zip(plain(image), windowed(image), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_windows__of_part_of_the_image_change_the_maps_and_not_their_sizes():
    plain, windowed = (Pyramid(windowed_vit(), window=window) for window in (None, 3))
    windowed.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        for expected, found in zip(plain(image), windowed(image), strict=True):
            assert found.shape == expected.shape
            assert not torch.allclose(found, expected, atol=1e-3)


def test_windows__tokens_see_other_windows_in_the_last_block_of_each_quarter_alone():
    vit = windowed_vit(class_token=False, global_pool="avg")
    pyramid = Pyramid(vit, window=2)
    assert pyramid.windows.windowed == [0, 2, 4, 6]
    tokens = torch.randn(1, 64, 32, requires_grad=True)
    pyramid.windows.grid = (8, 8)
    for block, reached in ((0, 4), (1, 64)):
        (gradient,) = torch.autograd.grad(vit.blocks[block](tokens)[0, 9].sum(), tokens)
        assert int((gradient[0].abs().sum(dim=1) > 0).sum()) == reached
    first = torch.autograd.grad(vit.blocks[0](tokens)[0, 9].sum(), tokens)[0][0].abs().sum(dim=1)
    assert first.nonzero().flatten().tolist() == [0, 1, 8, 9]  # the square of rows 0, 1 and columns 0, 1


def test_windows__patches_come_back_to_their_places_and_a_class_token_as_the_mean_over_windows():
    windows = Windows(create_vit("tiny", patch_size=8, class_token=True, **SHAPE).backbone, 2)
    windows.grid = (4, 6)
    tokens, other = torch.randn(3, 25, 32), torch.randn(18, 5, 32)
    torch.testing.assert_close(windows.join(windows.split(tokens)), tokens)
    torch.testing.assert_close(windows.join(other)[:, 0], other.unflatten(0, (3, 6))[:, :, 0].mean(dim=1))


def test_windows__leave_stochastic_depth_to_whole_images():
    vit = windowed_vit(drop_path_rate=0.5).train()
    pyramid, rows = Pyramid(vit, window=2), []
    for block in vit.blocks:
        block.drop_path1.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    pyramid(torch.randn(2, 3, 32, 32))
    assert {*rows} == {2}


def test_windows__of_a_convolutional_network_are_refused():
    with pytest.raises(ValueError, match="windows need a ViT"):
        Pyramid(timm.create_model("resnet10t"), window=4)


def test_pyramid__a_program_has_the_same_maps_and_no_pooling_that_onnx_lacks():
    pyramid = Pyramid(create_vit("tiny", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).backbone)
    images = torch.randn(1, 3, 72, 104)  # 9 x 13 tokens, of which 5 x 7 and 3 x 4 are made
    with torch.no_grad():
        program = torch.export.export(pyramid.eval(), (images,))
        torch.testing.assert_close(program.module()(images), pyramid(images))
    assert "adaptive_max_pool2d" not in str(program.graph)
