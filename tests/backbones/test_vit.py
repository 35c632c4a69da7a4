"""Any ViT of timm becomes an encoder that a hidden pixel cannot reach."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models import save_for_hf

import dmjd
from dmjd.backbones.blocks import QueryBlock, transformer_blocks
from dmjd.backbones.files import save_backbone
from dmjd.backbones.positions import sincos_positions
from dmjd.backbones.vit import ViT, create_vit
from dmjd.masking import token_ids

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def masks(encoder, batch_size=2, views=2, mask_ratio=0.5):
    generator = torch.Generator().manual_seed(0)
    rows, columns = encoder.grid
    predict_ratio = min(1.0, views * mask_ratio)
    return dmjd.disjoint_masks(
        batch_size,
        rows * columns,
        num_views=views,
        mask_ratio=mask_ratio,
        predict_ratio=predict_ratio,
        generator=generator,
    )


@pytest.mark.parametrize("mask_token", [False, True])
@pytest.mark.parametrize(
    ("image_size", "patch_size", "in_chans", "class_token", "reg_tokens"),
    [(32, 8, 3, False, 0), ((24, 40), 8, 1, True, 0), ((16, 32), 4, 5, True, 2), (32, 16, 2, False, 3)],
)
def test_vit__hidden_pixels_have_exactly_zero_gradient(
    mask_token, image_size, patch_size, in_chans, class_token, reg_tokens
):
    encoder = create_vit(
        "tiny",
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        class_token=class_token,
        reg_tokens=reg_tokens,
        mask_token=mask_token,
        **TINY,
    )
    rows, columns = encoder.grid
    images = torch.randn(2, in_chans, rows * patch_size, columns * patch_size, requires_grad=True)
    masked = masks(encoder)
    latents = encoder(images, token_ids(masked))
    prefix = int(class_token) + reg_tokens
    tokens = rows * columns
    assert latents.prefix.shape == (4, prefix, 32)
    assert latents.visible.shape == (4, tokens // 2, 32)
    assert (latents.hidden is not None) == mask_token
    everything = torch.cat([latent for latent in latents if latent is not None], dim=1)
    for row, of_row in enumerate(everything.unflatten(0, (2, 2)).flatten(0, 1)):
        (gradient,) = torch.autograd.grad(of_row.square().sum(), images, retain_graph=True)
        image, view = divmod(row, 2)
        pixels = gradient[image].unflatten(1, (rows, patch_size)).unflatten(3, (columns, patch_size))
        per_token = pixels.abs().amax(dim=(0, 2, 4)).flatten()
        assert (per_token[masked[image, view]] == 0).all()
        assert (per_token[~masked[image, view]] > 0).all()
        assert (gradient[1 - image] == 0).all()


def test_vit__a_view_equals_timm_on_the_kept_tokens():
    encoder = create_vit("tiny", image_size=32, patch_size=8, class_token=True, **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    masked = masks(encoder, views=1)
    latents = encoder(images, token_ids(masked))
    vit = encoder.backbone
    x = vit._pos_embed(vit.patch_embed(images))
    for image in range(2):
        kept = torch.cat([x[image, :1], x[image, 1:][~masked[image, 0]]])[None]
        expected = vit.norm(vit.blocks(kept))[0]
        torch.testing.assert_close(torch.cat([latents.prefix[image], latents.visible[image]]), expected)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2"],
)
def test_vit__wraps_any_vision_transformer_of_timm(name):
    model = timm.create_model(name, depth=1, img_size=28 if "14" in name else 32)
    if not isinstance(model, timm.models.VisionTransformer):
        pytest.skip(f"{name} is no VisionTransformer in this timm")
    encoder = ViT(model)
    size = encoder.grid[0] * encoder.patch_size
    latents = encoder(torch.randn(1, 3, size, size), token_ids(masks(encoder, batch_size=1)))
    assert latents.visible.shape == (2, 2, encoder.embed_dim)


def test_vit__convolutions_before_the_tokens_are_refused_as_hidden_pixels_would_leak():
    with pytest.raises(ValueError, match="would see hidden pixels"):
        ViT(timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1))


@pytest.mark.parametrize("pooling", [{"global_pool": "avg"}, {"global_pool": "map"}], ids=str)
def test_vit__weights_of_pooling_are_refused_as_nothing_would_train_them(pooling):
    shape = {"img_size": 32, "patch_size": 8, "num_classes": 0, "class_token": False}
    with pytest.raises(ValueError, match="pools by weights"):
        ViT(timm.create_model("vit_tiny_patch16_224", **shape, **TINY, **pooling))


def test_vit__with_a_mask_token_it_equals_timm_on_images_whose_hidden_patches_are_that():
    encoder = create_vit("tiny", image_size=32, patch_size=8, mask_token=True, class_token=True, **TINY).eval()
    images, masked = torch.randn(2, 3, 32, 32), masks(encoder)
    vit, flat = encoder.backbone, masked.flatten(0, 1)
    patches = vit.patch_embed(images).repeat_interleave(2, dim=0)
    patches[flat] = encoder.mask_token[0, 0]
    expected = vit.norm(vit.blocks(vit._pos_embed(patches)))
    latents = encoder(images, token_ids(masked))
    torch.testing.assert_close(latents.prefix, expected[:, :1])
    torch.testing.assert_close(latents.visible.flatten(0, 1), expected[:, 1:][~flat])
    torch.testing.assert_close(latents.hidden.flatten(0, 1), expected[:, 1:][flat])


def test_vit__sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="whole patches"):
        create_vit("tiny", image_size=30, patch_size=8)
    with pytest.raises(ValueError, match="choose one of tiny"):
        create_vit("huge")


def test_positions__tell_every_token_apart_on_non_square_grids():
    positions = sincos_positions((3, 5), 16)[0]
    distances = torch.cdist(positions, positions) + torch.eye(15)
    assert positions.shape == (15, 16)
    assert distances.min() > 0.1
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions((3, 5), 18)


def test_query_block__equals_the_whole_block_where_it_counts():
    (block,) = transformer_blocks(32, 1, 4, 4.0)
    queries = QueryBlock(32, 4, mlp_ratio=4.0, qkv_bias=True)
    queries.load_state_dict(block.state_dict())
    tokens = torch.randn(2, 9, 32)
    torch.testing.assert_close(queries(tokens[:, -4:], tokens), block(tokens)[:, -4:])


@pytest.mark.parametrize("class_token", [False, True])
def test_backbone_file__plain_timm_gives_the_same_features(tmp_path, class_token):
    encoder = create_vit("tiny", image_size=(32, 48), patch_size=8, in_chans=1, class_token=class_token, **TINY).eval()
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, encoder.backbone, encoder.architecture, [0.5], [0.25])
    images = torch.randn(2, 1, 32, 48)

    ours = dmjd.load_backbone(path)
    torch.testing.assert_close(ours(images), encoder.backbone(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.forward_features(images), encoder.backbone.forward_features(images))
    assert ours.pretrained_cfg["mean"] == [0.5]
    assert tuple(ours.pretrained_cfg["input_size"]) == (1, 32, 48)
    assert timm.data.resolve_model_data_config(ours)["crop_pct"] == 1  # accuracies here are of such crops

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    timms = timm.create_model(
        metadata["architecture"], **json.loads(metadata["model_args"]), checkpoint_path=str(path)
    ).eval()
    torch.testing.assert_close(timms(images), encoder.backbone(images), atol=1e-5, rtol=1e-5)


def test_backbone_file__what_timm_saves_of_it_opens_again(tmp_path):
    encoder = create_vit("tiny", image_size=32, patch_size=8, in_chans=1, **TINY).eval()
    path, images = tmp_path / "backbone.safetensors", torch.randn(2, 1, 32, 32)
    save_backbone(path, encoder.backbone, encoder.architecture, [0.5], [0.25], value_range=(0.0, 4095.0))
    ours = dmjd.load_backbone(path)
    assert ours.value_range == [0.0, 4095.0]
    save_for_hf(ours, str(tmp_path / "hub"))
    opened = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    torch.testing.assert_close(opened(images), encoder.backbone(images))


def test_backbone_file__anything_else_is_a_clear_error(tmp_path):
    from dmjd.errors import CheckpointError

    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    for name, message in (("missing.safetensors", "no such backbone"), ("broken.safetensors", "not a backbone file")):
        with pytest.raises(CheckpointError, match=message):
            dmjd.load_backbone(tmp_path / name)
