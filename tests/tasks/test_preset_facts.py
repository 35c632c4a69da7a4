"""Presets of pre-training are what was published, as far as settings can say it."""

import pytest
import torch

import dmjd
from dmjd.cli import application, layers_of
from dmjd.config.rules import PRESETS, to_dict

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
ADAMW = (0.9, 0.95)


def settings_of(preset, *flags):
    words = ["pretrain", "--data", "d", "--preset", preset, *flags]
    _, bound, _ = application(layers_of(words)).parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["settings"]


@pytest.mark.parametrize(
    ("preset", "lr", "batch_size", "warmup", "betas", "clip_grad", "scale"),
    [
        ("mae", 2.4e-3, 4096, 40, ADAMW, 0, (0.2, 1)),
        ("maskfeat", 1.6e-3, 2048, 30, (0.9, 0.999), 0.02, (0.5, 1)),
        ("convmae", 1.8e-3, 3072, 40, ADAMW, 0, (0.2, 1)),
        ("fastconvmae", 1.2e-3, 512, 10, ADAMW, 0, (0.2, 1)),
        ("data2vec", 2e-3, 2048, 10, (0.9, 0.999), 3, (0.08, 1)),
        ("dmjd", 2e-3, 512, 20, ADAMW, 0, (0.5, 1)),
        ("dmjd-large", 2e-3, 512, 20, ADAMW, 3, (0.5, 1)),
    ],
)
def test_preset__optimizer_and_crops_are_the_published_ones(preset, lr, batch_size, warmup, betas, clip_grad, scale):
    settings = settings_of(preset)
    optim = settings.optim
    assert settings.lr == pytest.approx(lr)
    assert (settings.run.batch_size, optim.warmup_epochs, optim.betas, optim.clip_grad, settings.crop.scale) == (
        (batch_size, warmup, betas, clip_grad, scale)
    )


@pytest.mark.parametrize(
    ("preset", "target"),
    [
        *[(name, "normalized_pixels") for name in NAMES if name.endswith("mae")],
        *[(name, "hog") for name in ("maskfeat", "dm", "dmjd", "dmjd-large", "quick", "quick-dmjd")],
        ("data2vec", "ema"),
    ],
)
def test_preset__hidden_tokens_predict_the_published_target(preset, target):
    assert settings_of(preset).masked.target == target


def test_preset_dmjd_large__is_dmjd_but_for_size_and_clipping():
    same = to_dict(settings_of("dmjd", "--model.size", "large", "--optim.clip_grad", "3"))
    assert to_dict(settings_of("dmjd-large")) == same | {"preset": "dmjd-large"}


def test_preset_data2vec__its_targets_are_the_outputs_of_the_top_six_blocks():
    target = dmjd.build("data2vec", "tiny", image_size=64, embed_dim=16, num_heads=2).target
    blocks, outputs = target.maps.network.blocks, []
    for block in blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    maps = target.maps(torch.rand(1, 3, 64, 64) * 255)
    assert len(outputs) == len(blocks) == 12
    for features, output in zip(maps, outputs[-6:], strict=True):
        assert features.flatten(2).transpose(1, 2).equal(output[:, 1:])  # without the class token
