"""Backbones by name, and weights to start from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dmjd
from dmjd.backbones.files import save_backbone
from dmjd.cli import main
from dmjd.config.pretrain import DecoderSettings, MaskingSettings, ModelSettings, PretrainSettings
from dmjd.errors import CheckpointError
from dmjd.factory import create_encoder, from_settings

MODEL = ModelSettings(size="tiny", image_size="32", patch_size=8, embed_dim=16, depth=2, num_heads=2)
SMALL = PretrainSettings(model=MODEL, decoder=DecoderSettings(embed_dim=16, depth=1, num_heads=2))
FIXTURES = Path(__file__).parent / "fixtures"


def test_init__starts_from_the_weights_of_a_file():
    model = from_settings(replace(SMALL, init=str(FIXTURES / "vit.safetensors")))
    theirs = dmjd.load_backbone(FIXTURES / "vit.safetensors").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.encoder.backbone.state_dict().items())


def test_init__also_starts_the_running_mean_there():
    masked = replace(SMALL.masked, target="ema")
    model = from_settings(replace(SMALL, masked=masked, init=str(FIXTURES / "vit.safetensors")))
    ours, mean = model.encoder.backbone.state_dict(), model.target.maps.network.state_dict()
    assert all(torch.equal(value, mean[name]) for name, value in ours.items())


def test_init__from_the_command_line_changes_the_first_loss(tmp_path, colours):
    losses = []
    for name, flags in (("random", []), ("started", ["--init", str(tmp_path / "random" / "backbone.safetensors")])):
        line = [
            "pretrain",
            "--preset",
            "quick",
            "--data",
            str(colours),
            "--steps",
            "1",
            "--batch_size",
            "8",
            "--device",
            "cpu",
            *flags,
        ]
        assert main([*line, "--model.depth", "1", "--out", str(tmp_path / name)]) == 0
        losses.append((tmp_path / name / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0])
    assert losses[0] != losses[1]


def test_build__takes_lists_as_all_verbs_do():
    model = dmjd.build("data2vec", "tiny", image_size=32, patch_size=8, layers=[0, -1], decay=[0.5, 0.9], depth=2)
    assert (model.target.maps.layers, model.target.decay) == ([0, -1], (0.5, 0.9))


def test_backbone__a_file_gives_its_architecture_untrained():
    model = replace(MODEL, backbone=str(FIXTURES / "convvit.safetensors"))
    encoder, theirs = create_encoder(model), dmjd.load_backbone(FIXTURES / "convvit.safetensors")
    ours = encoder.backbone.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert not torch.equal(ours["blocks3.0.mlp.fc1.weight"], theirs.state_dict()["blocks3.0.mlp.fc1.weight"])


def test_backbone__a_vit_of_timm_is_trained_and_opened_again(tmp_path):
    model = replace(MODEL, backbone="timm:vit_tiny_patch16_224", patch_size=16)
    network = from_settings(replace(SMALL, model=model, masking=MaskingSettings(mask_ratio=0.5, block=1)))
    assert network.encoder.grid == (2, 2)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    masked = dmjd.disjoint_masks(2, 4, num_views=2, mask_ratio=0.5)
    assert network(images, masked).total.isfinite()
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, network.encoder.backbone, network.encoder.architecture, *network.normalize.statistics)
    ours, again = network.encoder.backbone.state_dict(), dmjd.load_backbone(path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.items())


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_little_patch16_reg4_gap_256"])
def test_backbone__every_weight_of_a_vit_of_timm_is_trained_whatever_its_pooling(name):
    model = replace(MODEL, backbone=f"timm:{name}", patch_size=16)
    network = from_settings(replace(SMALL, model=model, masking=MaskingSettings(mask_ratio=0.5, block=1)))
    network(torch.rand(2, 3, 32, 32) * 255, dmjd.disjoint_masks(2, 4, num_views=2, mask_ratio=0.5)).total.backward()
    assert [name for name, each in network.named_parameters() if each.requires_grad and each.grad is None] == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"backbone": "timm:resnet18"},
            "such as one of convolutions, cannot read masked views; timm:resnet18; take a ViT",
        ),
        ({"backbone": "timm:vit_tiny_patch16_224"}, "has tokens of 16 px"),
        ({"backbone": "timm:no_such_model"}, "timm has no such model"),
        ({"backbone": "timm:vit_tiny_patch16_224", "reg_tokens": 4}, "leave out model.reg_tokens"),
        ({"backbone": "convvit", "class_token": True}, "no such setting.*class_token"),
        ({"conv_mlp_ratio": 4.0}, "no setting 'conv_mlp_ratio'"),
        ({"backbone": str(FIXTURES / "vit.safetensors"), "mask_token": True}, "no mask token"),
    ],
)
def test_backbone__what_does_not_go_together_is_said(model, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        create_encoder(replace(MODEL, **model))
