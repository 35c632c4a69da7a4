"""The official programs' numbers, float32: outputs and losses to 1e-5 relative, gradient norms to 1e-4."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dmjd
from dmjd.backbones.convvit import ConvViT
from dmjd.backbones.normalize import STATISTICS
from dmjd.backbones.positions import sincos_positions
from dmjd.heads import MisalignedProjector
from dmjd.masking import token_ids
from dmjd.reference import our_name
from dmjd.targets.hog import hog_cells

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


def golden(name):
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"reference vectors are not on this machine: {path}")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    return tensors, config


def assert_close(ours, official, tolerance=1e-5):
    scale = official.abs().max().clamp_min(1e-12)
    assert ((ours - official).abs().max() / scale) < tolerance


def state_of(tensors):
    return {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


@pytest.mark.parametrize("name", ["dmjd_convvit_block60", "dmjd_convvit_random75"])
def test_hog__equals_the_official_histograms_and_targets(name):
    tensors, _ = golden(name)
    assert_close(hog_cells(tensors["image_uint8"]), tensors["hog_cells"])
    assert_close(dmjd.hog(tensors["image_uint8"]), tensors["target"])


def test_positions__equal_the_official_ones():
    tensors, config = golden("mae_vit")
    assert_close(sincos_positions((14, 14), config["dim"]), tensors["state.pos_embed"][:, 1:])


def check_gradients(model, tensors, *, hybrid):
    ours = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    official = {
        our_name(key.removeprefix("gradnorm."), hybrid=hybrid): norm
        for key, norm in tensors.items()
        if key.startswith("gradnorm.")
    }
    assert official.keys() <= ours.keys()
    assert len(official) > 50
    for name, norm in official.items():
        if norm > 1e-7:  # a key's bias has no gradient but rounding
            assert abs(ours[name] / norm - 1) < 1e-4, name


@pytest.mark.parametrize("name", ["dmjd_convvit_block60", "dmjd_convvit_random75"])
def test_dmjd__losses_predictions_latents_and_gradients_equal_the_official_ones(name, monkeypatch):
    tensors, config = golden(name)
    model = dmjd.load_reference(state_of(tensors), num_heads=config["heads"], decoder_num_heads=config["decoder_heads"])
    images, official_mask = tensors["image_uint8"], tensors["mask"].bool()  # rows of the files are view-major
    rows = torch.arange(4).view(2, 2).T.flatten()
    masked = official_mask[rows].view(2, 2, 196)
    losses = model(images, masked)
    assert_close(losses.masked, tensors["loss_masked"])
    assert_close(losses.visible, tensors["loss_visible"])
    assert_close(losses.total, tensors["loss_total"])

    said = model.predict(images, masked)
    hidden = official_mask[rows]
    order = tensors["ids_keep"][rows]
    raster = order.argsort(dim=1)[..., None]
    visible = tensors["pred_visible"][rows].gather(1, raster.expand(-1, -1, 108))
    assert_close(said.masked.flatten(0, 1), tensors["pred_masked"][rows][hidden])
    assert_close(said.visible, visible)
    latents = model.encoder(model.normalize(images), token_ids(masked)).visible
    assert_close(latents, tensors["latent"][rows].gather(1, raster.expand(-1, -1, latents.shape[-1])))

    losses.total.backward()
    check_gradients(model, tensors, hybrid=True)

    # The ablation, with the order that the official program drew: `order` lists tokens, `places` their places.
    places = torch.searchsorted(token_ids(masked).visible.contiguous(), order)
    aligned = model.projector
    model.projector = MisalignedProjector(
        aligned.project[0].in_features, 108, embed_dim=aligned.project[0].out_features
    )
    model.projector.load_state_dict(aligned.state_dict())
    monkeypatch.setattr(torch, "rand", lambda *size, **options: places.argsort(dim=1).float())
    assert_close(model(images, masked).visible, tensors["official_loss_visible_misaligned"])


def test_convvit__classifier_equals_the_official_one():
    tensors, _ = golden("convvit_classifier")
    weights, _ = golden("dmjd_convvit_block60")
    images = weights["image_uint8"]
    model = ConvViT(num_classes=10, embed_dims=(16, 24, 32), depths=(1, 2, 2), num_heads=4)
    model.load_state_dict(state_of(tensors))
    mean, std = (torch.tensor(each)[:, None, None] for each in STATISTICS[3])
    features = model.forward_features((images / 255 - mean) / std)
    assert_close(model.forward_head(features, pre_logits=True), tensors["pooled"])
    assert_close(model.forward_head(features), tensors["logits"])


def test_mae__loss_predictions_latents_and_gradients_equal_the_official_ones():
    tensors, config = golden("mae_vit")
    model = dmjd.load_reference(
        state_of(tensors),
        num_heads=config["heads"],
        decoder_num_heads=config["decoder_heads"],
        target="normalized_pixels",
    )
    masked = tensors["mask"].bool()[:, None]
    losses = model(tensors["image_uint8"], masked)
    assert_close(losses.total, tensors["loss"])
    assert losses.visible == 0

    said = model.predict(tensors["image_uint8"], masked)
    assert_close(said.masked.flatten(0, 1), tensors["pred"][masked[:, 0]])

    losses.total.backward()
    check_gradients(model, tensors, hybrid=False)
