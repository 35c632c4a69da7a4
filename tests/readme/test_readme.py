"""What the README tells a newcomer to type works as it stands there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmjd.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# The runs there take minutes to weeks; these flags change how much is trained, not what is done.
SHORT = shlex.split(
    "--steps 2 --batch_size 4 --workers 0 --device cpu --monitor.evals 0 --model.image_size 64 --model.patch_size 8 "
    "--model.embed_dim 32 --model.depth 1 --model.num_heads 2 "
    "--decoder.embed_dim 16 --decoder.num_heads 2 --decoder.depth 1"
)
FINE = shlex.split("--steps 2 --batch_size 4 --workers 0 --device cpu")
FLAGS = {"pretrain": SHORT, "finetune": FINE, "segment": FINE, "detect": FINE}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("dmjd ")]


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
    return folder


def test_readme__every_command_does_what_it_says(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert len(commands()) >= 5
    for command in commands():
        words = shlex.split(command)[1:]
        assert main([*words, *FLAGS.get(words[0], [])]) == 0, command + capsys.readouterr().err
    for name in ("backbone.safetensors", "report.html", "metrics.jsonl", "config.yaml", "summary.json"):
        assert (workplace / "runs" / "photos" / name).stat().st_size > 0
    assert np.load(workplace / "features.npy").shape == (24, 32)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_readme__every_preset_is_in_the_table():
    table = README.split("## Presets")[1].split("###")[0]
    names = {path.stem for path in (ROOT / "src" / "dmjd" / "presets").glob("*.yaml")}
    assert names == set(re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE))


def test_documents__every_link_leads_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
