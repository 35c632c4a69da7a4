"""Checkpoints of the official programs load by their names, or say in one line why not."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

import dmjd
from dmjd.backbones.files import save_backbone
from dmjd.errors import CheckpointError
from dmjd.reference import NAMES, read_weights

HEADS = {"num_heads": 2, "decoder_num_heads": 2}


def official_weights(backbone, *, in_chans=3, class_token=False, visible=True, patch_size=8, **convolutions):
    """Weights of a small model of ours under official names."""
    model = dmjd.build(
        "dmjd",
        "tiny",
        image_size=4 * patch_size,
        backbone=backbone,
        patch_size=patch_size,
        in_chans=in_chans,
        class_token=class_token,
        weight=1.0 if visible else 0.0,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        **convolutions,
    )
    names = {
        "encoder.backbone.": "",
        "encoder.": "",
        "decoder.mask_token": "mask_token",
        "decoder.": "decoder_",
        "projector.project.": "proj_embed.",
        "projector.predict.": "predictor.0.",
    }
    weights = {}
    for name, value in model.state_dict().items():
        ours, official = next((ours, official) for ours, official in names.items() if name.startswith(ours))
        weights[name.replace(ours, official, 1)] = value
    if class_token:
        row = torch.zeros(1, 1, 16)
        weights["decoder_pos_embed"] = torch.cat([row, weights["decoder_pos_embed"]], dim=1)
    return model, weights


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("vit", {}),
        ("vit", {"class_token": True, "visible": False, "patch_size": 16}),
        ("vit", {"in_chans": 1}),
        ("convvit", {}),
        ("convvit", {"conv_mlp_ratio": 4.0, "visible": False}),
        ("convvit", {"patch_size": 16, "in_chans": 1}),
    ],
    ids=str,
)
def test_load_reference__reads_every_size_from_the_shapes(backbone, options):
    model, weights = official_weights(backbone, **options)
    loaded = dmjd.load_reference(weights, **HEADS)
    assert (loaded.projector is None) == (not options.get("visible", True))
    side, in_chans = 4 * loaded.encoder.patch_size, options.get("in_chans", 3)
    images = torch.randint(0, 256, (2, in_chans, side, side), dtype=torch.uint8)
    masked = dmjd.disjoint_masks(2, 16, num_views=2, mask_ratio=0.6)
    torch.testing.assert_close(loaded(images, masked).total, model(images, masked).total)


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
def test_load_reference__has_a_backbone_that_can_be_written(backbone, tmp_path):
    _, weights = official_weights(backbone)
    loaded = dmjd.load_reference(weights, **HEADS).eval()
    encoder, path = loaded.encoder, tmp_path / "backbone.safetensors"
    save_backbone(path, encoder.backbone, encoder.architecture, *loaded.normalize.statistics)
    images = torch.randn(2, 3, *[4 * encoder.patch_size] * 2)
    torch.testing.assert_close(dmjd.load_backbone(path).eval()(images), encoder.backbone(images))
    assert tuple(encoder.backbone.pretrained_cfg["input_size"]) == tuple(images.shape[1:])


def test_load_reference__names_the_first_keys_that_do_not_fit():
    _, weights = official_weights("convvit")
    surplus = weights | {"a_stranger": torch.zeros(1)}
    with pytest.raises(ValueError, match="a_stranger"):
        dmjd.load_reference(surplus, **HEADS)
    with pytest.raises(ValueError, match="patch_embed3"):
        dmjd.load_reference({k: v for k, v in weights.items() if k != "patch_embed3.proj.weight"}, **HEADS)
    with pytest.raises(ValueError, match=r"decoder\.norm\.bias"):
        dmjd.load_reference({k: v for k, v in weights.items() if k != "decoder_norm.bias"}, **HEADS)
    with pytest.raises(ValueError, match="not a pre-training checkpoint"):
        dmjd.load_reference({"fc.weight": torch.zeros(2, 2)}, **HEADS)
    with pytest.raises(ValueError, match="a width of 16 cannot be split into 3 heads"):
        dmjd.load_reference(weights, **HEADS | {"num_heads": 3})
    with pytest.raises(ValueError, match="predicts"):
        dmjd.load_reference(weights, target="pixels", **HEADS)


@pytest.mark.parametrize("width", [20, 768, 9000])
def test_load_reference__weights_of_another_width_than_hog_has_are_refused_by_both_widths(width):
    _, weights = official_weights("vit", visible=False, patch_size=16)
    weights |= {"decoder_pred.weight": torch.zeros(width, 16), "decoder_pred.bias": torch.zeros(width)}
    with pytest.raises(ValueError, match=f"predicts {width} numbers a token, target 'hog' has 27"):
        dmjd.load_reference(weights, target="hog", **HEADS)


def test_names__every_pattern_is_needed():
    assert len({pattern for pattern, _ in NAMES}) == len(NAMES)


@pytest.mark.parametrize(("suffix", "prefix"), [("pth", ""), ("pth", "module."), ("safetensors", "")])
def test_read_weights__reads_tensors_with_and_without_a_wrapper(tmp_path, suffix, prefix):
    _, weights = official_weights("vit")
    path = tmp_path / f"checkpoint.{suffix}"
    if suffix == "pth":
        torch.save({"model": {f"{prefix}{name}": value for name, value in weights.items()}, "epoch": 3}, path)
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    read = read_weights(path)
    assert read.keys() == weights.keys()
    assert all(read[name].equal(weights[name]) for name in weights)


def test_read_weights__a_pickled_namespace_is_one_clear_line(tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace .* in a place you trust") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


class Payload:
    """What a hostile checkpoint would run when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def test_read_weights__a_payload_does_not_run(tmp_path):
    path, canary = tmp_path / "hostile.pth", tmp_path / "canary"
    torch.save({"model": Payload(canary)}, path)
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert not canary.exists()


def test_read_weights__broken_and_missing_files_are_clear_errors(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("broken.pth", "broken.safetensors", "missing.pth", "list.pth"):
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / name)
