"""`--preset auto`: what it chooses for a set, and what stands above its choice."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import Block
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import dmjd
from dmjd import automatic
from dmjd.automatic import ForCrops, time_image
from dmjd.cli import main, settings_of
from dmjd.data import memory
from dmjd.data.crops import RandomCrop
from dmjd.data.memory import PackedImages
from dmjd.data.source import open_source
from dmjd.errors import CheckpointError, ConfigError, DataError
from dmjd.factory import from_settings


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """Arrays of five channels and 16 bits."""
    root = tmp_path_factory.mktemp("stacks")
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 4096, (5, 36, 36), dtype=np.uint16)
        np.save(root / f"{number}.npy", pixels)
    return root


def auto(data, **given):
    return settings_of("pretrain", data=str(data), preset="auto", device="cpu", **given)


def test_auto__fits_the_images_and_says_so_in_six_lines_at_most(photos, capsys):
    settings = auto(photos, minutes=0.02)
    assert (settings.model.image_size, settings.model.patch_size, settings.model.in_chans) == ("32", 4, 3)
    assert settings.run.batch_size <= 23
    lines = capsys.readouterr().err.splitlines()
    assert 0 < len(lines) <= 6
    assert "23 images, shorter side 40 px, 3 channels" in lines[0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_auto__says_the_cores_that_it_may_use(photos, capsys):
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(every)])
    try:
        auto(photos, minutes=0.02)
    finally:
        os.sched_setaffinity(0, every)
    assert "; 1 core; " in capsys.readouterr().err


def test_auto__the_report_may_show_any_channel_that_the_images_have(stacks):
    model = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    settings = auto(stacks, minutes=0.02, model=model, monitor={"channels": (4, 1, 0)})
    assert (settings.model.in_chans, settings.monitor.channels) == (5, (4, 1, 0))
    with pytest.raises(ConfigError, match=r"monitor\.channels \(5, 1, 0\): channels are 0 to 4"):
        auto(stacks, minutes=0.02, model=model, monitor={"channels": (5, 1, 0)})


@pytest.mark.long
def test_auto__takes_the_channels_that_images_have(stacks):
    assert auto(stacks, minutes=0.02).model.in_chans == 5


def test_auto__more_minutes_are_more_epochs_until_images_were_seen_often_enough(photos):
    model = {"size": "tiny", "embed_dim": 32, "depth": 1, "num_heads": 2}
    short, longer = auto(photos, minutes=0.02, model=model), auto(photos, minutes=0.2, model=model)
    assert short.run.epochs < longer.run.epochs
    assert auto(photos, minutes=10_000, model=model).run.epochs * 2 == 1600


def test_auto__images_that_are_read_in_every_epoch_are_read_by_all_workers(tmp_path, monkeypatch):
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jp2")  # which takes long to decode
    monkeypatch.setattr(automatic, "MEMORY_LIMIT", 0)
    model = {"image_size": "32", "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    small = {"model": model, "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    one, many = (auto(tmp_path, minutes=0.2, workers=workers, **small).run.epochs for workers in (1, 64))
    assert many > 1.5 * one


def test_auto__flags_stand_above_what_is_chosen(photos):
    settings = auto(
        photos, epochs=3, model={"size": "small", "patch_size": 8}, masking={"num_views": 1, "predict_ratio": 0.6}
    )
    assert settings.run.epochs == 3
    assert (settings.model.size, settings.model.embed_dim, settings.model.patch_size) == ("small", None, 8)
    assert settings.masking.num_views == 1
    assert settings.optim.warmup_epochs == pytest.approx(0.15)


def test_auto__a_step_is_shared_evenly_by_its_micro_batches(photos):
    masking = {"num_views": 1, "predict_ratio": 0.6}
    assert auto(photos, minutes=0.02, masking=masking, optim={"accumulation": 4}).run.batch_size == 20  # of 23 images


def test_auto__micro_batches_need_not_divide_a_batch_that_nobody_gave(photos):
    shape = {"image_size": "40", "embed_dim": 16, "depth": 1, "num_heads": 2}  # no multiple of the preset's patch
    small = {"minutes": 0.02, "model": shape, "optim": {"accumulation": 3}}
    assert auto(photos, **small).run.batch_size % 3 == 0
    with pytest.raises(
        ConfigError, match=r"batch_size 8 is no multiple of optim\.accumulation 3; choose a multiple of 3"
    ):
        auto("nowhere", batch_size=8, **small)


def test_auto__a_network_that_is_named_is_taken_with_its_patches(photos):
    settings = auto(photos, minutes=0.02, model={"backbone": "timm:test_vit"})
    assert (settings.model.image_size, settings.model.patch_size, settings.model.embed_dim) == ("32", 16, None)


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
def test_auto__the_network_is_that_of_the_weights_to_start_from(backbone, photos, backbones, tmp_path):
    init = str(backbones[backbone])
    settings = auto(photos, minutes=0.02, init=init)
    assert settings.model.backbone == backbone
    encoder = from_settings(settings).encoder  # raises where the weights are another architecture's
    weights = load_file(init)
    name = next(name for name in weights if name.endswith("qkv.weight"))
    assert torch.equal(encoder.backbone.state_dict()[name], weights[name])


def test_auto__official_weights_without_heads_are_those_of_their_size(photos, tmp_path):
    shape = {"embed_dim": 192, "depth": 1, "image_size": 64, "patch_size": 16, "backbone": "vit"}
    encoder = dmjd.build("mae", "tiny", **shape).encoder
    torch.save({"model": encoder.backbone.state_dict()}, tmp_path / "official.pth")
    settings = auto(photos, minutes=0.02, init=str(tmp_path / "official.pth"))
    assert (settings.model.size, settings.model.depth, settings.model.num_heads) == ("tiny", 1, None)


@pytest.mark.parametrize("name", ["conv1.weight", "blocks.0.0.conv_pw.weight"])  # the latter as in EfficientNet
def test_auto__weights_of_no_transformer_are_refused(name, photos, tmp_path):
    torch.save({"model": {name: torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no blocks of a transformer in it"):
        auto(photos, minutes=0.02, init=str(tmp_path / "other.pth"))


def test_auto__photographs_larger_than_memory_are_looked_at_one_by_one(photos, monkeypatch):
    monkeypatch.setattr(automatic, "MEMORY_LIMIT", 3 * 40 * 50 * 3)
    monkeypatch.setattr(memory, "MEMORY_LIMIT", 3 * 40 * 50 * 3)
    model = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    assert auto(photos, minutes=0.02, model=model).model.image_size == "32"


def test_look__images_are_read_as_small_as_crops_need_them(tmp_path):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (800, 800, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    images = open_source(str(tmp_path)).train
    whole, small = (
        ForCrops(images, crop).read(0) for crop in (None, RandomCrop((32, 32), (0.5, 1.0), (1.0, 1.0), True))
    )
    assert whole.shape[1:] == (800, 800)
    assert max(small.shape[1:]) <= 100


@pytest.mark.long
def test_auto__warms_up_for_a_share_of_the_steps_that_are_said(photos):
    settings = auto(photos, minutes=0.02, steps=40)
    assert settings.run.num_steps(23) == 40
    assert settings.optim.warmup_epochs == pytest.approx(0.05 * 40 * settings.run.batch_size / 23, rel=0.01)


def test_auto__minutes_are_refused_for_other_presets(photos):
    with pytest.raises(ConfigError, match="minutes are for --preset auto, not mae"):
        settings_of("pretrain", data=str(photos), preset="mae", minutes=5)


def test_auto__channels_that_are_said_stand_above_those_of_the_images(photos):
    assert auto(photos, minutes=0.02, model={"in_chans": 1, "depth": 1}).model.in_chans == 1


def test_auto__images_that_do_not_decode_are_one_line(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 1 images decodes"):
        auto(tmp_path)


@pytest.fixture
def starve(monkeypatch):
    """Let blocks that are wider than so many numbers ask for more memory than there is."""
    forward = Block.forward

    def starved(most):
        def hungry(block, x, *rest, **options):
            if x.shape[-1] > most:
                torch.empty(1 << 60)
            return forward(block, x, *rest, **options)

        monkeypatch.setattr(Block, "forward", hungry)

    return starved


def test_auto__a_larger_network_without_memory_is_not_taken(photos, starve, monkeypatch):
    monkeypatch.setattr(automatic.auto, "FEW", 24)
    starve(128)
    assert auto(photos, minutes=10_000).model.embed_dim == 128


def test_auto__the_smallest_network_without_memory_is_one_line(photos, starve):
    starve(0)
    with pytest.raises(ConfigError, match=r"^out of memory .*; give a smaller --model.image_size"):
        auto(photos, minutes=0.02)


class Attention(TorchFunctionMode):
    """Notes in which precision attention is computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_time_image__takes_the_steps_that_a_run_takes(photos):
    images = PackedImages(open_source(str(photos)).train)
    model = {"image_size": "32", "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    decoder = {"embed_dim": 32, "depth": 3, "num_heads": 2}

    def kept(**given):
        """The numbers that are kept for backward passes."""
        settings = settings_of(
            "pretrain", data=str(photos), preset="quick", precision="bf16", model=model, decoder=decoder, **given
        )
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        with Attention() as attention, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            assert time_image(settings, images, torch.device("cpu"), 4) > 0
        assert attention.dtypes == {torch.float32}
        return sum(sizes)

    assert kept(activation_checkpointing=True) < kept() / 2


@pytest.mark.long
def test_auto__a_run_keeps_what_was_chosen_and_resumes_by_it(photos, tmp_path):
    out = tmp_path / "run"
    words = ["pretrain", "--data", str(photos), "--out", str(out), "--minutes", "0.02", "--device", "cpu"]
    assert main([*words, "--monitor.max_images", "8", "--workers", "0"]) == 0
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["preset"] == "auto"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verdict"]["kind"] in ("learned", "too little", "nothing", "collapsed", "overfitted")
    more = ["pretrain", "--data", str(photos), "--out", str(out), "--resume", "--steps"]
    assert main([*more, str(summary["steps"] + 1)]) == 0
    assert main([*more, str(summary["steps"] + 2), "--preset", "auto"]) == 0  # as it began, with --resume behind
    assert json.loads((out / "summary.json").read_text())["steps"] == summary["steps"] + 2


def test_auto__what_is_refused_anyway_costs_no_look_at_the_images(photos, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1")
    words = ["pretrain", "--data", str(photos)]
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert main([*words, "--out", str(tmp_path / "none"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "there is a run already" in said
    assert "there is no run to resume" in said
    assert "auto:" not in said
