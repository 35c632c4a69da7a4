"""A command line does what it says, or says in one line what is wrong with it."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import dmjd
from dmjd.cli import VERBS, application, flag_value, layers_of, main
from dmjd.cli import settings_of as resolved
from dmjd.config import downstream
from dmjd.config.pretrain import MonitorSettings, PretrainSettings
from dmjd.config.rules import PRESETS, to_dict, to_yaml
from dmjd.errors import ConfigError

RECIPES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
NAMES = [*(verb.name for verb in VERBS), "report"]
NEEDED = {verb.name: ["--data", "d", "--backbone", "b.safetensors"] for verb in VERBS}
NEEDED["pretrain"] = ["--data", "d"]
NEEDED["embed"] += ["--out", "f.npy"]
NEEDED["predict"] += ["--out", "p.csv"]
NEEDED["search"] = ["--features", "f.npy", "--out", "s", "--duplicates"]
NEEDED["export"] = ["r", "--to", "timm", "--out", "o"]
NEEDED["prepare"] = ["--data", "d", "--out", "s"]
NEEDED["doctor"] = ["--data", "d"]
NEEDED["plan"] = []


def settings_of(*arguments: object) -> Any:
    """What a command line means, without doing it."""
    words = [str(word) for word in arguments]
    app = application(layers_of(words))
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["settings"]


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def error_of(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad command line gives on stderr."""
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


# -- usage -------------------------------------------------------------------------------------------------------------

WITH_DATA = ("pretrain", "knn", "linear", "finetune", "embed")  # what a line leaves out, so that it is short
BAD = {  # command line: what its error line has to say
    "pretrian": 'Did you mean "pretrain"?',
    "--preset quick": 'Unknown command "--preset";',
    "pretrian --help": 'Did you mean "pretrain"?',
    "pretrain --epocs 3": "Did you mean --epochs?",
    "pretrain --model.image_sze 32": "Did you mean --model.image_size?",
    "pretrain --optim.accumulaton 2": "Did you mean --optim.accumulation?",
    "pretrain --preset dmj": "did you mean dmjd?",
    "pretrain --preset=maskfit": "did you mean maskfeat?",
    "pretrain --preset xyz": ", ".join(RECIPES),
    "pretrain --preset": "--preset",
    "pretrain stray": "stray",
    "pretrain --data": "--data",
    "pretrain --batch_size many": "--batch_size",
    "pretrain --batch_size 0": "batch_size 0",
    "pretrain --batch_size -4": "batch_size -4",
    "pretrain --batch_size 5 --optim.accumulation 2": "batch_size 5",
    "pretrain --steps 0": "steps 0",
    "pretrain --steps -1": "steps -1",
    "pretrain --epochs nan": "epochs nan",
    "pretrain --epochs -1": "epochs -1",
    "pretrain --epochs 0": "epochs 0",
    "linear --backbone x --layers -1 -3": "not understood: -3; a flag of several values is given once for each",
    "pretrain --seed -1": "seed -1",
    "pretrain --workers -1": "workers -1",
    "pretrain --workers some": "--workers",
    "pretrain --precision fp8": "--precision",
    "pretrain --device nowhere": "--device nowhere",
    "pretrain --resume maybe": "maybe",
    "pretrain --model.size huge": "--model.size",
    "pretrain --model.backbone vitt": "did you mean vit?",
    "pretrain --parallel dp": "--parallel",
    "pretrain --model.image_size abc": "model.image_size 'abc'",
    "pretrain --model.image_size 32x": "model.image_size '32x'",
    "pretrain --model.image_size 65 --model.patch_size 16": "model.image_size 65",
    "pretrain --model.image_size 0": "model.image_size '0'",
    "pretrain --model.patch_size 0": "model.patch_size 0",
    "pretrain --model.patch_size -8": "model.patch_size -8",
    "pretrain --model.in_chans 0": "model.in_chans 0",
    "pretrain --monitor.channels 0 1 3": "monitor.channels (0, 1, 3)",
    "pretrain --data_range 5 5": "data_range (5.0, 5.0)",
    "pretrain --data_pages leaves": "data_pages",
    "pretrain --data_on_device maybe": "data_on_device",
    "pretrain --model.depth 0": "model.depth 0",
    "pretrain --model.embed_dim 0": "model.embed_dim 0",
    "pretrain --model.num_heads 0": "model.num_heads 0",
    "pretrain --model.reg_tokens -1": "model.reg_tokens -1",
    "pretrain --model.mask_token": "decoder.depth",
    "pretrain --masking.num_views 0": "masking.num_views 0",
    "pretrain --masking.block 0": "masking.block 0",
    "pretrain --masking.mask_ratio 0": "mask_ratio 0",
    "pretrain --masking.mask_ratio 1.2": "mask_ratio 1.2",
    "pretrain --masking.mask_ratio 0.5 --masking.predict_ratio 0.1": "predict_ratio 0.1",
    "pretrain --masked.target edges": "no target of this name; edges",
    "pretrain --visible.target hogg": "did you mean hog?",
    "pretrain --visible.beta 0": "visible.beta 0",
    "pretrain --masked.loss l3": "--masked.loss",
    "pretrain --visible.weight -1": "visible.weight -1",
    "pretrain --hog.cell_size 0": "hog.cell_size 0",
    "pretrain --hog.variant dalal": "--hog.variant",
    "pretrain --decoder.num_heads 0": "decoder.num_heads 0",
    "pretrain --decoder.embed_dim 0": "decoder.embed_dim 0",
    "pretrain --decoder.embed_dim 97": "decoder.embed_dim 97",
    "pretrain --decoder.depth 0": "decoder.depth",
    "pretrain --decoder.depth -1": "decoder.depth -1",
    "pretrain --crop.scale 0.9 0.1": "crop.scale",
    "pretrain --crop.scale 0.5": "--crop.scale",
    "pretrain --crop.ratio 0 1": "crop.ratio",
    "pretrain --crop.empty-scale": "Did you mean --crop.scale?",
    "pretrain --crop.variants 0": "crop.variants 0",
    "pretrain --teacher.cache kept --masked.target timm:x": "set crop.variants",
    "pretrain --masked.target hog+pixel": "did you mean pixels?",
    "pretrain --monitor.max_share -1": "monitor.max_share -1",
    "pretrain --optim.name sdg": "optim.name",
    "pretrain --optim.blr -1": "optim.blr -1",
    "pretrain --optim.weight_decay -1": "optim.weight_decay -1",
    "pretrain --optim.accumulation 0": "optim.accumulation 0",
    "pretrain --optim.clip_grad -1": "optim.clip_grad -1",
    "pretrain --optim.warmup_epochs -1": "optim.warmup_epochs -1",
    "pretrain --monitor.log_every 0": "monitor.log_every 0",
    "pretrain --monitor.max_images 0": "monitor.max_images 0",
    "pretrain --monitor.saves -1": "monitor.saves -1",
    "pretrain --monitor.evals -1": "monitor.evals -1",
    "pretrain --config nowhere.yaml": "nowhere.yaml",
    "knn": "--backbone",
    "knn --bakbone y": "Did you mean --backbone",
    "linear": "--backbone",
    "segment --data d": "--backbone",
    "embed": "--backbone",
    "knn --backbone": "--backbone",
    "knn --backbone x --k 0": "k 0",
    "knn --backbone x --temperature 0": "temperature 0",
    "knn --backbone x --batch_size 0": "batch_size 0",
    "knn --backbone x --seed -1": "seed -1",
    "knn --backbone x --workers -1": "workers -1",
    "linear --backbone x --fraction 0": "fraction 0",
    "linear --backbone x --fraction 0.5 --shots 2": "choose one of them",
    "linear --backbone x --shots 0": "shots 0",
    "linear --backbone x --blr -1": "blr -1",
    "linear --backbone x --log.saves -1": "log.saves -1",
    "finetune --backbone x --layer_decay 2": "layer_decay 2",
    "finetune --backbone x --drop_path 1": "drop_path 1",
    "finetune --backbone x --ema 1": "ema 1",
    "finetune --backbone x --augment.mixup -1": "augment.mixup -1",
    "finetune --backbone x --augment.random_erasing 1": "augment.random_erasing 1",
    "finetune --backbone x --optim.blr -1": "optim.blr -1",
    "finetune --backbone x --batch_size 5 --optim.accumulation 2": "batch_size 5",
    "segment --backbone x": "--data",
    "segment --backbone x --data d --crop_size 12y": "crop_size '12y'",
    "segment --backbone x --data d --stride 999": "stride 999",
    "segment --backbone x --data d --batch_size 1": "BatchNorm",
    "detect --backbone x": "--data",
    "detect --backbone x --data d --scale 2 1": "scale (2.0, 1.0)",
    "detect --backbone x --data d --window 0": "window 0",
    "knn --backbone x --bakbone y": "--backbone",
    "embed --backbone x": "--out",
    "embed --backbone x --out f --batch_size 0": "batch_size 0",
    "prepare --data d": "--out",
    "prepare --data d --out s --size 0": "size 0",
    "prepare --data d --out s --in_chans 0": "in_chans 0",
    "prepare --data d --out s --workers -1": "workers -1",
    "doctor": "--data",
    "doctor d --max_images 0": "max_images 0",
    "doctor d --workers 0": "workers 0",
    "plan": "--images",
    "plan --images 0": "images 0",
    "plan --images 9 --device h10": "did you mean h100?",
    "plan --images 9 --devices 3": "--devices",
    "plan --images 9 --preset auto": "--config",
    "report": "RUN",
    "--nonsense": "nonsense",
}


@pytest.mark.parametrize("line", BAD)
def test_main__a_bad_command_line_is_one_line_and_exit_code_2(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *words = line.split()
    data = ["--data", "shapes"] if verb in WITH_DATA and "--data" not in words else []
    assert BAD[line] in error_of([verb, *data, *words], 2, capsys)
    assert not list(tmp_path.iterdir())


def test_main__a_path_that_is_no_text_is_printed_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / os.fsdecode(b"run\xff")
    run.mkdir()
    (run / "config.yaml").write_text("data: d")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # as in most locales: strict
    assert main(["report", str(run)]) == 0
    sys.stdout.flush()
    assert rb"run\udcff/report.html" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("verb", WITH_DATA)
def test_main__without_data_it_says_so_and_how_to_see_the_demo(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in NEEDED[verb] if word not in ("--data", "d")]
    said = error_of([verb, *words], 2, capsys)
    assert said.startswith("error: no data; --data; give a folder of images, or --data shapes for the built-in demo")


BAD_FILES = {  # content of --config: what the error line has to say
    "epocs: 3": 'Unknown option: "epocs" from ',
    "model: {pach_size: 8}": "Did you mean --model.patch_size?",
    "batch_size: many": "batch_size",
    "model: {patch_size: 0}": "model.patch_size 0",
    "model: 3": "model",
    "preset: dmj": "did you mean dmjd?",
    "preset: 5": "--preset 5",
    "- a\n- b": "list",
    "a: [1\nb: }": "line 2",
    "\udcff\udcfe": "not YAML",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_main__a_bad_configuration_is_one_line_that_names_the_file_and_exit_code_2(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content, errors="surrogateescape")
    error = error_of(["pretrain", "--data", "d", "--out", str(tmp_path / "run"), "--config", str(file)], 2, capsys)
    assert BAD_FILES[content] in error
    if not content.startswith(("preset", "model: {patch")):  # a value that is wrong wherever it comes from
        assert str(file) in error


@pytest.mark.parametrize("line", ["pretrain --epocs 3", "knn --data d --backbone x --k 0"])
def test_main__a_bad_command_line_shows_no_traceback_from_a_shell(line: str) -> None:
    done = python("-m", "dmjd.cli", *line.split())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert not done.stdout


def test_main__python_m_dmjd_is_the_same_command_line() -> None:
    ours, theirs = (
        python("-m", "dmjd", "pretrain", "--epocs", "3"),
        python("-m", "dmjd.cli", "pretrain", "--epocs", "3"),
    )
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)
    assert python("-m", "dmjd", "--help").stdout.startswith("Usage: dmjd ")


@pytest.mark.parametrize(("rank", "start"), [("0", "error: steps 0"), ("3", "error (process 3): steps 0")])
def test_main__another_process_than_the_first_says_which_it_is(
    rank: str, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert main(["pretrain", "--data", "d", "--steps", "0"]) == 2
    assert capsys.readouterr().err.startswith(start)


def test_main__debug_shows_the_traceback_and_keeps_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--data", "nowhere", "--model.patch_size", "0", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("error: model.patch_size 0")


# -- data and backbones ------------------------------------------------------------------------------------------------


def test_main__no_data_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for data in ("nowhere", "empty"):
        small = ["--model.depth", "1", "--out", "run", "--device", "cpu"]
        assert data in error_of(["pretrain", "--data", data, *small], 3, capsys)
    assert not (tmp_path / "run").exists()


def test_main__a_backbone_that_is_none_is_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("not a backbone")
    (tmp_path / "folder").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "bare")
    for name in ("nowhere", "text", "folder", "bare"):
        assert name in error_of(["knn", "--data", "shapes", "--backbone", str(tmp_path / name)], 4, capsys)
    for name in ("timm:no_such_model", "timm:"):
        words = ["--data", "shapes", "--backbone", name, "--out", str(tmp_path / "f.npy")]
        assert name in error_of(["embed", *words], 4, capsys)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_settings__flags_over_file_over_preset_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: mae\nbatch_size: 64\nmodel: {size: small, depth: 3}\n")
    preset = yaml.safe_load((PRESETS / "mae.yaml").read_text())
    settings = settings_of("pretrain", "--data", "d", "--config", file, "--model.depth", 2)
    assert settings.model.depth == 2
    assert (settings.run.batch_size, settings.model.size) == (64, "small")
    assert (settings.run.epochs, settings.masking.block) == (preset["epochs"], preset["masking"]["block"])
    assert settings.monitor == MonitorSettings()
    other = settings_of("pretrain", "--data", "d", "--config", file, "--preset", "dmjd")
    assert (other.run.batch_size, other.masking.num_views, other.run.preset) == (64, 2, "dmjd")


@pytest.mark.parametrize(
    ("verb", "path"),
    [(verb.name, path) for verb in VERBS if verb.presets for path in sorted(verb.presets.glob("*.yaml"))],
)
def test_settings__every_preset_loads_through_the_command_line(verb: str, path: Path) -> None:
    recipe = dict(leaves(yaml.safe_load(path.read_text())))
    loaded = dict(leaves(to_dict(settings_of(verb, "--preset", path.stem, *NEEDED.get(verb, [])))))
    assert loaded["preset"] == path.stem
    for name, value in recipe.items():
        assert str(loaded[name]) == str(value) or loaded[name] == value, name


def test_settings__without_a_preset_auto_holds() -> None:
    assert settings_of("pretrain", "--data", "d") == settings_of("pretrain", "--data", "d", "--preset", "auto")


def test_settings__flags_take_a_value_after_a_space_or_an_equals_sign() -> None:
    joined = settings_of("pretrain", "--data=d", "--preset=dm", "--seed=3")
    assert joined == settings_of("pretrain", "--data", "d", "--preset", "dm", "--seed", 3)


@pytest.mark.parametrize("words", [["--model.image-size", "48"], ["--model.image-size=48"]])
def test_settings__auto_hears_flags_that_are_spelt_with_hyphens(words: list[str]) -> None:
    assert flag_value(["pretrain", "--data", "d", *words], "--model.image_size") == "48"


def test_settings__a_section_given_in_part_keeps_the_defaults_of_its_verb(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {weight_decay: 0.1}\n")
    start = downstream.StartSettings(backbone="b")
    assert downstream.FinetuneSettings(start=start).optim == downstream.TuningOptim()
    words = ["finetune", *NEEDED["finetune"], "--optim.clip_grad", "1"]
    _, bound, _ = application([file]).parse_args(words, exit_on_error=False, print_error=False)
    expected = downstream.TuningOptim(weight_decay=0.1, clip_grad=1.0)
    assert bound.arguments["settings"].optim == expected
    assert (expected.blr, expected.betas, expected.warmup_epochs) == (5e-4, (0.9, 0.999), 5)


def test_settings__the_learning_rate_follows_the_batch() -> None:
    paper = settings_of("pretrain", "--data", "d", "--preset", "dmjd")
    assert paper.lr == pytest.approx(6e-4 * 512 * (1.0 / 0.6) / 256)
    for verb in ("finetune", "segment", "detect"):
        flags = ["--batch_size", 64, "--optim.blr", 1e-3]
        assert settings_of(verb, *NEEDED[verb], *flags).lr == pytest.approx(1e-3 * 64 / 256)
    flags = ["--recipe", "paper", "--batch_size", 64, "--blr", 0.2]
    assert settings_of("linear", *NEEDED["linear"], *flags).lr == pytest.approx(0.05)


@pytest.mark.parametrize(("flags", "steps"), [(["--epochs", 2], 20), (["--epochs", 0.01], 1), (["--steps", 7], 7)])
def test_settings__steps_come_from_epochs_or_are_given(flags: list[object], steps: int) -> None:
    assert settings_of("pretrain", "--data", "d", "--batch_size", 10, *flags).run.num_steps(100) == steps


CHANGED = """--preset quick --model.image_size 64x32 --model.embed_dim 48 --crop.scale 0.2 0.9 --crop.no-flip
--optim.blr 1e-5 --data 007"""


@pytest.mark.parametrize(
    ("flags", "images", "steps"),
    [
        *(([], 31, 48), ([], 307, 480), ([], 3068, 500), ([], 50_000, 7812)),
        *((["--epochs", 3], 320, 15), (["--steps", 7], 9, 7)),
    ],
)
def test_settings__fine_tuning_goes_on_where_images_are_few(flags: list[object], images: int, steps: int) -> None:
    assert settings_of("finetune", *NEEDED["finetune"], *flags).run.num_steps(images) == steps


def test_config_yaml__reads_back_to_equal_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = settings_of("pretrain", *CHANGED.split(), "--steps", 7, "--out", out)
    assert (settings.run.data, settings.model.image_hw, settings.crop.flip) == ("007", (64, 32), False)
    out.mkdir()
    (out / "config.yaml").write_text(to_yaml(settings))
    assert settings_of("pretrain", "--out", out, "--resume") == replace(
        settings, run=replace(settings.run, resume=True)
    )
    again = settings_of("pretrain", "--config", out / "config.yaml", "--out", "other")
    run = replace(settings.run, config=out / "config.yaml", out=Path("other"))
    assert again == replace(settings, run=run)


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_config_yaml__of_every_verb_has_its_flags_as_keys_and_reads_back(verb: str, tmp_path: Path) -> None:
    settings = settings_of(verb, *NEEDED.get(verb, []))
    written = to_yaml(settings)
    assert set(dict(leaves(yaml.safe_load(written)))) == {name for name, value in walk(settings) if value is not None}
    file = tmp_path / "config.yaml"
    file.write_text(written)
    _, bound, _ = application([file]).parse_args([verb], exit_on_error=False, print_error=False)
    assert bound.arguments["settings"] == settings


@pytest.mark.parametrize("flag", ["--resume", "--resume=true", "--resume=Yes"])
def test_config_yaml__is_what_a_run_is_resumed_with_however_the_flag_is_written(flag: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: mae\nepochs: 7\nmasking: {num_views: 2, predict_ratio: 1.0}\n")
    settings = settings_of("pretrain", "--data", "d", "--out", str(tmp_path), flag)
    assert (settings.run.epochs, settings.masking.num_views, settings.run.resume) == (7, 2, True)


def test_config_yaml__is_found_where_a_file_of_settings_says_the_run_is(tmp_path: Path) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text(f"preset: mae\nout: {out}\n")
    out.mkdir()
    (out / "config.yaml").write_text("preset: mae\nepochs: 7\n")
    settings = settings_of("pretrain", "--data", "d", "--config", str(file), "--resume")
    assert (settings.run.out, settings.run.epochs) == (out, 7)


@pytest.mark.parametrize("name", ["2024", "7.5", "true"])  # of these YAML makes other types than text
def test_config__a_run_may_have_a_number_as_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"out: {name}")
    settings = settings_of("pretrain", "--data", "d", "--config", str(tmp_path / "mine.yaml"))
    assert str(settings.run.out).lower() == name


@pytest.mark.parametrize(("preset", "epochs"), [("mae", 7), ("dmjd", 400)])
def test_config_yaml__is_under_another_preset_that_is_named_not_under_its_own(
    preset: str, epochs: int, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("preset: mae\nepochs: 7\n")
    settings = settings_of("pretrain", "--data", "d", "--out", str(tmp_path), "--resume", "--preset", preset)
    assert settings.run.epochs == epochs


def test_config_yaml__spoilt_it_is_named_when_the_run_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("{{")
    assert str(tmp_path / "config.yaml") in error_of(["pretrain", "--out", str(tmp_path), "--resume"], 2, capsys)


def test_config_yaml__an_unknown_preset_is_refused_when_a_run_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    arguments = ["pretrain", "--out", str(tmp_path), "--resume", "--preset", "dmj"]
    assert "did you mean dmjd?" in error_of(arguments, 2, capsys)


def test_config_yaml__holds_every_setting_that_is_set(tmp_path: Path) -> None:
    settings = settings_of("pretrain", "--data", "d")
    written = dict(leaves(yaml.safe_load(to_yaml(settings))))
    unset = {name for name, value in walk(settings) if value is None}
    assert set(written) == {name for name, _ in walk(settings)} - unset


# -- help --------------------------------------------------------------------------------------------------------------


FLAT = ("run", "start", "labels", "tuning", "dense")  # groups whose settings have no section in front


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if is_dataclass(value):
            yield from walk(value, prefix if setting.name in FLAT else f"{prefix}{setting.name}.")
        else:
            yield f"{prefix}{setting.name}", value


def test_help__every_setting_has_a_text() -> None:
    app = application()
    for verb in NAMES:
        arguments = app[verb].assemble_argument_collection(
            default_parameter=app.default_parameter, parse_docstring=True
        )
        texts = {
            argument.name.removeprefix("--"): argument.parameter.help for argument in arguments.filter_by(show=True)
        }
        assert all(texts.values()), texts
        if verb == "pretrain":
            assert set(texts) >= {name for name, _ in walk(PretrainSettings())}


def test_help__settings_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    groups = {
        "pretrain": "Run Model Masking Masked Visible HOG Teachers Decoder Crops Optimizer Monitoring",
        "knn": "Run Backbone Labels Task",
        "linear": "Run Backbone Labels Task Log",
        "finetune": "Run Backbone Labels Fine-tuning Augmentation Optimizer Log",
        "segment": "Run Backbone Images Task Fine-tuning Optimizer Log",
        "detect": "Run Backbone Images Task Fine-tuning Optimizer Log",
        "predict": "Run Backbone Task",
        "embed": "Run Backbone Task",
        "search": "Run Backbone Task",
        "export": "Run",
        "prepare": "Run Images",
        "doctor": "Run Images",
        "plan": "Plan Run Model Masking Masked Visible HOG Teachers Decoder Crops Optimizer Monitoring",
    }
    assert set(groups) == {verb.name for verb in VERBS}
    for verb, names in groups.items():
        assert main([verb, "--help"]) == 0
        heads = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("╭")]
        assert heads == names.split()


def test_help__lists_the_verbs_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^│ ([a-z]+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == NAMES


def test_help__says_that_the_preset_auto_replaces_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == 0
    assert "The preset auto, the default, replaces" in " ".join(capsys.readouterr().out.split())


def test_help__says_nothing_of_an_empty_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["linear", "--help"]) == 0
    assert "[default: ()]" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["", *NAMES])
def test_help__prints_soon_and_without_torch(verb: str) -> None:
    program = f"""if True:
        import sys
        from dmjd.cli import main
        code = main([*{verb.split()}, "--help"])
        sys.exit(code or any(name in sys.modules for name in ("torch", "timm", "numpy")))
    """
    for _ in range(3):  # the best of three, in seconds of a processor: the machine does other things
        began = sum(os.times()[2:4])
        done = python("-c", program)
        seconds = sum(os.times()[2:4]) - began
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        if seconds < 2:
            break
    assert seconds < 2  # 0.3 to 0.7 on an idle machine, three times as many where others work
    shown = done.stdout
    assert all(name in shown for name in NAMES) if not verb else "--" in shown
    if verb == "pretrain":
        assert all(f"--{name} " in shown for name, value in walk(PretrainSettings()) if not isinstance(value, bool))


def test_pretrain__starts_without_what_only_its_end_needs() -> None:
    program = "import dmjd.tasks.pretrain, sys; sys.exit(any(name in sys.modules for name in ('matplotlib', 'scipy')))"
    assert python("-c", program).returncode == 0


def defaults_shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What the help of a command line has as defaults, by setting."""
    assert main([*words, "--help"]) == 0
    lines = [line.strip("│* ") for line in capsys.readouterr().out.splitlines() if "[default: " in line]
    return {line.split()[0].removeprefix("--"): line.partition("[default: ")[2].partition("]")[0] for line in lines}


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        (["pretrain"], "auto"),
        (["pretrain", "--preset", "mae"], "mae"),
        (["finetune", "--preset=large"], "finetune/large"),
        (["segment"], "segment/camvid"),
    ],
)
def test_help__shows_the_values_in_force(
    words: list[str], preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = defaults_shown(capsys, *words)
    recipe = dict(leaves(yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())))
    assert shown["preset"] == Path(preset).name
    for name, value in recipe.items():
        assert shown[name] == (f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)), name


def test_help__shows_the_values_of_a_file_over_those_of_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "mine.yaml").write_text("preset: mae\nbatch_size: 24\n")
    shown = defaults_shown(capsys, "pretrain", "--config", str(tmp_path / "mine.yaml"))
    assert (shown["preset"], shown["batch_size"], shown["epochs"]) == ("mae", "24", "1600")


# -- settings in force -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_print_config__prints_what_every_verb_would_do_and_does_nothing(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*NEEDED[verb], *(["--preset", "quick"] if verb == "pretrain" else [])]  # auto would look at the images
    assert main([verb, *words, "--print_config"]) == 0
    assert capsys.readouterr().out == to_yaml(settings_of(verb, *words))
    assert not list(tmp_path.iterdir())


def test_print_config__has_flags_over_file_over_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("preset: mae\nseed: 4\nmodel: {size: small}\n")
    words = ["--data", "d", "--config", str(tmp_path / "mine.yaml"), "--model.size", "tiny"]
    assert main(["pretrain", *words, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["size"], printed["seed"], printed["epochs"]) == ("tiny", 4, 1600)


def test_settings_of__python_gives_what_the_command_line_gives() -> None:
    words = ["--data", "d", "--preset", "mae", "--model.size", "tiny", "--crop.scale", 0.3, 0.9, "--crop.no-flip"]
    expected = settings_of("pretrain", *words, "--seed", 3)
    given = {"data": "d", "preset": "mae", "seed": 3, "steps": None}
    crop = {"scale": (0.3, 0.9), "flip": False}
    assert resolved("pretrain", **given, model={"size": "tiny"}, crop=crop) == expected
    assert resolved("pretrain", **given, model__size="tiny", crop__scale=[0.3, 0.9], crop__flip=False) == expected
    assert resolved("pretrain", data="d", preset="quick").run.epochs == 4
    assert resolved("segment", backbone="b", predict=Path("x")).dense.predict == Path("x")  # also called as a verb is


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modl__size": "tiny"}, "Did you mean --model.size"),
        ({"preset": "dmj"}, "did you mean dmjd"),
        ({"steps": 1.5}, "Invalid value for steps from the call"),
        ({"data": None}, "--data shapes for the built-in demo"),
        ({"model": {"depth": 0}}, "model.depth 0"),
        ({"preset": "quick", "model__size": "tiny"}, "has a size of its own"),
    ],
)
def test_settings_of__a_mistake_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        resolved("pretrain", **{"data": "d", **given})
    assert "\n" not in str(raised.value)


# -- the program -------------------------------------------------------------------------------------------------------


def test_version__is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == dmjd.__version__ == version("dmjd")


def test_completion__is_written_for_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--install-completion", "--shell", "bash"]) == 0
    (script,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.name == "dmjd")
    assert all(word in script.read_text() for word in (*NAMES, "--model.image_size"))
