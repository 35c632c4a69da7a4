"""Weights to start from: every place they may come from, and what is said of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmjd
from dmjd.backbones.files import save_backbone
from dmjd.config.export import ExportSettings
from dmjd.config.pretrain import DecoderSettings, ModelSettings, MonitorSettings, PretrainRun, PretrainSettings
from dmjd.errors import CheckpointError
from dmjd.factory import from_settings, save_pretrained
from dmjd.tasks.export import export
from dmjd.tasks.pretrain import pretrain

MODEL = ModelSettings(size="tiny", image_size="32", patch_size=8, embed_dim=16, depth=2, num_heads=2)
SMALL = PretrainSettings(model=MODEL, decoder=DecoderSettings(embed_dim=16, depth=1, num_heads=2))
HYBRID = replace(SMALL, model=replace(MODEL, backbone="convvit"))
FIXTURES = Path(__file__).parent / "fixtures"
OFFICIAL = {  # the official programs' names, by ours
    "encoder.backbone.": "",
    "encoder.": "",
    "decoder.mask_token": "mask_token",
    "decoder.": "decoder_",
    "projector.project.": "proj_embed.",
    "projector.predict.": "predictor.0.",
}


def official(network):
    named = {}
    for name, value in network.state_dict().items():
        ours = next(ours for ours in OFFICIAL if name.startswith(ours))
        named[name.replace(ours, OFFICIAL[ours], 1)] = value.contiguous()
    return named


def same(first, second, prefix=""):
    """Tell whether the tensors of a network that begin so are those of another."""
    theirs = second.state_dict()
    return all(
        torch.equal(value, theirs[name]) for name, value in first.state_dict().items() if name.startswith(prefix)
    )


def loss(network):
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    masked = dmjd.disjoint_masks(2, 16, num_views=2, mask_ratio=0.6, generator=torch.Generator().manual_seed(0))
    return network.eval()(images, masked).total


@pytest.mark.parametrize("settings", [SMALL, HYBRID], ids=["vit", "convvit"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_init__an_official_checkpoint_gives_backbone_decoder_and_projector(tmp_path, settings, suffix, capsys):
    there, path = from_settings(settings), str(tmp_path / f"official.{suffix}")
    if suffix == "pth":
        torch.save({"model": official(there), "epoch": 3}, path)
    else:
        save_file(official(there), path)
    assert same(there, from_settings(replace(settings, init=path)))
    assert f"of {path}; left out none; new none" in capsys.readouterr().err


def test_init__of_an_encoder_alone_the_heads_are_new_and_that_is_said(tmp_path, capsys):
    there, path = from_settings(SMALL), str(tmp_path / "encoder.pth")
    extra = {"head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3), "cls_token": torch.zeros(1, 1, 16)}
    row = {"pos_embed": torch.cat([torch.zeros(1, 1, 16), there.encoder.backbone.pos_embed], dim=1)}
    torch.save({"model": {**there.encoder.backbone.state_dict(), **extra, **row}}, path)
    here = from_settings(replace(SMALL, init=path))
    assert same(there, here, "encoder.")
    assert not torch.equal(here.decoder.embed.weight, there.decoder.embed.weight)
    said = capsys.readouterr().err
    assert "left out 3: encoder.backbone.head.weight, encoder.backbone.head.bias, encoder.backbone.cls_token" in said
    assert "; new " in said
    assert "decoder.mask_token, decoder.embed.weight, decoder.embed.bias ..." in said


def test_init__an_export_gives_its_backbone(tmp_path):
    export(ExportSettings(FIXTURES / "convvit.safetensors", to="hf", out=tmp_path / "hub"))
    theirs = dmjd.load_backbone(FIXTURES / "convvit.safetensors")
    for name in (str(tmp_path / "hub"), f"timm:local-dir:{tmp_path / 'hub'}", str(tmp_path / "hub/model.safetensors")):
        assert same(theirs, from_settings(replace(HYBRID, init=name)).encoder.backbone)


def test_init__other_shapes_are_adapted_and_that_is_said(capsys):
    model = replace(MODEL, image_size="32x64", in_chans=1, patch_size=16)
    masking = replace(SMALL.masking, block=1, mask_ratio=0.5)
    network = from_settings(
        replace(SMALL, model=model, masking=masking, init=str(FIXTURES / "class-token.safetensors"))
    )
    assert network.encoder.grid == (2, 4)
    said = capsys.readouterr().err
    assert "(channels 3 -> 1, patches 8 -> 16 px, positions 4x4 -> 2x4)" in said
    assert "left out 2: encoder.backbone.cls_token, encoder.backbone.reg_token;" in said


def test_init__a_grid_of_other_sides_and_as_many_tokens_keeps_its_own_positions(tmp_path):
    settings = [
        replace(SMALL, model=replace(MODEL, image_size=size), masking=replace(SMALL.masking, block=1))
        for size in ("16x64", "32x32")
    ]
    wide, square = map(from_settings, settings)
    save_pretrained(tmp_path / "wide.safetensors", wide, settings[0], (0.0, 255.0))
    begun = from_settings(replace(settings[1], init=str(tmp_path / "wide.safetensors")))
    assert torch.equal(begun.decoder.pos_embed, square.decoder.pos_embed)
    assert torch.equal(begun.decoder.pred.weight, wide.decoder.pred.weight)


@pytest.mark.parametrize("settings", [SMALL, HYBRID], ids=["vit", "convvit"])
def test_init__a_run_goes_on_with_the_loss_where_it_ended(tmp_path, colours, settings):
    run = PretrainRun(data=str(colours), out=tmp_path, steps=3, batch_size=8, device="cpu", workers=0)
    pretrain(replace(settings, run=run, monitor=MonitorSettings(evals=0)))
    ended = from_settings(settings)
    ended.load_state_dict(load_file(next(tmp_path.glob("checkpoints/*3/model.safetensors"))))
    started = from_settings(replace(settings, init=str(tmp_path)))
    assert torch.equal(loss(started), loss(ended))
    assert torch.equal(loss(dmjd.load_pretrained(tmp_path / "pretrained.safetensors")), loss(ended))
    from_file = from_settings(replace(settings, init=str(tmp_path / "backbone.safetensors")))
    assert not torch.equal(loss(from_file), loss(ended))


def test_load_pretrained__knows_settings_statistics_and_the_running_mean(tmp_path):
    masked = replace(SMALL.masked, target="ema+hog", loss="smooth_l1")
    crop = replace(SMALL.crop, variants=2)
    settings = replace(SMALL, masked=masked, crop=crop, teacher=replace(SMALL.teacher, cache=tmp_path))
    network = from_settings(settings, ([0.3, 0.4, 0.5], [0.2, 0.2, 0.2]))
    for parameter in network.target.parameters():  # as after some steps
        parameter.data += 0.1
    save_pretrained(tmp_path / "pretrained.safetensors", network, settings, (0.0, 4095.0))
    loaded = dmjd.load_pretrained(tmp_path / "pretrained.safetensors")
    assert same(network, loaded)
    assert torch.equal(loss(loaded), loss(network))
    assert dmjd.load_backbone(tmp_path / "pretrained.safetensors").value_range == [0.0, 4095.0]


def test_load_pretrained__needs_no_file_that_gave_the_architecture(tmp_path):
    first = from_settings(SMALL).encoder
    save_backbone(tmp_path / "backbone.safetensors", first.backbone, first.architecture, (0.5,) * 3, (0.2,) * 3)
    model = ModelSettings(backbone=str(tmp_path / "backbone.safetensors"), image_size="48", patch_size=8)
    settings = replace(SMALL, model=model)
    network = from_settings(settings)
    save_pretrained(tmp_path / "pretrained.safetensors", network, settings, (0.0, 255.0))
    (tmp_path / "backbone.safetensors").unlink()
    loaded = dmjd.load_pretrained(tmp_path / "pretrained.safetensors")
    assert loaded.encoder.architecture == network.encoder.architecture
    assert same(network, loaded)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "convvit.safetensors",
            r"another architecture: patch_embed\.proj\.weight, .*; --init .*; see --model\.backbone",
        ),
        ("", "no weights in it; --init"),
        ("missing.pth", "no such backbone"),
    ],
)
def test_init__what_does_not_fit_or_is_not_there_is_one_line(name, message):
    with pytest.raises(CheckpointError, match=message):
        from_settings(replace(SMALL, init=str(FIXTURES / name)))


def test_init__a_deeper_network_is_refused_with_the_first_keys():
    deeper = replace(SMALL, model=replace(MODEL, depth=3), init=str(FIXTURES / "vit.safetensors"))
    with pytest.raises(CheckpointError, match=r"another architecture: blocks\.2\.norm1\.weight"):
        from_settings(deeper)


def test_init__another_number_of_heads_is_refused():
    fewer = replace(SMALL, model=replace(MODEL, num_heads=1), init=str(FIXTURES / "vit.safetensors"))
    with pytest.raises(CheckpointError, match=r"2 heads a block, not 1; --init .*; see --model\.num_heads"):
        from_settings(fewer)


def test_backbone__weights_of_another_program_are_told_where_to_go(tmp_path):
    torch.save({"model": official(from_settings(SMALL))}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"weights of another program; .*mae.pth; .* --init takes such weights"):
        dmjd.load_backbone(tmp_path / "mae.pth")
