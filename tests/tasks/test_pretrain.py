"""A run writes what it promises, and every setting of it changes something."""

import json
import shlex
import shutil
from itertools import pairwise

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import load_file

import dmjd
from dmjd.cli import main
from dmjd.config.pretrain import PretrainRun, PretrainSettings
from dmjd.engine.optim import warmup_cosine

TINY = {
    "steps": 4,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
    "monitor.log_every": 1,
    "monitor.evals": 1,
    "monitor.saves": 2,
    "monitor.max_images": 16,
    "monitor.max_share": 100.0,
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.embed_dim": 32,
    "model.depth": 1,
    "model.num_heads": 2,
    "decoder.embed_dim": 16,
    "decoder.num_heads": 2,
    "decoder.depth": 1,
    "optim.warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 pictures in two class folders, of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number % 3, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def pretrain(data, out, flags="", **changes):
    """Run with flags such as `--seed 1`, which replace those of TINY, and return the lines of metrics.jsonl."""
    words = shlex.split(flags)
    defaults = [
        word
        for key, value in (TINY | changes).items()
        if value is not None and f"--{key}" not in words
        for word in (f"--{key}", str(value))
    ]
    assert main(["pretrain", "--preset", "quick", "--data", str(data), "--out", str(out), *defaults, *words]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, pretrain(photos, out)


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def test_pretrain__writes_the_run_directory_it_promises(run):
    out, lines = run
    for name in ("config.yaml", "metrics.jsonl", "backbone.safetensors", "report.html", "summary.json", "checkpoints"):
        assert (out / name).exists()
    wanted = [
        "step",
        "epoch",
        "images",
        "seconds",
        "loss",
        "loss_masked",
        "loss_visible",
        "lr",
        "grad_norm",
        "images_per_second",
    ]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert all(set(wanted) <= line.keys() for line in training)
    assert training[-1]["images"] == 32
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 2, 4]


def test_pretrain__the_share_of_time_for_targets_is_logged(photos, tmp_path):
    timm.models.save_for_hf(timm.create_model("resnet10t"), tmp_path / "teacher")
    shares = {
        name: [line["target_share"] for line in pretrain(photos, tmp_path / name, flags) if "loss" in line]
        for name, flags in {
            "pixels": "--masked.target pixels --visible.weight 0",
            "network": f"--masked.target timm:local-dir:{tmp_path / 'teacher'} --visible.weight 0",
        }.items()
    }
    assert all(0 < share < 1 for values in shares.values() for share in values)
    assert min(shares["network"]) > max(shares["pixels"])


def test_pretrain__that_learns_nothing_says_so_from_the_middle_on(photos, tmp_path, capsys):
    pretrain(photos, tmp_path / "run", "--optim.blr 0 --steps 8 --monitor.evals 3")
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: step")]
    assert [line.split(":")[1] for line in warned] == [" step 6"]


def test_pretrain__learning_rate_follows_the_rule(run):
    _, lines = run
    first = next(line["lr"] for line in lines if "lr" in line)
    assert first == pytest.approx(3.0e-3 * 8 * (1.0 / 0.6) / 256)


def test_pretrain__the_same_seed_gives_the_same_losses(run, photos, tmp_path):
    assert losses(pretrain(photos, tmp_path / "again")) == losses(run[1])


@pytest.mark.long
@pytest.mark.parametrize("model", ["vit", "vit --model.mask_token --decoder.depth 0", "convvit"])
def test_pretrain__with_crops_that_grow_it_resumes_as_if_unbroken(model, photos, tmp_path):
    flags = f"--model.backbone {model} --masking.block 1 --steps 12 --monitor.evals 0"
    whole = losses(pretrain(photos, tmp_path / "whole", flags))
    grown, out = losses(pretrain(photos, tmp_path / "grown", f"{flags} --crop.progressive 0.5")), tmp_path / "grown"
    assert all(own != other for own, other in zip(grown, whole, strict=True))
    # As if killed after step 6, when crops are small still.
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    (out / "summary.json").unlink()
    assert main(["pretrain", "--data", str(photos), "--out", str(out), "--resume"]) == 0
    assert losses([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]) == grown


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1",
        "--batch_size 16",
        "--steps 5",
        "--masking.num_views 3",
        "--masking.mask_ratio 0.75",
        "--masking.predict_ratio 0.75",
        "--masking.block 1",
        "--crop.scale 0.1 0.2",
        "--crop.ratio 1 1",
        "--crop.no-flip",
        "--crop.variants 1 --steps 5 --batch_size 38",
        "--optim.name lion",
        "--optim.blr 1e-2",
        "--optim.betas 0.5 0.6",
        "--optim.weight_decay 50",
        "--optim.warmup_epochs 0.5",
        "--optim.clip_grad 1e-9",
        "--optim.accumulation 2",
        "--precision bf16",
        "--model.in_chans 1",
        "--visible.weight 0.5",
        "--visible.no-aligned",
        "--masked.target pixels",
        "--hog.cell_size 8",
        "--hog.variant maskfeat",
        "--hog.variant mmpretrain",
        "--model.backbone convvit",
    ],
)
def test_pretrain__every_setting_changes_the_losses(flags, run, photos, tmp_path):
    assert losses(pretrain(photos, tmp_path / "other", flags)) != losses(run[1])


def test_pretrain__monitor_settings_change_what_is_written(photos, tmp_path):
    flags = "--monitor.log_every 2 --monitor.evals 0 --monitor.saves 4 --monitor.max_images 4"
    lines = pretrain(photos, tmp_path / "other", flags)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 4]
    saved = sorted(path.name for path in (tmp_path / "other" / "checkpoints").iterdir())
    assert saved == ["step-00000003", "step-00000004"]


def test_pretrain__evaluations_look_at_no_larger_share_of_the_images_than_they_may(photos, tmp_path):
    evaluated = {}
    for share in (0.05, 0.15, 0.3, 1.0):  # an evaluation looks twice at 4 training and both held-out images
        flags = f"--steps 10 --monitor.evals 3 --monitor.max_images 4 --monitor.max_share {share}"
        lines = pretrain(photos, tmp_path / str(share), flags)
        evaluated[share] = len([line for line in lines if "knn_top1" in line]) - 2  # before and after the run
    assert evaluated == {0.05: 0, 0.15: 1, 0.3: 2, 1.0: 3}  # of 80 images


def test_pretrain__epochs_count_passes_over_the_images_also_of_the_warm_up(photos, tmp_path):
    lines = pretrain(photos, tmp_path / "run", "--epochs 1.5 --optim.warmup_epochs 0.5", steps=None)
    assert lines[-1]["step"] == round(1.5 * 38 / 8)  # 2 of the 40 images are held out
    first, second, third, fourth = [line["lr"] for line in lines if "lr" in line][:4]
    assert (second / first, third / first) == (pytest.approx(2), pytest.approx(3))  # the peak is at 0.5 * 38 / 8
    assert third < fourth < 0.5 * 38 / 8 * first + first


def test_pretrain__without_labels_reports_rankme(photos, tmp_path):
    lines = pretrain(photos / "class0", tmp_path / "run")
    measured = [line["rankme"] for line in lines if "rankme" in line]
    assert len(measured) == 3
    assert all(value >= 1 for value in measured)


def test_pretrain__backbone_is_the_trained_one(run):
    out, _ = run
    backbone = dmjd.load_backbone(out / "backbone.safetensors")
    model = load_file(out / "checkpoints" / "step-00000004" / "model.safetensors")
    for name, value in backbone.state_dict().items():
        assert value.equal(model[f"encoder.backbone.{name}"])


def test_warmup_cosine__rises_in_a_line_and_falls_to_zero():
    lr = warmup_cosine(1.0, warmup=4.0, steps=20)
    rates = [lr(step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1
    assert rates[12] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.02


def test_lr__is_the_papers_rule():
    settings = PretrainSettings(run=PretrainRun(preset="dmjd", batch_size=512))
    assert settings.lr == pytest.approx(6e-4 * 512 * (1.0 / 0.6) / 256)
