"""The official programs' numbers, float32: outputs and losses to 1e-5 relative, gradient norms to 1e-4."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import dmjd
from dmjd.backbones.blocks import sincos_positions
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


def close(ours, official, tolerance=1e-5):
    scale = official.abs().max().clamp_min(1e-12)
    assert ((ours - official).abs().max() / scale) < tolerance


def state_of(tensors):
    return {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


@pytest.mark.parametrize("name", ["dmjd_convvit_block60", "dmjd_convvit_random75"])
def test_hog__equals_the_official_histograms_and_targets(name):
    tensors, _ = golden(name)
    close(hog_cells(tensors["image_uint8"]), tensors["hog_cells"])
    close(dmjd.hog(tensors["image_uint8"]), tensors["target"])


def test_positions__equal_the_official_ones():
    tensors, config = golden("mae_vit")
    close(sincos_positions((14, 14), config["dim"]), tensors["state.pos_embed"][:, 1:])


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
    close(losses.total, tensors["loss"])
    assert losses.visible == 0

    said = model.predict(tensors["image_uint8"], masked)
    close(said.masked.flatten(0, 1), tensors["pred"][masked[:, 0]])

    losses.total.backward()
    gradients = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    official = {our_name(k.removeprefix("gradnorm.")): v for k, v in tensors.items() if k.startswith("gradnorm.")}
    assert official
    for name, norm in official.items():
        if norm > 1e-7:  # a key's bias has no gradient but rounding
            assert abs(gradients[name] / norm - 1) < 1e-4, name
