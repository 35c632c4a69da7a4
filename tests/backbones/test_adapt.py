"""Weights in other shapes: channels, patches and positions."""

import pytest
import timm
import torch
from torch.nn.functional import cosine_similarity, interpolate

from dmjd.backbones.adapt import adapt
from dmjd.backbones.convvit import create_convvit
from dmjd.backbones.vit import create_vit

SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS = {"vit": create_vit, "convvit": create_convvit}


def network(kind="vit", **changes):
    return KINDS[kind]("tiny", **{**SHAPE, **changes}).backbone.eval()


def adapted(before, after):
    weights, changes = adapt(before.state_dict(), after)
    after.load_state_dict(weights, strict=False)
    return changes


def smooth(side, channels=3):
    """Images whose structure a smaller or larger copy keeps."""
    return interpolate(torch.rand(4, channels, 6, 6), (side, side), mode="bicubic")


@torch.no_grad()
def likeness(first, second):
    """Compare features less their mean over images, which untrained networks share."""
    return cosine_similarity(*(x - x.mean(dim=0) for x in (first, second))).min()


@pytest.mark.parametrize("kind", KINDS)
def test_adapt__to_the_same_shapes_changes_nothing(kind):
    before = network(kind)
    weights, changes = adapt(before.state_dict(), network(kind))
    assert not changes
    assert weights.keys() == before.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_adapt__twice_the_patches_and_the_image_give_nearly_the_same_features(kind):
    before, after, images = network(kind, patch_size=8), network(kind, image_size=64, patch_size=16), smooth(32)
    assert adapted(before, after) == [{"vit": "patches 8 -> 16 px", "convvit": "patches 2 -> 4 px"}[kind]]
    larger = interpolate(images, (64, 64), mode="bicubic")
    with torch.no_grad():
        assert likeness(before(images), after(larger)) > 0.95 > likeness(before(images), network(kind)(images))


@pytest.mark.parametrize(("kind", "any_size"), [("vit", {"dynamic_img_size": True}), ("convvit", {})])
def test_adapt__twice_the_grid_is_what_a_network_for_any_size_makes_of_larger_images(kind, any_size):
    before, after, images = network(kind, **any_size), network(kind, image_size=64), smooth(64)
    assert adapted(before, after) == ["positions 4x4 -> 8x8"]
    with torch.no_grad():
        torch.testing.assert_close(after(images), before(images))


def test_adapt__twice_the_grid_keeps_features_of_an_enlarged_image_close():
    before, after, images = network(), network(image_size=64), smooth(32)
    adapted(before, after)
    larger = interpolate(images, (64, 64), mode="bicubic")
    with torch.no_grad():
        unlike = network(image_size=64)(larger)
        assert likeness(before(images), after(larger)) > 0.5 > likeness(before(images), unlike)


def test_adapt__a_grid_that_is_no_square_is_brought_to_another():
    before, after = network(image_size=(32, 64)), network(image_size=(64, 32))
    weights, changes = adapt(before.state_dict(), after, grid=(4, 8))
    assert changes == ["positions 4x8 -> 8x4"]
    assert weights["pos_embed"].shape == after.pos_embed.shape
    with pytest.raises(ValueError, match="do not form a square: pos_embed"):
        adapt(before.state_dict(), after)


@pytest.mark.parametrize("kind", KINDS)
def test_adapt__grey_images_give_the_features_of_their_colour_copies(kind):
    before, after, images = network(kind), network(kind, in_chans=1), smooth(32, channels=1)
    assert adapted(before, after) == ["channels 3 -> 1"]
    with torch.no_grad():
        torch.testing.assert_close(after(images), before(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("given", "channels"), [(3, 2), (3, 5), (4, 3), (12, 1)])
def test_adapt__more_or_fewer_channels_of_the_same_keep_the_features(given, channels):
    grey, images = network(in_chans=given), smooth(32, channels=1)
    first = grey.patch_embed.proj.weight
    with torch.no_grad():
        first.copy_(first.mean(dim=1, keepdim=True).expand(first.shape))
    after = network(in_chans=channels)
    adapted(grey, after)
    with torch.no_grad():
        expected = grey(images.expand(-1, given, -1, -1))
        torch.testing.assert_close(after(images.expand(-1, channels, -1, -1)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("theirs", [True, False])
def test_adapt__a_class_token_of_one_network_alone_is_left_out_or_new(theirs):
    before, after = network(class_token=theirs), network(class_token=not theirs)
    own = {name: value.clone() for name, value in after.state_dict().items()}
    assert not adapted(before, after)
    if not theirs:
        assert torch.equal(after.cls_token, own["cls_token"])
        assert torch.equal(after.pos_embed[:, :1], own["pos_embed"][:, :1])
    assert torch.equal(after.pos_embed[:, -16:], before.pos_embed[:, -16:])
    assert torch.equal(after.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)


def test_adapt__the_position_of_a_class_token_that_both_have_is_that_of_the_weights():
    before, after = network(class_token=True), network(class_token=True, image_size=64)
    with torch.no_grad():
        before.pos_embed[:, 0] = 7
    assert (adapt(before.state_dict(), after).weights["pos_embed"][:, 0] == 7).all()


def test_adapt__pooling_by_attention_is_left_out():
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    before, after = timm.create_model("vit_base_patch16_siglip_224", **shape), network()
    assert "attn_pool.latent" in before.state_dict()
    assert not adapted(before, after)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())


@pytest.mark.parametrize("changes", [{"depth": 1}, {"depth": 3}, {"embed_dim": 16}])
def test_adapt__another_depth_or_width_is_refused_with_the_first_keys(changes):
    with pytest.raises(ValueError, match=r"another architecture: (blocks\.|pos_embed|patch_embed)"):
        adapt(network(**changes).state_dict(), network())
