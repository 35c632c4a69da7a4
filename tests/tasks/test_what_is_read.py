"""What a verb reads no verb writes over, and it says so before it loads anything."""

from pathlib import Path

import pytest

from dmjd.cli import main

# Verb and flag of the images, the images, and an --out that would be written over them, or among them.
COMMANDS = [
    ("embed --data", "images.npy", "images.npy"),
    ("embed --data", "images.npy", "images"),
    ("embed --data", "study.csv", "study.npy"),
    ("embed --data", "study.parquet", "study.parquet"),
    ("embed --data", "set/images/val", "set/images/val/features.npy"),
    ("predict --data", "study.csv", "study.csv"),
    ("predict --data", "images.npy", "images.csv"),
    ("predict --data", "set/images/val", "set/images/val"),
    ("segment --predict", "set/images/val", "set"),
    ("segment --predict", "set/images", "set/images"),
    ("detect --predict", "set/overlays", "set"),
    ("search --query", "neighbours.csv", "."),
    ("search --query images.npy --features", "neighbours.npy", "."),
]
OTHERS = [
    ("embed --data", "study.csv", "study.parquet"),
    ("embed --data", "set/images/val", "features.npy"),
    ("predict --data", "study.csv", "."),
    ("predict --data", "set/images", "set"),
    ("segment --predict", "set/images", "seen"),
    ("search --query", "study.csv", "."),
]


@pytest.fixture
def content(tmp_path, monkeypatch):
    """Files that are read, by their names in the working directory."""
    monkeypatch.chdir(tmp_path)
    names = ("images.npy", "images.csv", "study.csv", "study.parquet", "neighbours.csv", "neighbours.npy")
    for name in (*names, "set/classes.txt", "set/images/val/a.png", "set/overlays/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def read():
        return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    return read


def lines(command, data, out, capsys):
    needed = " --features features.npy" if command == "search --query" else ""
    code = main([*f"{command} {data} --out {out} --backbone nowhere{needed}".split()])
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("command", "data", "out"), COMMANDS)
def test_verbs__refuse_an_out_that_is_what_they_read(command, data, out, content, capsys):
    before = content()
    code, (line,) = lines(command, data, out, capsys)
    assert code == 2
    assert line.startswith("error: this is the input, or its folder; ")
    assert content() == before


@pytest.mark.parametrize("verb", ["segment", "detect"])
def test_dense_verbs__predict_into_no_set(verb, content, capsys):
    (Path("set") / "annotations").mkdir()
    before = content()
    code, (line,) = lines(f"{verb} --predict", "study.csv", "set", capsys)
    assert code == 2
    assert line.startswith("error: a set of images with annotations; set; ")
    assert content() == before


@pytest.mark.parametrize(("command", "data", "out"), OTHERS)
def test_verbs__write_beside_what_they_read(command, data, out, content, capsys):
    assert "this is the input" not in "".join(lines(command, data, out, capsys)[1])
