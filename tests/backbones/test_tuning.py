"""What fine-tuning changes of a backbone from pre-training: head, last norm and positions."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay
from torch.nn import functional as F

import dmjd
from dmjd.backbones.convvit import create_convvit
from dmjd.backbones.files import create_network, open_backbone, put_head, save_backbone
from dmjd.backbones.positions import sincos_positions
from dmjd.backbones.pyramid import Pyramid
from dmjd.backbones.vit import create_vit
from dmjd.config.pretrain import ModelSettings
from dmjd.errors import ConfigError
from dmjd.factory import create_encoder
from dmjd.initialization import StartingWeights

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def tuned(tmp_path):
    """A ViT with a head and random weights, and its file."""
    encoder = create_vit("tiny", class_token=True, **TINY)
    model, architecture = put_head(encoder.backbone, encoder.architecture, 5)
    for parameter in model.parameters():  # zeros and ones would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path / "tuned.safetensors"
    save_backbone(path, model, architecture, [0.5] * 3, [0.25] * 3)
    return model, path


def test_put_head__a_vit_of_ours_norms_the_mean_of_its_patches_and_not_its_tokens(tuned):
    model, _ = tuned
    images = torch.randn(2, 3, 32, 32)
    tokens = model.blocks(model._pos_embed(model.patch_embed(images)))
    normed = F.layer_norm(tokens[:, 1:].mean(dim=1), (16,), model.fc_norm.weight, model.fc_norm.bias, eps=1e-6)
    torch.testing.assert_close(model(images), F.linear(normed, model.head.weight, model.head.bias))


def test_put_head__the_norm_is_new_and_the_one_of_tokens_is_gone():
    encoder = create_vit("tiny", **TINY)
    torch.nn.init.normal_(encoder.backbone.norm.weight)
    model, (_, arguments) = put_head(encoder.backbone, encoder.architecture, 5)
    names = {name for name, _ in model.named_parameters()}
    assert {"fc_norm.weight", "fc_norm.bias"} <= names
    assert not names & {"norm.weight", "norm.bias"}
    assert (model.fc_norm.weight == 1).all()
    assert (model.fc_norm.bias == 0).all()
    assert arguments["fc_norm"] is True


def test_put_head__models_of_timm_keep_their_pooling():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    before = model.norm.weight
    put_head(model, ("vit_tiny_patch16_224", {}), 5)
    assert model.norm.weight is before
    assert isinstance(model.fc_norm, torch.nn.Identity)
    assert model.global_pool == "token"


def test_tuned_vit__opens_again_with_and_without_its_head(tuned):
    model, path = tuned
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(dmjd.load_backbone(path)(images), model(images))
    backbone, architecture = open_backbone(str(path))
    torch.testing.assert_close(backbone(images), model.forward_head(model.forward_features(images), pre_logits=True))
    again, _ = put_head(backbone, architecture, 3)  # a second fine-tuning goes on with the trained norm
    assert torch.equal(again.fc_norm.weight, model.fc_norm.weight)
    assert again(images).shape == (2, 3)


@pytest.mark.parametrize("by_file", [False, True])
def test_tuned_vit__pre_training_goes_on_from_it_with_a_new_norm_of_tokens(tuned, by_file):
    model, path = tuned
    kind = {"backbone": str(path)} if by_file else {"backbone": "vit", "class_token": True, "embed_dim": 16}
    kind |= {} if by_file else {"depth": 2, "num_heads": 2}
    encoder = create_encoder(ModelSettings(size="tiny", image_size="32", patch_size=8, **kind))
    StartingWeights(str(path)).into_backbone(encoder)
    ours, theirs = encoder.backbone.state_dict(), model.state_dict()
    assert (ours.pop("norm.weight") == 1).all()
    assert (ours.pop("norm.bias") == 0).all()
    assert ours.keys() == {name for name in theirs if not name.startswith(("fc_norm.", "head."))}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_tuned_hybrid__keeps_its_norm_without_its_head_and_pre_training_goes_on_without(tmp_path):
    encoder = create_convvit("tiny", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model, architecture = put_head(encoder.backbone, encoder.architecture, 5)
    torch.nn.init.normal_(model.fc_norm.weight)
    path, images = tmp_path / "tuned.safetensors", torch.randn(2, 3, 32, 32)
    save_backbone(path, model, architecture, [0.5] * 3, [0.25] * 3)
    seen = model.forward_head(model.forward_features(images), pre_logits=True)
    backbone, architecture = open_backbone(str(path))
    torch.testing.assert_close(backbone(images), seen)
    save_backbone(tmp_path / "without.safetensors", backbone, architecture, [0.5] * 3, [0.25] * 3)
    torch.testing.assert_close(dmjd.load_backbone(tmp_path / "without.safetensors")(images), seen)
    again = put_head(backbone, architecture, 3)[0].double()
    assert torch.equal(again.fc_norm.weight, model.fc_norm.weight.double())
    again.reset_classifier(4)
    assert again(images.double()).shape == (2, 4)
    network, architecture = create_network(str(path), image_hw=(32, 32), in_chans=3)
    assert "fc_norm.weight" not in network.state_dict()
    put_head(network, architecture, 2)


def test_layer_decay__a_tuned_vit_has_its_norm_above_and_its_positions_below_all_blocks(tuned):
    model = dmjd.load_backbone(tuned[1])
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["head.weight"] == by_name["fc_norm.weight"] == by_name["fc_norm.bias"] == 1
    assert [by_name[f"blocks.{index}.mlp.fc1.weight"] for index in (1, 0)] == [0.5, 0.25]
    assert by_name["pos_embed"] == by_name["cls_token"] == by_name["patch_embed.proj.weight"] == 0.125


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
def test_positions__pre_training_fixes_them(backbone):
    model = dmjd.build(
        "dmjd", "tiny", backbone=backbone, **TINY, block=1, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
    )
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    images, masked = torch.randint(0, 256, (2, 3, 32, 32)), dmjd.disjoint_masks(2, 16, num_views=2, mask_ratio=0.5)
    model(images.byte(), masked).total.backward()
    optimizer.step()
    assert torch.equal(model.encoder.backbone.pos_embed, sincos_positions((4, 4), 16))


@pytest.mark.parametrize("name", ["vit", "convvit"])
def test_positions__dense_tasks_train_them(backbones, name):
    backbone, _ = open_backbone(str(backbones[name]))
    sum(maps.square().sum() for maps in Pyramid(backbone)(torch.randn(1, 3, 64, 32))).backward()
    assert (backbone.pos_embed.grad != 0).any(dim=-1).all()


@pytest.mark.parametrize("name", ["vit", "convvit"])
def test_positions__a_backbone_file_has_the_fixed_ones_of_pre_training(backbones, name):
    assert torch.equal(load_file(backbones[name])["pos_embed"], sincos_positions((4, 4), 16))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "efficientformer_l1"])
def test_put_head__distilled_models_get_both_of_theirs(name):
    model, architecture = put_head(*open_backbone(f"timm:{name}", pretrained=False), 3)
    heads = model.get_classifier()
    assert [head.weight.std().item() < 1e-4 for head in heads] == [True, True]
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3)
    assert architecture[1]["num_classes"] == 3


def test_open_backbone__tokens_without_a_class_token_are_refused(tmp_path):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_pool": ""}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": arguments | {"class_token": False, "num_classes": 0},
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="its output is tokens, not pooled features"):
        open_backbone(f"timm:local-dir:{tmp_path}", pretrained=False)


@pytest.mark.parametrize("pool", ["", "token"])
def test_open_backbone__a_folder_of_timm_that_says_tokens_and_one_side_gives_features_and_a_file(tmp_path, pool):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_pool": pool}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 16, "model_args": arguments}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    opened, architecture = open_backbone(f"timm:local-dir:{tmp_path}")
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(images)) if pool else model.forward_features(images)[:, 0]
    torch.testing.assert_close(opened(images), expected)
    tuned, architecture = put_head(opened, architecture, 5)
    save_backbone(tmp_path / "tuned.safetensors", tuned, architecture, [0.5] * 3, [0.5] * 3)
    again = dmjd.load_backbone(tmp_path / "tuned.safetensors")
    torch.testing.assert_close(again(images), tuned(images))
    assert again.pretrained_cfg["input_size"] == [3, 32, 32]
