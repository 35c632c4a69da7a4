"""Whatever is wrong with a configuration is one line that names the key, exit code 2, and nothing left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest

from dmjd.cli import VERBS, application, layers_of, main
from dmjd.config.rules import PRESETS

SECONDS = 8.0  # of this process, until the line is there; a busy machine takes longer
NEEDED = {
    "pretrain": "--data d",
    "knn": "--data d --backbone b",
    "linear": "--data d --backbone b",
    "finetune": "--data d --backbone b",
    "segment": "--backbone b --data d",
    "detect": "--backbone b --data d",
    "predict": "--data d --backbone b --out p.csv",
    "embed": "--data d --backbone b --out f.npy",
    "search": "--features f.npy --out s --duplicates",
    "export": "r --to timm --out o",
    "prepare": "--data d --out s",
    "plan": "--images 9",
    "doctor": "--data d",
}
WITH_DATA = ("pretrain", "knn", "linear", "finetune", "embed")  # what a line leaves out, so that it is short


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad configuration gives on stderr, in time."""
    began = time.process_time()
    code = main(arguments)
    seconds = time.process_time() - began
    shown = capsys.readouterr()
    assert code == 2, shown.err
    lines = shown.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not shown.out
    assert seconds < SECONDS
    return lines[0]


def outside(folder: Path) -> list[Path]:
    """All files and folders, those that pytest or we have put there excepted."""
    return sorted(path for path in folder.rglob("*") if path.suffix != ".yaml")


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- flags -------------------------------------------------------------------------------------------------------------

BAD = {  # command line: what its error line has to say, each of the parts
    # numbers beyond what any machine could train with: these ran without end or stopped with a traceback
    "pretrain --monitor.saves 2000000000": "monitor.saves 2000000000 | 0 to 100000",
    "pretrain --monitor.evals 2000000000": "monitor.evals 2000000000 | 0 to 100000",
    "pretrain --monitor.log_every 99999999999": "monitor.log_every | 1 to 1000000",
    "pretrain --masking.num_views 100000": "masking.num_views 100000 | 1 to 100",
    "pretrain --masking.block 100000": "masking.block 100000 | 1 to 1024",
    "pretrain --seed 1180591620717411303424": "seed 1180591620717411303424 | 0 to 9223372036854775807",
    "pretrain --seed 9223372036854775808": "seed 9223372036854775808 | 0 to 9223372036854775807",
    "pretrain --steps 1e30": "--steps",
    "pretrain --steps 2.7": "--steps",
    "pretrain --monitor.channels 0 1 1.5": "--monitor.channels",
    "pretrain --teacher.layers -1.5": "--teacher.layers",
    "pretrain --steps 100000000000": "steps 100000000000 | 1 to 1000000000",
    "pretrain --epochs 1e9": "epochs 1000000000.0 | 1e-06 to 1000000",
    "pretrain --epochs inf": "epochs inf | 1e-06 to 1000000",
    "pretrain --batch_size 10000000000": "batch_size 10000000000 | 1 to 1000000",
    "pretrain --workers 100000": "workers 100000 | 0 to 512",
    "pretrain --checkpoint_minutes inf": "checkpoint_minutes inf | 0 to 10000",
    "pretrain --checkpoint_minutes -1": "checkpoint_minutes -1.0 | 0 to 10000",
    "pretrain --max_bad 1.5": "max_bad 1.5 | 0 to 1",
    "pretrain --max_bad -0.1": "max_bad -0.1 | 0 to 1",
    "pretrain --max_bad nan": "max_bad nan | 0 to 1",
    "pretrain --optim.warmup_epochs 1e9": "optim.warmup_epochs 1000000000.0 | 0 to 1000000",
    "pretrain --optim.blr 1e300": "optim.blr 1e+300 | 0 to 1000",
    "pretrain --optim.blr nan": "optim.blr nan | 0 to 1000",
    "pretrain --optim.betas 0.9 1": "optim.betas (0.9, 1.0) | 0 to 0.9999999",
    "pretrain --optim.betas nan 0.9": "optim.betas (nan, 0.9)",
    "pretrain --optim.betas -0.5 0.9": "optim.betas (-0.5, 0.9)",
    "pretrain --optim.betas 0.9": "--optim.betas",
    "pretrain --optim.clip_grad inf": "optim.clip_grad inf",
    "pretrain --optim.weight_decay inf": "optim.weight_decay inf",
    "pretrain --optim.accumulation 1000000": "optim.accumulation 1000000 | 1 to 10000",
    "pretrain --crop.ratio 1 inf": "crop.ratio (1.0, inf) | 0.01 to 100",
    "pretrain --crop.ratio 1e-300 1e300": "crop.ratio (1e-300, 1e+300) | 0.01 to 100",
    "pretrain --crop.ratio 2 1": "crop.ratio (2.0, 1.0) | low before high",
    "pretrain --crop.ratio nan nan": "crop.ratio (nan, nan)",
    "pretrain --crop.scale 0 1": "crop.scale (0.0, 1.0) | 0.0001 to 1",
    "pretrain --crop.scale 0.5 1.5": "crop.scale (0.5, 1.5) | 0.0001 to 1",
    "pretrain --crop.scale nan 1": "crop.scale (nan, 1.0)",
    "pretrain --crop.variants 100000000000": "crop.variants | 1 to 1000000",
    "pretrain --data_range nan 1": "data_range (nan, 1.0)",
    "pretrain --data_range 0 inf": "data_range (0.0, inf)",
    "pretrain --data_range 9 1": "data_range (9.0, 1.0) | low before high",
    "pretrain --model.image_size 99999999": "model.image_size '99999999' | 1 to 16384",
    "pretrain --model.image_size 64x99999999": "model.image_size '64x99999999' | 1 to 16384",
    "pretrain --model.image_size 16384": "model.image_size 16384 | model.patch_size 8 | at most 65536",
    "pretrain --model.image_size -64": "model.image_size",
    "pretrain --model.image_size 64x64x3": "model.image_size '64x64x3' | HEIGHTxWIDTH",
    "pretrain --model.image_size ²": "model.image_size '²'",
    "pretrain --model.image_size 64.0": "model.image_size '64.0'",
    "pretrain --model.patch_size 100000": "model.patch_size 100000 | 1 to 1024",
    "pretrain --model.embed_dim 100000000": "model.embed_dim 100000000 | 1 to 16384",
    "pretrain --model.embed_dim 130": "model.embed_dim 130 is not a multiple of model.num_heads 4",
    "pretrain --model.depth 1000000": "model.depth 1000000 | 1 to 1000",
    "pretrain --model.num_heads 100000": "model.num_heads 100000 | 1 to 1024",
    "pretrain --model.num_heads 7": "model.embed_dim 128 is not a multiple of model.num_heads 7",
    "pretrain --model.in_chans 100000": "model.in_chans 100000 | 1 to 10000",
    "pretrain --model.reg_tokens 100000": "model.reg_tokens 100000 | 0 to 1024",
    "pretrain --model.conv_mlp_ratio nan": "model.conv_mlp_ratio nan | 1 to 64",
    "pretrain --model.conv_mlp_ratio 4": "conv_mlp_ratio",
    "pretrain --model.backbone convvit --model.patch_size 7 --model.image_size 63": "7 px (16, 8, 4)",
    "pretrain --masking.mask_ratio nan": "masking.mask_ratio nan | 0 to 1",
    "pretrain --masking.mask_ratio 0.999": "mask_ratio 0.999 | choose above 0, at most 0.9",
    "pretrain --masking.predict_ratio inf": "masking.predict_ratio inf | 0 to 1",
    "pretrain --masking.num_views 1": "predict_ratio 1.0 | between 0.6 and 0.6",
    "pretrain --visible.weight nan": "visible.weight nan",
    "pretrain --visible.beta inf": "visible.beta inf",
    "pretrain --teacher.decay 0.9 0.1": "teacher.decay (0.9, 0.1) | low before high",
    "pretrain --teacher.decay nan 1": "teacher.decay (nan, 1.0) | 0 to 1",
    "pretrain --teacher.layers 99999": "teacher.layers (99999,)",
    "pretrain --data {colours} --teacher.cache kept --crop.variants 2": "no frozen teacher",
    "pretrain --data {colours} --preset quick --epochs 1 --batch_size 8 --crop.progressive 0.5": "2 sizes of crops",
    "pretrain --preset mae --crop.progressive 2": "crop.progressive",
    "pretrain --preset data2vec --model.size tiny --crop.progressive 0.5": "does not work with a network as the target",
    "pretrain --hog.cell_size 100000": "hog.cell_size 100000 | 1 to 1024",
    "pretrain --hog.cell_size 3": "cell",
    "pretrain --decoder.embed_dim 100000000": "decoder.embed_dim 100000000 | 1 to 16384",
    "pretrain --decoder.depth 100000": "decoder.depth 100000 | 0 to 1000",
    "pretrain --decoder.mlp_ratio nan": "decoder.mlp_ratio nan | 0 to 64",
    "pretrain --decoder.num_heads 7": "decoder.embed_dim 96 | 7 heads",
    "pretrain --monitor.max_share nan": "monitor.max_share nan",
    "pretrain --monitor.max_images 99999999999": "monitor.max_images | 1 to 1000000",
    "pretrain --monitor.channels 0 1": "--monitor.channels",
    "pretrain --monitor.channels 0 1 99999999999": "monitor.channels (0, 1, 99999999999)",
    # names
    "pretrain --preset mae --optim lamb": "a section, not a setting; --optim lamb | such as --optim.name",
    "pretrain --preset mae --masking=4": "a section, not a setting; --masking 4 | such as --masking.num_views",
    "finetune --optim lamb": "a section, not a setting; --optim lamb",
    "pretrain --size tiny": "--size | Did you mean --model.size?",
    "pretrain --depth 3": "--depth | Did you mean --model.depth or --decoder.depth?",
    "pretrain --lr 3": "--lr | Did you mean --optim.blr?",
    "pretrain --patchsize 8": "Did you mean --model.patch_size?",
    "pretrain --imagesize 8": "Did you mean --model.image_size?",
    "pretrain --mask_ratio 0.5": "Did you mean --masking.mask_ratio?",
    "pretrain --optim.lr 3": "Did you mean --optim.blr?",
    "pretrain --model.blr 3": "Did you mean --optim.blr?",
    "pretrain --no-flip": "Did you mean --crop.no-flip?",
    "pretrain --target=hog": "Did you mean --masked.target or --visible.target?",
    "pretrain --model tiny": "a section, not a setting; --model tiny; choose one of its settings",
    "pretrain --allow_change nonsense": "--allow_change nonsense | a setting as config.yaml names it",
    "pretrain --allow_change blr": "--allow_change blr | did you mean optim.blr?",
    "pretrain --allow_change optim.bl": "did you mean optim.blr?",
    "pretrain --resume --allow_change batchsize": "did you mean batch_size?",
    "pretrain --masked.target hog+hogg": "did you mean hog?",
    "pretrain --masked.target pixel:3": "pixel",
    "pretrain --model.backbone vti": "did you mean vit?",
    "pretrain --data {colours} --optim.name adam_w2": "optim.name 'adam_w2'",
    "pretrain --data {colours} --optim.name adahessian": "optim.name 'adahessian' | such as adamw",
    "pretrain --data {colours} --optim.name lookahead_kron": "optim.name 'lookahead_kron' | such as adamw",
    "pretrain --data_pages pages": "--data_pages",
    "pretrain --data {colours} --data_statistics 5": "no statistics | 5",
    "pretrain --preset ../quick": "--preset ../quick",
    "pretrain --device cuda:9999": "--device cuda:9999",
    "pretrain --compile maybe": "maybe",
    # the other verbs
    "knn --backbone b --k 99999999999": "k 99999999999 | 1 to 1000000",
    "knn --backbone b --temperature nan": "temperature nan | 0.02 to 1000",
    "knn --backbone b --layers 99999999999": "layers (99999999999,)",
    "knn --backbone b --preset quick": "--preset",
    "knn --backbone b --batchsize 3": "Did you mean --batch_size?",
    "linear --backbone b --fraction nan": "fraction nan | above 0, at most 1",
    "linear --backbone b --fraction 1.5": "fraction 1.5 | above 0, at most 1",
    "linear --backbone b --shots 99999999999": "shots 99999999999 | 1 to 1000000",
    "linear --backbone b --recipe papers": "--recipe",
    "linear --backbone b --blr inf": "blr inf | 0 to 1000",
    "linear --backbone b --warmup_epochs 1e9": "warmup_epochs 1000000000.0 | 0 to 10000",
    "linear --backbone b --evals 3": "Did you mean --log.evals?",
    "linear --backbone b --allow_change optim.blr": "did you mean blr?",
    "linear --backbone b --log.saves 2000000000": "log.saves 2000000000 | 0 to 100000",
    "finetune --backbone b --augment.auto_augment nonsense": "augment.auto_augment 'nonsense' | rand-m9",
    "finetune --backbone b --augment.auto_augment rand-m9-z3": "augment.auto_augment 'rand-m9-z3'",
    "finetune --backbone b --augment.auto_augment rand-mnan": "augment.auto_augment 'rand-mnan'",
    "finetune --backbone b --augment.auto_augment rand-p7": "augment.auto_augment 'rand-p7'",
    "finetune --backbone b --augment.scale 1 0.5": "augment.scale (1.0, 0.5) | low before high",
    "finetune --backbone b --augment.random_erasing nan": "augment.random_erasing nan | 0 to 0.999",
    "finetune --backbone b --augment.mixup inf": "augment.mixup inf | 0 to 1000",
    "finetune --backbone b --augment.label_smoothing 1": "augment.label_smoothing 1.0 | 0 to 0.999",
    "finetune --backbone b --layer_decay nan": "layer_decay nan | 0.01 to 1",
    "finetune --backbone b --ema nan": "ema nan | 0 to 0.9999999",
    "finetune --backbone b --mixup 0": "Did you mean --augment.mixup?",
    "finetune --backbone b --preset quik": "did you mean quick?",
    "segment --backbone b --data d --crop_size 99999": "crop_size '99999' | 1 to 16384",
    "segment --backbone b --data d --scale nan 1": "scale (nan, 1.0) | 0.01 to 100",
    "segment --backbone b --data d --ignore_index 99999999999": "ignore_index | 0 to 65535",
    "segment --backbone b --data d --auxiliary_weight nan": "auxiliary_weight nan",
    "segment --backbone b --data d --decoder_channels 99999999": "decoder_channels | 1 to 16384",
    "segment --backbone b --data d --schedule linear": "--schedule",
    "segment --backbone b --data d --inference sliding": "--inference",
    "detect --backbone b --data d --fpn_channels 99999999": "fpn_channels | 1 to 16384",
    "detect --backbone b --data d --window 99999": "window 99999 | 1 to 1024",
    "detect --backbone b --data d --optim.betas 2 2": "optim.betas (2.0, 2.0)",
    "embed --backbone b --out f --workers 99999": "workers 99999 | 0 to 512",
    "embed --backbone b --out f --seed 3": "--seed",
    "prepare --data d --out s --size 99999999": "size 99999999 | 1 to 16384",
    "prepare --data d --out s --shard_mb 0": "shard_mb 0 | 1 to 1048576",
    "prepare --data d --out s --in_chans many": "--in_chans",
    "doctor d --max_images nan": "--max_images",
    "doctor d --seed -1": "seed -1 | 0 to 9223372036854775807",
    "doctor d e f": "e",
    "report": "RUN",
    "report a b": "not a run directory; a",
}


@pytest.mark.parametrize("line", BAD)
def test_flags__what_is_wrong_is_one_line_that_names_the_key_and_the_range(
    line: str, colours: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *words = line.format(colours=colours).split()
    data = ["--data", "d"] if verb in WITH_DATA and "--data" not in words else []
    if verb == "pretrain":  # by a preset whose values are known: auto chooses some of them
        data += [] if "--preset" in line else ["--preset", "quick"]
        data += ["--out", "run"]
    said = error_of([verb, *data, *words], capsys)
    for part in BAD[line].split(" | "):
        assert part in said
    assert not outside(empty)


def test_flags__there_are_120_bad_ones_and_more() -> None:
    assert len(BAD) >= 120


# -- every number of every verb ----------------------------------------------------------------------------------------


def numbers(verb: str) -> Iterator[tuple[str, type, int]]:
    """Flags of a verb that take numbers: the flag, the kind of number, how many."""
    app = application()
    for argument in app[verb].assemble_argument_collection(default_parameter=app.default_parameter):
        hint: Any = argument.hint
        if get_origin(hint) in (Union, UnionType):
            hint = next(each for each in get_args(hint) if each is not type(None))
        parts = get_args(hint) if get_origin(hint) is tuple else (hint,)
        if argument.parse and parts[0] in (int, float):
            yield argument.name, parts[0], sum(part is not ... for part in parts)


@pytest.mark.parametrize("verb", NEEDED)
@pytest.mark.parametrize(
    "value", ["nan", *(pytest.param(value, marks=pytest.mark.slow) for value in ("1e300", "-inf", "1" + 30 * "0", "x"))]
)
def test_numbers__of_every_verb_refuse_what_is_none_or_beyond_all_bounds(
    verb: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, _, count in numbers(verb):
        quick = ["--preset", "quick"] if verb == "pretrain" and flag != "--preset" else []
        said = error_of([verb, *NEEDED[verb].split(), *quick, flag, *count * [value]], capsys)
        assert flag.removeprefix("--") in said


def test_numbers__are_found_by_their_types() -> None:
    found = {verb: {flag for flag, *_ in numbers(verb)} for verb in NEEDED}
    assert {verb.name for verb in VERBS} == set(NEEDED)
    assert {"--crop.ratio", "--seed", "--optim.blr", "--teacher.layers", "--workers"} <= found["pretrain"]
    assert sum(map(len, found.values())) > 120


# -- files -------------------------------------------------------------------------------------------------------------

BAD_FILES = {  # content of --config: what the error line has to say
    "batch_size: [1, 2]": "batch_size",
    "batch_size: {a: 1}": "batch_size",
    "batch_size: 1.5": "batch_size",
    "batch_size: 'many'": "batch_size",
    "batch_size: true": "batch_size",
    "batch_size: .nan": "batch_size",
    "epochs: .nan": "epochs nan",
    "epochs: .inf": "epochs inf",
    "epochs: 2020-01-01": "epochs",
    "seed: -3": "seed -3",
    "resume: 3": "resume",
    "resume: maybe": "resume",
    "data: {a: b}": "data",
    "data: [a, b]": "data",
    "data: [[a]]": "data",
    "out: [a]": "out",
    "crop: {scale: 0.5}": "crop.scale",
    "crop: {scale: [0.5, 0.6, 0.7]}": "crop.scale",
    "crop: {scale: {low: 0.5}}": "crop.scale",
    "crop: {ratio: [1, .inf]}": "crop.ratio (1.0, inf)",
    "crop: {scale: [x, y]}": "crop.scale",
    "model: 3": "model is a section",
    "model: [1, 2]": "model is a section",
    "model: {size: 7}": "model.size",
    "model: {siz: tiny}": "Did you mean --model.size?",
    "modle: {size: tiny}": "Did you mean --model.size?",
    "size: tiny": "Did you mean --model.size?",
    "optimizer: {lr: 3}": "optimizer.lr",
    "masking: {num_views: 100000}": "masking.num_views 100000",
    "monitor: {saves: 2000000000}": "monitor.saves 2000000000",
    "unknown: {a: {b: {c: 1}}}": "unknown.a",
    "pretrain: {epochs: 3}": 'Unknown option: "pretrain.epochs"',
    "optim: {blr: 1}\noptim: {name: lamb}": "optim is given twice",
    "report: 1": 'Unknown option: "report"',
    "1: 2": "1 is no name",
    "null: 2": "None is no name",
    "true: 2": "True is no name",
    "model: {1: 2}": "model.1 is no name",
    "[1, 2]: 3": "not YAML",
    "a: &a {b: *a}": "a.b",
    "model: &a {size: *a}": "model.size",
    "data: &a [*a]": "data",
    "data: !!python/object/apply:os.system [touch ran]": "not YAML",
    "data: !!binary aGVsbG8=": "data",
    'data: "a\\0b"': "data",
    "--- 1\n--- 2": "not YAML",
    "text": "str",
    "5": "int",
    "'": "not YAML",
    "a: b: c": "not YAML",
    "\tdata: x": "not YAML",
    "- data: x": "list",
    "[" * 5000: "not YAML",
    "{a: " * 5000: "not YAML",
    "\x00\x01\x02": "not YAML",
    "\udcff\udcfe\udc80": "not YAML",
    "allow_change: [optim.bl]": "did you mean optim.blr?",
    "preset: [quick]": "preset",
    "preset: {a: 1}": "preset",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_config__what_is_wrong_in_a_file_is_one_line(
    content: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "mine.yaml").write_text(content, errors="surrogateescape")
    data = [] if content.startswith("data") else ["--data", "d"]
    assert BAD_FILES[content] in error_of(["pretrain", *data, "--config", "mine.yaml"], capsys)
    assert not outside(empty)


def test_config__that_is_no_file_is_named(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(empty / "pipe.yaml")
    (empty / "folder.yaml").mkdir()
    (empty / "looped.yaml").symlink_to("looped.yaml")
    for name in ("missing.yaml", "folder.yaml", "pipe.yaml", "looped.yaml", "/dev/zero"):
        assert name in error_of(["pretrain", "--data", "d", "--config", name], capsys)


@pytest.mark.parametrize("verb", ["linear", "finetune", "segment", "detect"])
def test_config__of_every_verb_that_trains_is_checked(
    verb: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, said in {"batchsize: 3": "--batch_size", "epochs: .nan": "epochs nan", "- a": "list"}.items():
        (empty / "mine.yaml").write_text(content)
        assert said in error_of([verb, *NEEDED[verb].split(), "--config", "mine.yaml"], capsys)
    assert not outside(empty)


def test_config__of_a_run_to_resume_is_checked_as_well(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "run").mkdir()
    (empty / "run" / "config.yaml").write_text("masking: {num_views: 100000}")
    assert "masking.num_views 100000" in error_of(["pretrain", "--data", "d", "--out", "run", "--resume"], capsys)


# -- afterwards --------------------------------------------------------------------------------------------------------

TINY = """
    --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2
    --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --steps 1 --workers 0 --device cpu
    --monitor.evals 0 --monitor.max_images 4
""".split()  # noqa: SIM905 (as it is typed)


@pytest.mark.parametrize(
    "bad",
    [
        ["--optim.name", "sdg"],
        ["--masking.mask_ratio", "0.999"],
        ["--device", "cuda:99"],
        ["--data_statistics", "nowhere.json"],
        ["--optim.accumulation", "3"],
        ["--model.in_chans", "5", "--data_statistics", "imagenet"],
        ["--teacher.cache", "kept", "--crop.variants", "2"],
    ],
)
def test_out__after_a_refusal_the_corrected_command_starts(
    bad: list[str], colours: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ["pretrain", *TINY, "--data", str(colours), "--out", "run"]
    assert main([*right, *bad]) in (2, 3)
    assert not outside(empty)
    assert main(right) == 0, capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--augment.auto_augment", "nonsense"], ["--batch_size", "3"], ["--shots", "0"]])
def test_out__after_a_refusal_of_finetune_the_corrected_command_starts(
    bad: list[str], colours: Path, backbones: dict[str, Path], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [
        "finetune",
        "--backbone",
        str(backbones["vit"]),
        "--data",
        str(colours),
        "--out",
        "run",
        "--batch_size",
        "4",
    ]
    right += ["--augment.mixup", "0.8", "--steps", "1", "--workers", "0", "--device", "cpu"]
    assert "error: " in error_of([*right, *bad], capsys)
    assert not outside(empty)
    assert main(right) == 0, capsys.readouterr().err


# -- from a shell ------------------------------------------------------------------------------------------------------

SHELL = (
    "pretrain --data d --monitor.saves 2000000000",
    "pretrain --data d --seed 1180591620717411303424",
    "finetune --data d --backbone b --augment.auto_augment nonsense",
    "pretrain --size tiny",
)


@pytest.mark.parametrize("line", SHELL)
def test_shell__a_bad_configuration_is_one_line_and_exit_code_2(line: str, empty: Path) -> None:
    command = [sys.executable, "-m", "dmjd", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert not outside(empty)


# -- and what is right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "rand", "rand-m9-mstd0.5-inc1", "rand-m9-n3-p0.7-mmax10-tweights"])
def test_auto_augment__policies_that_are_taken_are_those_that_timm_reads(policy: str) -> None:
    from timm.data.auto_augment import rand_augment_transform

    from dmjd.config.downstream import AugmentSettings

    assert AugmentSettings(auto_augment=policy).auto_augment == policy
    if policy != "none":
        assert rand_augment_transform(policy, {}).ops


def test_presets__are_within_all_bounds() -> None:
    for path in sorted(PRESETS.rglob("*.yaml")):
        verb = path.parent.name if path.parent != PRESETS else "pretrain"
        words = [verb, *NEEDED[verb].split(), "--preset", path.stem]
        _, bound, _ = application(layers_of(words)).parse_args(words, exit_on_error=False, print_error=False)
        assert bound.arguments["settings"].run.preset == path.stem
