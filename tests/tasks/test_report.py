"""The page of a run is drawn again without its network, and runs are put side by side."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dmjd
from dmjd.cli import main
from dmjd.errors import CheckpointError

WORDS = {
    "preset": "quick",
    "steps": 2,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
    "monitor.log_every": 1,
    "monitor.max_images": 8,
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.embed_dim": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "decoder.embed_dim": 16,
    "decoder.num_heads": 2,
    "decoder.depth": 1,
    "optim.warmup_epochs": 0,
    "monitor.evals": 0,
}


def pretrain(data: Path, out: Path) -> Path:
    words = [word for key, value in WORDS.items() for word in (f"--{key}", str(value))]
    assert main(["pretrain", "--data", str(data), "--out", str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(colours, tmp_path_factory.mktemp("runs") / "first")


def test_report__draws_the_page_again_without_the_network(run: Path) -> None:
    page = run / "report.html"
    drawn = page.read_bytes()
    for name in ("backbone.safetensors", "pretrained.safetensors"):
        (run / name).rename(run / f"{name}.aside")
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert page.read_bytes() == drawn
    for name in ("backbone.safetensors", "pretrained.safetensors"):
        (run / f"{name}.aside").rename(run / name)


def test_report__a_folder_in_the_place_of_the_page_is_refused_and_a_new_one_is_made(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0


@pytest.mark.parametrize("verb", ["knn", "linear"])
def test_judging__leaves_the_directory_of_a_run_alone(run: Path, colours: Path, verb: str) -> None:
    before = {each.name: each.stat().st_mtime_ns for each in run.iterdir()}
    line = [verb, "--backbone", str(run / "backbone.safetensors"), "--data", str(colours), "--out", str(run)]
    assert main([*line, "--device", "cpu"]) == 2
    assert {each.name: each.stat().st_mtime_ns for each in run.iterdir()} == before


def test_resume__minutes_of_a_finished_run_cannot_change_and_it_says_what_can(run: Path, colours: Path) -> None:
    with pytest.raises(CheckpointError, match="minutes became epochs when the run began: give --epochs"):
        dmjd.pretrain(colours, run, preset="auto", minutes=3, resume=True)


def test_backbone__a_folder_in_its_place_is_told_which_file_is_meant(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a directory; .*; give a file in it, such as backbone\.safetensors"):
        dmjd.load_backbone(run)
    (tmp_path / "last.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"a directory; .*; give a file in it, such as last\.safetensors"):
        dmjd.load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"give the pretrained\.safetensors of such a run"):
        dmjd.load_pretrained(run / "backbone.safetensors")


def test_pretrain__keeps_errors_features_and_neighbours_for_the_report(run: Path) -> None:
    samples, near = (load_file(run / name) for name in ("samples.safetensors", "neighbours.safetensors"))
    count = len(samples["images"])
    assert samples["errors"].shape == (count, 2, 16)
    assert samples["errors"].isfinite().all()
    assert samples["patch_colours"].shape == (count, 3, 4, 4)
    with safe_open(run / "neighbours.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
    assert names["compared"] == 24
    assert near["by_features"].shape == (len(names["queries"]), 5, 3, 32, 32)
    for kind in ("features", "pixels"):
        assert (near[f"{kind}_similarity"].diff(dim=1) <= 0).all()
    # Noise in three colours: by pixels, a colour's nearest are of its own.
    for query, found in zip(names["queries"], names["by_pixels"], strict=True):
        assert {name.partition("/")[0] for name in found} == {query.partition("/")[0]}


def test_pretrain__says_what_it_was_computed_with(run: Path) -> None:
    environment = json.loads((run / "summary.json").read_text())["environment"]
    assert (environment["device"], environment["precision"], environment["processes"]) == ("cpu", "fp32", 1)
    assert environment["torch"] == torch.__version__.partition("+")[0]
    assert f"<dd>{environment['timm']}</dd>" in (run / "report.html").read_text()


def test_report__puts_runs_side_by_side(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "second"))
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "pages" / "both.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages" / "both.html")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(other)]) == 0
    assert (tmp_path / "comparison.html").read_bytes() == (tmp_path / "pages" / "both.html").read_bytes()
    assert '<th scope="row">seed</th><td>0</td><td>1</td>' in (tmp_path / "comparison.html").read_text()
    assert main(["report", str(run), "--out", "one.html"]) == 0
    assert (tmp_path / "one.html").read_bytes() == (run / "report.html").read_bytes()
    assert main(["report", str(run), str(tmp_path / "none")]) == 2


def test_pretrain__an_image_alone_has_nothing_like_it(paint: object, tmp_path: Path) -> None:
    data = paint(tmp_path / "data", {"only": 1})
    run = pretrain(data, tmp_path / "run")
    assert not (run / "neighbours.safetensors").exists()
    assert "Nearest neighbours" not in (run / "report.html").read_text()
