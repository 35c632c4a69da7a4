"""What labels make of a backbone, end to end on small files."""

import json
import shlex

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import dmjd
from dmjd.cli import main
from dmjd.config.common import StartSettings
from dmjd.config.downstream import AugmentSettings, FinetuneSettings
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.tasks.finetune import Loss

KEYS = {"top1", "top1_low", "top1_high", "top5", "mean_class_accuracy", "images", "train_images", "seconds"}
LIGHT = "--steps 6 --batch_size 8 --workers 0 --device cpu --log.log_every 1 --log.evals 1"


def said(capsys):
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() >= KEYS
    return found


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def words(verb, backbone, data, out, flags=""):
    return [verb, "--backbone", str(backbone), "--data", str(data), "--out", str(out), *flags.split()]


# -- linear ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--shots 2", "--fraction 0.5", "--layers -1 --layers 0", "--untrained"])
def test_linear__classifies_and_writes_its_result(backbones, colours, tmp_path, capsys, flags):
    assert main(words("linear", backbones["vit"], colours, tmp_path / "out", flags)) == 0
    found = said(capsys)
    assert found["images"] == 12
    assert found["train_images"] == {"--shots 2": 6, "--fraction 0.5": 12}.get(flags, 24)
    for name in ("result.json", "report.html", "per_class.csv", "confusion.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_linear__says_where_to_look_and_how_to_predict(backbones, colours, tmp_path, capsys, monkeypatch):
    assert main(words("linear", backbones["vit"], colours, tmp_path / "out")) == 0
    look, _, then = capsys.readouterr().err.splitlines()[-1].partition("; then: dmjd ")
    assert look == f"look at {tmp_path / 'out' / 'report.html'}"
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(then.replace("IMAGES", str(colours)))) == 0


def test_linear__by_the_papers_recipe_it_trains_refuses_to_overwrite_and_resumes(backbones, colours, tmp_path, capsys):
    flags = f"--recipe paper --blr 1 --warmup_epochs 0 {LIGHT} --steps 30"
    flags = flags.replace("--steps 6 ", "")
    command = words("linear", backbones["vit"], colours, tmp_path / "out", flags)
    assert main(command) == 0
    first = said(capsys)
    assert len(set(losses(tmp_path / "out"))) == 30
    assert main(command) == 2
    assert main([*command, "--resume"]) == 0
    assert {**said(capsys), "seconds": 0} == {**first, "seconds": 0}


@pytest.mark.parametrize("flags", ["--epochs 1", "--batch_size 7", "--resume", "--log_to tensorboard", "--log.saves 3"])
def test_linear__flags_of_training_are_refused_where_nothing_is_trained(flags, tmp_path, capsys):
    assert main(words("linear", "b", "d", tmp_path / "out", flags)) == 2
    said = f"{flags.partition(' ')[0]} is for --recipe paper; leave it out, or give --recipe paper"
    assert said in capsys.readouterr().err
    main(words("linear", "b", "d", tmp_path / "out", f"{flags} --recipe paper"))
    assert said not in capsys.readouterr().err


def test_linear__a_file_of_settings_may_hold_more_than_the_recipe_uses(backbones, colours, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("preset: large\nblr: 1e-2\nlog: {saves: 3}\nmax_bad: 0.5\n")
    flags = f"--config {tmp_path}/mine.yaml"
    assert main(words("linear", backbones["vit"], colours, tmp_path / "out", flags)) == 0
    assert said(capsys)["images"] == 12


def test_linear__layers_that_are_not_there_are_one_line(backbones, colours, tmp_path, capsys):
    assert main(words("linear", backbones["vit"], colours, tmp_path / "out", "--layers 99")) == 2
    assert "--layers" in capsys.readouterr().err


def test_linear__by_the_papers_recipe_one_image_at_a_time_is_one_line(backbones, colours, tmp_path, capsys):
    assert main(words("linear", backbones["vit"], colours, tmp_path / "out", "--recipe paper --batch_size 1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: batch_size 1: BatchNorm needs two images at a time or more"


# -- finetune ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "convvit"])
def test_finetune__learns_colours_and_plain_timm_loads_the_result(backbones, colours, tmp_path, capsys, kind):
    out = tmp_path / "out"
    flags = f"{LIGHT.replace('--steps 6', '--steps 40')} --optim.blr 0.1 --layer_decay 1 --optim.warmup_epochs 1"
    assert main(words("finetune", backbones[kind], colours, out, flags)) == 0
    found = said(capsys)
    assert found["top1"] > 0.6
    assert found["best_top1"] >= found["top1"]
    before, after = (load_file(path)["pos_embed"] for path in (backbones[kind], out / "last.safetensors"))
    assert ((after - before).abs().amax(dim=-1) > 1e-4).all()  # positions are trained
    for name in ("best.safetensors", "last.safetensors"):
        with safe_open(out / name, "pt") as file:
            recipe = file.metadata()
        plain = timm.create_model(
            recipe["architecture"],
            **json.loads(recipe["model_args"]),
            pretrained_cfg_overlay=json.loads(recipe["pretrained_cfg"]),
            checkpoint_path=str(out / name),
        ).eval()
        ours, images = dmjd.load_backbone(out / name), torch.randn(2, 3, 32, 32)
        assert ours(images).shape == (2, 3)
        torch.testing.assert_close(plain(images), ours(images))
    assert main(["knn", "--backbone", str(out / "last.safetensors"), "--data", str(colours)]) == 0
    assert said(capsys)["top1"] > 0.6


RANDOM = (
    "--drop_path 0.2 --ema 0.5 --augment.mixup 0.8 --augment.cutmix 1 --augment.random_erasing 0.5 "
    "--augment.auto_augment rand-m9-mstd0.5-inc1 --log.saves 15"
)


def test_loss__blends_by_a_draw_of_torch_and_leaves_numpys_generator_where_it_was():
    settings = FinetuneSettings(start=StartSettings(backbone="vit"), augment=AugmentSettings(mixup=0.8, cutmix=1.0))
    loss, images, labels = Loss(settings, 3, 4), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    model = ParallelModel(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), Ranks(torch.device("cpu")))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        np.random.seed(0)  # noqa: NPY002 (timm draws there)
        before = np.random.get_state()[1:3]  # noqa: NPY002
        losses.append(float(loss(model, images.clone(), labels)))
        np.testing.assert_equal(np.random.get_state()[1:3], before)  # noqa: NPY002
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.long
def test_finetune__stopped_and_resumed_it_ends_as_if_unbroken(backbones, colours, tmp_path, interrupt):
    flags = f"{LIGHT.replace('--steps 6', '--steps 30')} {RANDOM}"
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    assert main(words("finetune", backbones["vit"], colours, unbroken, flags)) == 0
    interrupt(words("finetune", backbones["vit"], colours, stopped, flags))
    assert len(losses(stopped)) < 30
    assert main([*words("finetune", backbones["vit"], colours, stopped, flags), "--resume"]) == 0
    assert losses(stopped) == losses(unbroken)
    assert (stopped / "last.safetensors").stat().st_size == (unbroken / "last.safetensors").stat().st_size


@pytest.mark.slow
def test_finetune__two_workers_train_what_none_does(backbones, colours, tmp_path):
    flags = f"{LIGHT} {RANDOM}"
    assert main(words("finetune", backbones["vit"], colours, tmp_path / "0", flags)) == 0
    assert (
        main(words("finetune", backbones["vit"], colours, tmp_path / "2", flags.replace("workers 0", "workers 2"))) == 0
    )
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


@pytest.fixture(scope="module")
def usual(backbones, colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("usual") / "out"
    assert main(words("finetune", backbones["vit"], colours, out, LIGHT)) == 0
    return losses(out)


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1",
        "--untrained",
        "--shots 3",
        "--layer_decay 0.1",
        "--drop_path 0.9",
        "--augment.scale 0.1 0.2",
        "--augment.no-flip",
        "--augment.auto_augment rand-m9-mstd0.5-inc1",
        "--augment.random_erasing 0.9",
        "--augment.mixup 0.8",
        "--augment.cutmix 1.0",
        "--augment.label_smoothing 0.3",
        "--optim.blr 0.1",
        "--optim.weight_decay 50 --optim.blr 0.1",
        "--optim.warmup_epochs 0",
        "--optim.clip_grad 1e-9",
        "--optim.name lion",
        "--precision bf16",
    ],
)
def test_finetune__every_setting_changes_the_losses(backbones, colours, tmp_path, usual, flags):
    assert main(words("finetune", backbones["vit"], colours, tmp_path / "out", f"{LIGHT} {flags}")) == 0
    assert losses(tmp_path / "out") != usual


def test_finetune__a_grey_backbone_takes_colour_images_and_augmentation(backbones, colours, tmp_path, capsys):
    flags = f"{LIGHT} --augment.auto_augment rand-m9-mstd0.5-inc1"
    assert main(words("finetune", backbones["grey"], colours, tmp_path / "out", flags)) == 0
    assert said(capsys)["images"] == 12


def test_finetune__an_untrained_model_of_timm_is_a_backbone_too(colours, tmp_path, capsys):
    flags = f"{LIGHT.replace('--steps 6', '--steps 1')} --untrained"
    assert main(words("finetune", "timm:resnet10t", colours, tmp_path / "out", flags)) == 0
    assert dmjd.load_backbone(tmp_path / "out" / "last.safetensors").num_classes == 3


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--batch_size 7 --augment.mixup 0.8", "even"),
        ("--fraction 1.5", "fraction 1.5"),
        ("--fraction 0.5 --shots 2", "shots 2"),
        ("--preset quik", "did you mean quick?"),
        ("--ema 1", "ema 1"),
        ("--augment.scale 0.9 0.1", "augment.scale"),
    ],
)
def test_finetune__what_cannot_be_is_one_line(backbones, colours, tmp_path, capsys, flags, reason):
    assert main(words("finetune", backbones["vit"], colours, tmp_path / "out", flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line
