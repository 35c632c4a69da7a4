"""The hybrid equals its dense formulation and does no work on hidden tokens."""

import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from torch.nn import functional as F

import dmjd
from dmjd.backbones.convvit import SIZES, ConvBlock, ConvViT, create_convvit
from dmjd.backbones.depthwise import layout_of, nested_positions
from dmjd.backbones.files import save_backbone
from dmjd.engine.distributed import Ranks
from dmjd.evaluation.features import FeatureExtractor
from dmjd.masking import token_ids

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plain.hybrid import PlainHybrid, plain_classifier, plain_latents


def encoder_of(grid, *, in_chans=3, patch_size=16, depth=1, seed=0):
    torch.manual_seed(seed)
    size = (grid[0] * patch_size, grid[1] * patch_size)
    encoder = create_convvit(
        "tiny", image_size=size, patch_size=patch_size, in_chans=in_chans, embed_dim=16, depth=depth, num_heads=2
    )
    for parameter in encoder.parameters():  # zeros and ones would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def masks_of(grid, views, mask_ratio, batch_size=2):
    predict_ratio = min(1.0, round(views * mask_ratio, 4))
    return dmjd.disjoint_masks(
        batch_size, grid[0] * grid[1], num_views=views, mask_ratio=mask_ratio, predict_ratio=predict_ratio
    )


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    in_chans=st.integers(1, 4),
    patch_size=st.sampled_from([4, 8, 16]),
    views=st.integers(1, 3),
    mask_ratio=st.sampled_from([0.25, 0.5, 0.75]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_convvit__visible_rows_equal_the_dense_formulation(grid, in_chans, patch_size, views, mask_ratio, seed):
    if grid[0] * grid[1] * (1 - mask_ratio) < 1:
        mask_ratio = 0.5
    encoder = encoder_of(grid, in_chans=in_chans, patch_size=patch_size, seed=seed).double()
    images = torch.randn(2, in_chans, grid[0] * patch_size, grid[1] * patch_size, dtype=torch.float64)
    tokens = token_ids(masks_of(grid, views, mask_ratio))
    results = []
    for forward in (lambda: encoder(images, tokens).visible, lambda: plain_latents(encoder, images, tokens)):
        encoder.zero_grad()
        latents = forward()
        latents.square().mul(torch.linspace(1, 2, latents.shape[-1])).sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        results.append((latents.detach(), gradients))
    (ours, our_gradients), (dense, dense_gradients) = results
    torch.testing.assert_close(ours, dense, atol=1e-10, rtol=1e-10)
    assert our_gradients.keys() == dense_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, dense_gradients[name], atol=1e-9, rtol=1e-10)


def test_plain_hybrid__is_the_same_step_with_the_same_gradients():
    model = dmjd.build("dmjd", "tiny", image_size=(48, 64), embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16)
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    masked = dmjd.block_masks(2, (3, 4), num_views=2, mask_ratio=0.6)
    results = []
    for form in (model, PlainHybrid(model)):
        model.zero_grad()
        losses = form(images, token_ids(masked))
        losses.total.backward()
        results.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_convvit__hidden_pixels_have_exactly_zero_gradient():
    grid, views = (3, 4), 2
    encoder = encoder_of(grid)
    images = torch.randn(2, 3, 48, 64, requires_grad=True)
    masked = masks_of(grid, views, 0.5)
    latents = encoder(images, token_ids(masked)).visible
    assert latents.shape == (4, 6, 16)
    for row in range(4):
        (gradient,) = torch.autograd.grad(latents[row].square().sum(), images, retain_graph=True)
        image, view = divmod(row, views)
        per_token = gradient[image].unflatten(1, (3, 16)).unflatten(3, (4, 16)).abs().amax(dim=(0, 2, 4)).flatten()
        assert (per_token[masked[image, view]] == 0).all()
        assert (per_token[~masked[image, view]] > 0).all()
        assert (gradient[1 - image] == 0).all()


def test_convvit__a_visible_token_sees_its_visible_neighbours():
    encoder = encoder_of((1, 3), depth=1)
    encoder.backbone.blocks3 = torch.nn.ModuleList()  # convolutions only
    masked = torch.tensor([[[False, False, True]]])
    images = torch.randn(1, 3, 16, 48, requires_grad=True)
    first = encoder(images, token_ids(masked)).visible[0, 0]
    (gradient,) = torch.autograd.grad(first.sum(), images)
    assert gradient[..., 16:32].abs().max() > 0


@pytest.mark.parametrize("side", [2, 4])
def test_nested_positions__four_neighbours_of_a_stage_make_one_of_the_next(side):
    grid = (2, 3)
    numbers = nested_positions(grid, side)
    assert sorted(numbers.flatten().tolist()) == list(range(6 * side * side))
    width = grid[1] * side
    for quad in numbers.view(-1, 4).tolist():
        row, column = divmod(quad[0], width)
        assert row % 2 == 0
        assert column % 2 == 0
        assert quad == [quad[0], quad[0] + 1, quad[0] + width, quad[0] + width + 1]


@pytest.mark.parametrize("size", [(48, 64), (32, 32)])
def test_convvit__full_image_equals_the_dense_formulation(size):
    model = ConvViT(size, num_classes=7, embed_dims=(8, 8, 16), depths=(1, 2, 1), num_heads=2).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(images), plain_classifier(model, images), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (128, 48)])
def test_convvit__features_only_has_the_strides_it_claims(size):
    model = timm.create_model("convvit_tiny", features_only=True, img_size=64)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.randn(1, 3, *size))
    for found, stride, channels in zip(maps, (4, 8, 16, 32), model.feature_info.channels(), strict=True):
        assert found.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))


def test_convvit__features_only_keeps_no_weights_that_no_map_needs():
    model = timm.create_model("convvit_tiny", features_only=True, img_size=64)
    sum(found.sum() for found in model(torch.randn(1, 3, 64, 64))).backward()
    unused = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not unused  # DDP waits for gradients of all


def test_convvit__small_images_have_as_many_tokens():
    for image_size, patch_size in ((32, 4), (64, 8)):
        assert create_convvit("tiny", image_size=image_size, patch_size=patch_size).grid == (8, 8)


def test_convvit__wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="tokens of 16 px"):
        create_convvit("tiny", image_size=40)
    with pytest.raises(ValueError, match="choose one of tiny"):
        create_convvit("huge")
    with pytest.raises(ValueError, match="tokens of 16 px"):
        timm.create_model("convvit_tiny", img_size=64)(torch.randn(1, 3, 40, 64))


def test_convvit__backbone_file_gives_the_same_features_and_maps(tmp_path):
    encoder = encoder_of((3, 4), in_chans=1).eval()
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, encoder.backbone, encoder.architecture, [0.5], [0.25])
    images = torch.randn(2, 1, 48, 64)
    loaded = dmjd.load_backbone(path)
    torch.testing.assert_close(loaded(images), encoder.backbone(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.forward_features(images), encoder.backbone.forward_features(images))
    loaded.reset_classifier(5)
    assert loaded(images).shape == (2, 5)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_convvit__has_the_official_parameter_counts():
    with torch.device("meta"):
        assert round(parameters(dmjd.build("dmjd", "base")) / 1e6, 3) == 135.886
        assert round(parameters(timm.create_model("convvit_base")) / 1e6, 2) == 88.79
        assert round(parameters(timm.create_model("convvit_base", mlp_ratios=(4.0, 4.0, 4.0))) / 1e6, 2) == 85.37


@pytest.mark.parametrize("size", list(SIZES))
def test_convvit__is_registered_with_timm(size):
    with torch.device("meta"):
        model = timm.create_model(f"convvit_{size}", num_classes=0)
    assert model.num_features == SIZES[size]["embed_dims"][2]
    assert model.no_weight_decay() == {"pos_embed"}


def test_convvit__layers_for_layer_decay_are_the_published_ones():
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model("convvit_tiny", num_classes=3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    layers = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {name: layers[id(p)] for name, p in model.named_parameters() if id(p) in layers}
    assert by_name["head.weight"] == by_name["fc_norm.weight"] == 1
    assert by_name["blocks3.5.mlp.fc1.weight"] == 0.5
    assert by_name["blocks3.0.mlp.fc1.weight"] == 0.5**6
    assert by_name["patch_embed4.weight"] == by_name["blocks1.0.conv1.weight"] == by_name["pos_embed"] == 0.5**7


def test_convvit__is_initialised_as_the_official_program_does():
    torch.manual_seed(0)
    model = dmjd.build("dmjd", "tiny", image_size=64, depth=2, decoder_depth=2)
    seen = set()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.LayerNorm) and layer.elementwise_affine:
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
        elif isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            matrix = layer.weight.detach().flatten(1)
            fan_out, fan_in = matrix.shape
            xavier = isinstance(layer, torch.nn.Linear) or name.endswith("patch_embed3.proj")
            bound = math.sqrt(6 / (fan_in + fan_out)) if xavier else fan_in**-0.5
            assert 0.9 * bound < matrix.abs().max() <= bound, name
            assert matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            if isinstance(layer, torch.nn.Linear):
                assert (layer.bias == 0).all()
            else:
                assert 0.8 * fan_in**-0.5 < layer.bias.abs().max() <= fan_in**-0.5, name
            seen.add((type(layer).__name__, xavier))
    assert seen == {
        ("Linear", True),
        ("PatchMerge", True),
        ("PatchMerge", False),
        ("Pointwise", False),
        ("Conv2d", False),
    }


def test_convvit__its_features_are_the_mean_over_tokens_after_an_untrained_norm(backbones):
    extractor = FeatureExtractor(str(backbones["convvit"]), ranks=Ranks(torch.device("cpu")))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mean = extractor.model.forward_features(images).mean(dim=(2, 3))
        features = extractor.pooled(images, normalized=True)
    torch.testing.assert_close(features, F.layer_norm(mean, mean.shape[1:], eps=1e-6))
    assert not list(extractor.model.fc_norm.parameters())


def test_convvit__drop_rate_drops_that_share_of_features_before_the_head_while_training():
    torch.manual_seed(0)
    model = timm.create_model("convvit_tiny", img_size=32, num_classes=192, drop_rate=0.25)
    model.head = torch.nn.Identity()
    features = torch.ones(64, 192, 2, 2)  # a norm of equal numbers gives its bias
    torch.nn.init.ones_(model.fc_norm.bias)
    torch.testing.assert_close(model.train().forward_head(features).unique(), torch.tensor([0, 4 / 3]))
    assert (model.forward_head(features) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(model.eval().forward_head(features), torch.ones(64, 192))


def test_convvit__checkpointing_changes_no_gradient():
    model = timm.create_model("convvit_tiny", img_size=64, num_classes=3).train()
    images, found = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_convvit__without_pooling_every_token_is_normed_and_classified():
    pooled, every = (
        timm.create_model("convvit_tiny", img_size=(32, 48), num_classes=3, global_pool=pool).eval()
        for pool in ("avg", "")
    )
    every.load_state_dict(pooled.state_dict())
    images = torch.randn(2, 3, 32, 48)
    token = pooled.forward_features(images)[..., 1:, 2:]
    assert every(images).shape == (2, 3, 2, 3)
    torch.testing.assert_close(every(images)[..., 1, 2], pooled.forward_head(token))
    every.reset_classifier(0)
    assert every(images).shape == (2, 192, 2, 3)
    pooled.reset_classifier(0, "")
    torch.testing.assert_close(pooled(images), every(images))


@pytest.mark.parametrize("size", [(32, 48), (64, 48), (48, 32)])
def test_convvit__positions_are_interpolated_to_another_size_once_or_at_every_image(size, tmp_path):
    encoder, images = encoder_of((4, 6), patch_size=8).eval(), torch.randn(1, 3, *size)
    model, (name, arguments) = encoder.backbone, encoder.architecture
    expected = model(images)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, model, (name, arguments), [0.5] * 3, [0.25] * 3)
    known = {"file": str(path), "input_size": (3, 32, 48), "num_classes": 0}
    arguments["img_size"] = size
    opened = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=known, **arguments).eval()
    model.set_input_size(size)
    save_for_hf(model, str(tmp_path / "hub"))
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    for each in (opened, model, again):
        assert each.pos_embed.shape[1] == size[0] * size[1] // 64
        torch.testing.assert_close(each(images), expected)
    assert not model.pos_embed.requires_grad  # as before


@pytest.mark.parametrize("name", ["convvit_tiny", "vit_tiny_patch16_224"])
def test_forward_intermediates__maps_come_from_the_first_to_the_last_and_each_once(name):
    model, images = timm.create_model(name, img_size=32, num_classes=0).eval(), torch.randn(1, 3, 32, 32)
    found = model.forward_intermediates(images, indices=[-1, 0, -2, -1], intermediates_only=True)
    count = len(model.feature_info)
    expected = model.forward_intermediates(images, indices=[0, count - 2, count - 1], intermediates_only=True)
    torch.testing.assert_close(found, expected)


def test_convvit__what_it_cannot_do_is_said():
    model = timm.create_model("convvit_tiny", img_size=64, num_classes=0)
    with pytest.raises(ValueError, match="no other pooling than 'avg'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NHWC")


def test_conv_block__stochastic_depth_leaves_out_whole_maps():
    torch.manual_seed(0)
    block, rows = ConvBlock(8, 2.0, drop_path=0.5).train(), torch.randn(32 * 16, 8)
    layout = layout_of(torch.arange(4).expand(32, -1), (2, 2), 2)
    moved = (block(rows, layout) != rows).any(dim=1).view(32, 16)
    assert (moved.all(dim=1) | ~moved.any(dim=1)).all()
    assert 0 < moved[:, 0].sum() < 32


def test_convvit__stochastic_depth_grows_from_the_first_block_to_the_last():
    model = timm.create_model("convvit_tiny", drop_path_rate=0.7)
    places = [block.drop_path for block in (*model.blocks1, *model.blocks2)]
    places += [block.drop_path1 for block in model.blocks3]
    assert [place.drop_prob for place in places] == pytest.approx([0.1 * number for number in range(8)])
