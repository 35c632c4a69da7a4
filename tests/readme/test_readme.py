"""What the README, docs/recipes.md and the guides tell a newcomer to type works as it stands there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import dmjd
from dmjd.cli import VERBS, main
from dmjd.config.rules import PRESETS
from dmjd.data.source import register_source
from dmjd.targets import register_target

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
GUIDES = {path.name: path.read_text() for path in sorted((ROOT / "docs" / "guides").glob("*.md"))}
# In this order: guides use what the README and the recipes have made, and have many of their commands.
DOCUMENTS = (README, RECIPES, (ROOT / "docs" / "index.md").read_text(), *GUIDES.values())
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
# The runs there take minutes to weeks; these flags change how much is trained, not what is done.
FINE = shlex.split("--steps 2 --batch_size 4 --workers 0 --device cpu")
SMALL = shlex.split("--monitor.evals 0 --decoder.embed_dim 16 --decoder.num_heads 2 --decoder.depth 1")
SHAPE = shlex.split(
    "--model.image_size 64 --model.patch_size 8 --model.embed_dim 32 --model.depth 1 --model.num_heads 2"
)

SHORT = {flag.removeprefix("--"): value for flag, value in zip(*[iter([*FINE, *SMALL, *SHAPE])] * 2, strict=True)}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text):
    lines = [line.partition("#")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def shortened(words):
    """The command with flags that make it short; a network of timm has a shape of its own."""
    if words[0] == "pretrain" and not needs_network(words) and "--print_config" not in words:
        return [*words, *FINE, *SMALL, *([] if any(word.startswith("timm:") for word in words) else SHAPE)]
    if words[0] == "plan":
        return [*words, *SMALL, *SHAPE]
    if needs_network(words):
        return [*words, "--print_config"]
    return [*words, *(FINE if words[0] in ("finetune", "segment", "detect") else [])]


def needs_network(words):
    """Weights of timm are downloaded; such commands are only parsed."""
    return any(flag in ("--init", "--backbone") and value.startswith("timm:") for flag, value in pairwise(words))


def rows(text, heading):
    """The first cells of the table below a heading, those in backquotes."""
    table = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for number in range(24):
        path = folder / "photos" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    for part in ("train", "val"):
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
            for place, array in (("images", pixels), ("annotations", pixels[..., 0] // 128)):
                path = folder / "streets" / place / part / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
        shutil.copytree(folder / "streets" / "images" / part, folder / "cells" / part)
        content = {
            "images": [{"id": number, "file_name": f"{number}.png", "height": 64, "width": 80} for number in range(4)],
            "categories": [{"id": 1, "name": "cell"}],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [8, 8, 32, 32]}],
        }
        (folder / "cells" / "annotations").mkdir(exist_ok=True)
        (folder / "cells" / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    (folder / "plates").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 4096, (5, 64, 64), dtype=np.uint16)
        np.save(folder / "plates" / f"{number}.npy", pixels)
    return folder


@pytest.mark.long
def test_readme__every_command_does_what_it_says(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    lines = dict.fromkeys(line for document in DOCUMENTS for line in commands(document) if line.startswith("dmjd "))
    typed = [shlex.split(line)[1:] for line in lines]
    assert {words[0] for words in typed} == {verb.name for verb in VERBS} | {"report"}
    for words in typed:
        assert main(shortened(words)) == 0, " ".join(words) + capsys.readouterr().err
    for name in ("backbone.safetensors", "report.html", "metrics.jsonl", "config.yaml", "summary.json"):
        assert (workplace / "runs" / "photos" / name).stat().st_size > 0
    assert np.load(workplace / "features.npy").shape == (24, 32)
    for name, document in {"README.md": README, **GUIDES}.items():
        for block in blocks(document, "python"):
            exec(
                compile(block.replace("minutes=10", "minutes=10, **SHORT"), name, "exec"),
                {"dmjd": dmjd, "SHORT": SHORT},
            )


@pytest.mark.slow
def test_readme__torchrun_trains_on_several_processes(workplace):
    (line,) = {line for document in DOCUMENTS for line in commands(document) if line.startswith("torchrun ")}
    launch, _, command = line.partition(" -m dmjd ")
    assert re.fullmatch(r"torchrun --nproc-per-node \d+", launch)
    torchrun = shlex.split("-m torch.distributed.run --nproc-per-node 2 --standalone -m dmjd")
    done = subprocess.run(
        [sys.executable, *torchrun, *shortened(shlex.split(command))],
        capture_output=True,
        text=True,
        cwd=workplace,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("look at runs/dmjd-8/report.html") == 1


def test_guides__fit_a_screen_and_are_in_the_site_and_its_first_page():
    assert all(len(guide.splitlines()) <= 45 for guide in GUIDES.values())
    listed = next(part["Guides"] for part in SITE["nav"] if "Guides" in part)
    assert sorted(listed) == [f"guides/{name}" for name in GUIDES]
    linked = re.findall(r"\]\(guides/([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert sorted(linked) == list(GUIDES)


def test_readme__every_command_is_run_by_a_test_or_is_a_target_of_make():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in (line for document in DOCUMENTS for line in commands(document)):
        program, *words = line.split()
        known = program in ("dmjd", "torchrun") or (program == "make" and words[0] in targets)
        assert known or line == "pip install dmjd", line


def test_site__describes_modules_that_exist():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE)
    places = [ROOT / "src" / name.replace(".", "/") for name in names]
    assert names
    assert [place for place in places if not (place.is_dir() or place.with_suffix(".py").is_file())] == []


def test_site__has_the_pages_of_its_navigation():
    parts = [part if isinstance(part, dict) else {"": [part]} for part in SITE["nav"]]
    pages = [page for part in parts for listed in part.values() for page in listed]
    assert [page for page in pages if not (ROOT / "docs" / page).is_file()] == []


def test_recipes__every_preset_is_in_the_table():
    assert rows(RECIPES, "Presets") == {path.stem for path in PRESETS.glob("*.yaml")}


def test_recipes__every_target_and_every_source_is_in_a_table():
    targets = {name.partition(":")[0] for name in rows(RECIPES, "Targets")} - {"hog+ema", "FILE.safetensors"}
    assert targets | {"file"} == set(register_target.names())
    kinds = {"FILE.csv": "list", "FILE.txt": "list", "FILE.zip": "archive", "FILE.npy": "array", "FILE.parquet": "hf"}
    named = (name.partition(":")[0] for name in rows(RECIPES, "Data"))
    sources = {"shards" if "*" in name or "{" in name else kinds.get(name, name) for name in named}
    assert sources | {"folder", "prepared"} == set(register_source.names())


def test_documents__every_link_leads_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
