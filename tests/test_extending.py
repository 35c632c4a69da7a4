"""What docs/extending.md shows works from outside the package, as it stands there."""

import importlib
import io
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import dmjd
import dmjd.tasks
from dmjd import cli
from dmjd.backbones import register_encoder
from dmjd.data.source import register_source
from dmjd.errors import ConfigError
from dmjd.targets import register_target

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+)(?:\.py)?\n(.*?)```", PAGE, flags=re.DOTALL))
REGISTRIES = {"dmjd.targets": register_target, "dmjd.backbones": register_encoder, "dmjd.data": register_source}
TINY = shlex.split(
    "--steps 2 --batch_size 4 --workers 0 --device cpu --monitor.evals 0 --model.image_size 32 --model.patch_size 8 "
    "--model.embed_dim 16 --model.depth 1 --model.num_heads 2 "
    "--decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2"
)

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 36, 40, 3), dtype=np.uint8)
IMAGES[7] = IMAGES[3]


def store(path: Path) -> None:
    """Write the images into a database."""
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE images (name TEXT PRIMARY KEY, content BLOB)")
        for number, pixels in enumerate(IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            database.execute("INSERT INTO images VALUES (?, ?)", (f"{number:08d}", buffer.getvalue()))
    database.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's modules in a folder of the path, and images; afterwards nothing of it is left in this process."""
    for name, code in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(code)
    store(tmp_path / "images.sqlite")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in REGISTRIES.values():
        registry.names()  # what the package has is loaded, and put back afterwards
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(name, None)
        sys.modules.pop(f"dmjd.tasks.{name}", None)


def pretrain(*arguments: str) -> Path:
    """Pre-train in this process; the directory of the run."""
    assert cli.main(["pretrain", "--preset", "quick", *arguments, *TINY, "--out", "run"]) == 0
    return Path("run")


def some_photos() -> str:
    """A folder of twelve images."""
    Path("photos").mkdir()
    for number, pixels in enumerate(IMAGES[:12]):
        Image.fromarray(pixels).save(f"photos/{number:02d}.png")
    return "photos"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_extending__every_example_is_short() -> None:
    assert set(BLOCKS) == {
        "mean_color",
        "mean_vit",
        "sqlite",
        "duplicates_settings",
        "duplicates",
        "row",
        "imported",
        "own_masks",
    }
    for name, code in BLOCKS.items():
        both = code + BLOCKS["duplicates_settings"] if name == "duplicates" else code
        lines = [line for line in both.splitlines() if line.strip()]
        assert len(lines) < 30, f"{name}: {len(lines)} lines"


def test_extending__a_target_is_one_file(folder: Path) -> None:
    importlib.import_module("mean_color")
    run = pretrain("--data", some_photos(), "--masked.target", "mean_color")
    assert len(losses(run)) >= 1
    assert "Every token is drawn in one color." in (run / "report.html").read_text()


def test_extending__an_imported_target_is_known_until_the_process_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_photos()
    before = dict(register_target._entries)
    settings = dict(zip(*[(word.removeprefix("--") for word in TINY)] * 2, strict=True))
    names = {"settings": {"preset": "quick", **settings}}
    exec(compile(BLOCKS["imported"].replace("minutes=10", "**settings"), "imported.py", "exec"), names)
    assert names["run"].numbers["steps"] == 2
    pretrained = "runs/colors/pretrained.safetensors"
    assert dmjd.load_pretrained(pretrained).target.caption == "Every token is drawn in one color."
    monkeypatch.setattr(register_target, "_entries", before)  # as in a new process
    with pytest.raises(ConfigError, match=r"no target of this name; mean_color; .*import its module first, or install"):
        dmjd.load_pretrained(pretrained)


def test_extending__masks_of_ones_own_train_a_model() -> None:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS["own_masks"], "own_masks.py", "exec"), names)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8))
    first, *_, last = (names["step"](images) for _ in range(5))
    assert last.total < first.total
    assert first.visible > 0


def test_extending__a_backbone_is_one_file(folder: Path) -> None:
    importlib.import_module("mean_vit")
    run = pretrain("--data", some_photos(), "--model.backbone", "mean_vit")
    with safe_open(run / "backbone.safetensors", "pt") as file:
        assert file.metadata()["architecture"] == "mean_vit"
    embed = shlex.split("embed --backbone run/backbone.safetensors --out features.npy --device cpu --workers 0 --data")
    assert cli.main([*embed, "photos"]) == 0
    assert np.load("features.npy").shape == (12, 16)


def test_extending__a_data_source_is_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("sqlite")
    run = pretrain("--data", "images.sqlite")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_images"], summary["data"], summary["labels"]) == (23, "images.sqlite", False)
    Path("other.sqlite").touch()
    capsys.readouterr()
    assert cli.main(["pretrain", "--preset", "quick", "--data", "other.sqlite", *TINY, "--out", "other"]) == 3
    assert "no table of images (no such table: images); other.sqlite" in capsys.readouterr().err


def test_extending__a_verb_is_one_file_and_one_row(
    folder: Path, backbones: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("sqlite")
    settings = importlib.import_module("duplicates_settings")
    row = eval(BLOCKS["row"], {"Verb": cli.Verb, "DuplicatesSettings": settings.DuplicatesSettings})
    monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, row))
    # Stands for putting the file into src/dmjd/tasks.
    monkeypatch.setattr(dmjd.tasks, "__path__", [*dmjd.tasks.__path__, str(folder)])
    words = ["duplicates", "--data", "images.sqlite", "--backbone", str(backbones["vit"]), "--device", "cpu"]
    assert cli.main([*words, "--above", "0.9999"]) == 0
    assert capsys.readouterr().out.split() == ["00000003", "00000007"]
    assert cli.main(["duplicates", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--above" in text
    assert "count as the same" in " ".join(text.replace("│", " ").split())
    assert cli.main(["duplicates", "--abov", "0.5"]) == 2


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules as another distribution has them, installed, and the run of the page's last command."""
    root = tmp_path_factory.mktemp("elsewhere")
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    groups = tomllib.loads(toml)["project"]["entry-points"]
    assert set(groups) == {*REGISTRIES, "dmjd.verbs"}
    for name in ("mean_color", "mean_vit", "sqlite"):
        (root / f"{name}.py").write_text(BLOCKS[name])
    (root / "mine").mkdir()
    (root / "mine" / "__init__.py").write_text("")
    (root / "mine" / "duplicates.py").write_text(BLOCKS["duplicates"])
    row = BLOCKS["row"].strip().removesuffix(")") + ', package="mine")'
    (root / "mine" / "rows.py").write_text(
        f"{BLOCKS['duplicates_settings']}\nfrom dmjd.cli import Verb\n\nDUPLICATES = {row}\n"
    )
    info = root / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    lines = [line for group, rows in groups.items() for line in (f"[{group}]", *map(" = ".join, rows.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    store(root / "images.sqlite")
    (command,) = re.findall(r"```sh\ndmjd (.*?)\n```", PAGE, flags=re.DOTALL)
    done = in_a_new_process(root, *shlex.split(command), *TINY)
    assert done.returncode == 0, done.stderr
    return root


def in_a_new_process(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dmjd", *words], capture_output=True, text=True, env=environment, cwd=root
    )


@pytest.mark.long
def test_extending__another_distribution_offers_them_by_entry_points(elsewhere: Path) -> None:
    settings = yaml.safe_load((elsewhere / "runs" / "mine" / "config.yaml").read_text())
    assert (settings["model"]["backbone"], settings["masked"]["target"]) == ("mean_vit", "mean_color")
    assert losses(elsewhere / "runs" / "mine")


@pytest.mark.long
def test_extending__a_backbone_of_another_distribution_is_opened_by_other_verbs(elsewhere: Path) -> None:
    words = "embed --backbone runs/mine/backbone.safetensors --data images.sqlite --out features.npy --device cpu"
    done = in_a_new_process(elsewhere, *words.split())
    assert done.returncode == 0, done.stderr
    assert np.load(elsewhere / "features.npy").shape == (24, 16)


@pytest.mark.long
def test_extending__a_verb_of_another_distribution_runs_and_has_help(
    elsewhere: Path, backbones: dict[str, Path]
) -> None:
    words = ["duplicates", "--data", "images.sqlite", "--backbone", str(backbones["vit"]), "--device", "cpu"]
    done = in_a_new_process(elsewhere, *words, "--above", "0.9999")
    assert done.stdout.split() == ["00000003", "00000007"], done.stderr
    assert "duplicates" in in_a_new_process(elsewhere, "--help").stdout
