"""What every classification leaves behind, and the mistakes that all its verbs refuse."""

import csv
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dmjd.cli import main
from dmjd.config.downstream import KnnSettings, StartSettings
from dmjd.config.rules import to_yaml
from dmjd.data.source import open_source
from dmjd.evaluation.classification import ClassificationResult
from dmjd.reports.classification import write_classification

CLASSES = ("ant", "bee", "<i>cat</i> & co", "dog", "elk", "fox", "gnu")
VERBS = {
    "knn": ["knn"],
    "linear": ["linear"],
    "paper": ["linear", "--recipe", "paper", "--steps", "2", "--batch_size", "6", "--warmup_epochs", "0"],
    "finetune": ["finetune", "--steps", "2", "--batch_size", "6", "--optim.warmup_epochs", "0"],
}
KEYS = {
    "top1",
    "top1_low",
    "top1_high",
    "top5",
    "mean_class_accuracy",
    "images",
    "train_images",
    "part",
    "seconds",
}


# -- files -------------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def assert_self_contained(page: str) -> None:
    assert all(link.startswith(("data:", "#")) for link in Links(page).found)
    assert not re.search(r"@import|url\((?!#)|<script[^>]* src", page)


def by_hand() -> ClassificationResult:
    """Five images: ant, ant, ant taken for a bee, bee, and a cat taken for an ant."""
    return ClassificationResult(torch.eye(len(CLASSES))[[0, 0, 1, 1, 0]], torch.tensor([0, 0, 0, 1, 2]), CLASSES)


def write(result: ClassificationResult, out: Path) -> None:
    """Write what a verb writes."""
    settings = to_yaml(KnnSettings(start=StartSettings(backbone="b.safetensors"), out=out))
    summary = result.summary() | {"train_images": 9, "part": "val", "seconds": 1.0}
    write_classification(out, verb="knn", settings=settings, summary=summary, **result.tables)


def test_write_classification__has_a_row_for_every_class(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    write(by_hand(), out)
    found = json.loads((out / "result.json").read_text())
    assert set(found) == KEYS
    assert found["top1"] == 0.6
    with (out / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert [row["accuracy"] for row in rows] == ["0.6667", "1.0", "0.0", "", "", "", ""]
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_write_classification__the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    write(by_hand(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert_self_contained(page)
    assert "http:" not in page
    assert "https:" not in page
    assert escape("<i>cat</i> & co") in page
    assert "<i>cat" not in page
    table = page[page.index("hardest first") :]
    places = [table.index(f'<th scope="row">{escape(name)}') for name in (CLASSES[2], "ant", "bee", "dog")]
    assert places == sorted(places)
    assert "60.0%" in page
    assert "23.1% to 88.2%" in page


@pytest.mark.parametrize("name", [r"$\frac$", "a$b$c", "\u6f22\u5b57", "tab\tname", "not unicode \udcff", ""])
def test_write_classification__whatever_a_class_is_called_it_writes_the_page(tmp_path: Path, name: str) -> None:
    """Names of folders: no mathematics to matplotlib, no glyphs for some, not even Unicode."""
    write(ClassificationResult(torch.eye(2), torch.tensor([0, 1]), ("plain", name)), tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert len((tmp_path / "per_class.csv").read_bytes().splitlines()) == 3


def test_write_classification__a_hundred_classes_are_drawn_without_names(tmp_path: Path) -> None:
    write(
        ClassificationResult(torch.eye(100), torch.arange(100), [f"class {number}" for number in range(100)]), tmp_path
    )
    assert (tmp_path / "confusion.png").stat().st_size < 200_000


# -- what all verbs say and refuse -------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def judge(backbones, tmp_path):
    """Run a verb and return its exit code."""

    def judged(verb: str, data: Path, *flags: str, backbone: str = "vit") -> int:
        (name, *words), place = VERBS[verb], backbones.get(backbone, backbone)
        fixed = [f"--backbone={place}", f"--data={data}", f"--out={tmp_path / 'out'}", "--device=cpu"]
        workers = [] if verb == "knn" else ["--workers=0"]
        return main([name, *fixed, *words, *workers, *flags])

    return judged


@pytest.mark.parametrize("verb", VERBS)
def test_verbs__write_what_they_print(judge, verb: str, colours: Path, capsys, tmp_path: Path) -> None:
    assert judge(verb, colours) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(said) >= KEYS
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == said


def test_knn__without_a_directory_it_only_prints(backbones, colours: Path, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["knn", "--backbone", str(backbones["vit"]), "--data", str(colours), "--device", "cpu"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == KEYS | {"rankme"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_verbs__refuse_data_without_two_classes(judge, verb: str, colours: Path, capsys, paint, tmp_path: Path) -> None:
    for data in (colours / "train" / "red", paint(tmp_path / "one", {"red": 4})):
        assert judge(verb, data) == 3
        assert "no labels" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_verbs__refuse_held_out_classes_that_nothing_is_learned_about(
    judge, verb: str, capsys, paint, tmp_path: Path
) -> None:
    data = paint(tmp_path / "data", {"train/red": 3, "train/blue": 3, "val/red": 2, "val/green": 2})
    assert judge(verb, data) == 3
    assert "green" in one_line(capsys)


def test_verbs__refuse_a_split_that_leaves_a_class_no_training_image(judge, capsys, paint, tmp_path: Path) -> None:
    data = paint(tmp_path / "data", {"red": 10, "blue": 10, "green": 1})
    held_out = {seed: open_source(str(data), seed=seed).held_out for seed in range(60)}  # a twentieth: one of 21
    unlucky = next(seed for seed, part in held_out.items() if part.name(0) == "green/00.png")
    assert len(held_out[unlucky]) == 1
    assert judge("knn", data, "--seed", str(unlucky)) == 3
    assert "green" in one_line(capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs__a_class_without_held_out_images_is_no_mistake(judge, verb: str, capsys, paint, tmp_path: Path) -> None:
    data = paint(tmp_path / "data", {"train/red": 3, "train/blue": 3, "train/green": 3, "val/red": 2, "val/blue": 2})
    assert judge(verb, data) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(said) >= KEYS
    assert (said["images"], said["train_images"]) == (4, 9)
    with (tmp_path / "out" / "per_class.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert (rows["green"]["images"], rows["green"]["accuracy"]) == ("0", "")
    measured = [float(row["accuracy"]) for row in rows.values() if row["accuracy"]]
    assert said["mean_class_accuracy"] == pytest.approx(sum(measured) / 2, abs=1e-4)
    assert_self_contained((tmp_path / "out" / "report.html").read_text())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--fraction", "0"), "fraction"),
        (("--fraction", "1.5"), "fraction"),
        (("--fraction", "nan"), "fraction"),
        (("--shots", "0"), "shots"),
        (("--fraction", "0.5", "--shots", "2"), "choose one of them"),
        (("--preset", "bsae"), "did you mean base?"),
        (("--seed", "-1"), "seed"),
    ],
)
@pytest.mark.parametrize("verb", ["linear", "finetune"])
def test_verbs__refuse_settings_out_of_range(judge, verb: str, flags, reason, colours: Path, capsys, tmp_path) -> None:
    assert judge(verb, colours, *flags) == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["knn", "linear", "paper"])
def test_verbs__refuse_layers_that_there_are_not(judge, verb: str, colours: Path, capsys) -> None:
    assert judge(verb, colours, "--layers", "99") == 2
    assert "--layers" in one_line(capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs__refuse_names_that_timm_does_not_know(judge, verb: str, colours: Path, capsys) -> None:
    assert judge(verb, colours, backbone="timm:resnet1") == 4
    assert "timm:resnet1" in one_line(capsys)


def test_verbs__weights_that_cannot_be_fetched_are_one_line(
    judge, colours: Path, capsys, monkeypatch, tmp_path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the variable of this name sets it at the start
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert judge("knn", colours, backbone="timm:test_resnet") == 4
    assert "its weights cannot be fetched" in one_line(capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs__any_model_of_timm_serves_untrained(judge, verb: str, capsys, paint, tmp_path: Path) -> None:
    data = paint(tmp_path / "data", {"train/red": 2, "train/blue": 2, "val/red": 1, "val/blue": 1})
    assert judge(verb, data, "--untrained", backbone="timm:test_resnet") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2


@pytest.mark.parametrize("backbone", ["grey", "convvit"])
def test_verbs__bring_images_to_what_the_backbone_takes(judge, colours: Path, capsys, backbone: str) -> None:
    """Images are 40 x 36 and coloured; the backbones take 32 x 32, one of them grey."""
    for verb in ("knn", "linear", "paper"):
        assert judge(verb, colours, backbone=backbone) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 12
