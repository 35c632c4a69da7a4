"""What every run does beside its training: it says what it is, and leaves files that others may read."""

import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dmjd.cli import main
from dmjd.engine import progress
from dmjd.engine.checkpoint import MANIFEST, sha256

TINY = """preset: quick
batch_size: 8
workers: 0
device: cpu
model: {image_size: 32, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}
decoder: {embed_dim: 16, depth: 1, num_heads: 2}
monitor: {log_every: 1, evals: 0, saves: 1, max_images: 8}
"""
FINETUNE = ["finetune", "--batch_size", "8", "--steps", "2", "--workers", "0"]


def pretrain(data: Path, out: Path, *flags: str) -> int:
    file = out.with_suffix(".yaml")
    file.write_text(TINY)
    return main(["pretrain", "--data", str(data), "--out", str(out), "--config", str(file), *flags])


# -- what is said on the way -------------------------------------------------------------------------------------------


def test_pretrain__off_a_terminal_it_says_what_the_run_is(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(colours, tmp_path / "run", "--steps", "3") == 0
    *header, saved = capsys.readouterr().err.splitlines()
    assert header[:3] == [
        "training: cpu, fp32, 1 process",
        f"training: 24 images of {colours}/train, 12 held out",
        "training: steps 1 to 3, 8 images each: 1 epochs",
    ]
    assert header[3].endswith("parameters are trained")
    assert len(header) == 4  # and no line before a minute is over
    assert saved.startswith("step 3/3: loss ")
    assert saved.endswith(", saved")


def test_pretrain__off_a_terminal_it_has_a_line_whenever_one_is_due(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert pretrain(colours, tmp_path / "run", "--steps", "3", "--checkpoint_minutes", "60") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "step 3/3"]
    for name in ("loss ", "lr ", "images/s ", "waiting ", " left"):
        assert all(name in line for line in lines)


@pytest.mark.parametrize(("rate", "said"), [(1062.4, "1062"), (12.3, "12"), (2.34, "2.3"), (0.0456, "0.046")])
def test_progress__of_a_slow_run_is_no_zero(rate: float, said: str) -> None:
    assert progress.two_digits(rate) == said


class Terminal(list[str]):
    """What a run writes to a terminal."""

    def write(self, text: str) -> int:
        self.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_progress__on_a_terminal_is_a_bar_without_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    shown = progress.Progress(10, silent=False)
    with shown.shown(4):
        shown.measure({"loss": "1.5"})
        shown.move(6)
        shown.tell("saved")
    said = "".join(terminal)
    assert "training:" in said
    assert "6/10" in said
    assert "loss=1.5" in said
    assert "\n" not in said.rstrip()


def test_pretrain__a_step_larger_than_the_set_is_said(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(colours, tmp_path / "run", "--steps", "1", "--batch_size", "25") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: a step has 25 images, the set only 24; {colours}/train; choose a smaller --batch_size"
    ]


def test_pretrain__files_that_are_no_images_are_said_and_counted(
    paint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "data", {"": 10})
    for name in ("a.HEIC", "b.heic", "notes.txt"):
        (data / name).write_bytes(b"")
    assert pretrain(data, tmp_path / "run", "--steps", "1") == 0
    assert capsys.readouterr().err.splitlines()[0] == f"10 images; ignored: 2 .heic, 1 .txt; {data}"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ignored"] == 3
    assert "Ignored files</dt><dd>3<" in (tmp_path / "run" / "report.html").read_text()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_pretrain__leaves_files_as_readable_as_the_umask_says(colours: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert pretrain(colours, tmp_path / "run", "--steps", "1") == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "backbone.safetensors", "report.html", "config.yaml"}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(0o666 & ~umask)}


def test_report__does_not_replace_the_page_of_another_verb(
    backbones, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    start = ["--backbone", str(backbones["vit"]), "--device", "cpu"]
    assert main([*FINETUNE, *start, "--data", str(colours), "--out", str(out)]) == 0
    page = (out / "report.html").read_bytes()
    capsys.readouterr()
    assert main(["report", str(out)]) == 2
    assert "its page report.html stands as the verb wrote it" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == page
    for name in ("report.html", "result.json"):  # as in a run that is not at its end
        (out / name).unlink()
    assert main(["report", str(out)]) == 2
    assert "is written by the verb at its end" in capsys.readouterr().err
    assert not (out / "report.html").exists()


# -- runs of earlier versions ------------------------------------------------------------------------------------------

NEW = ("optim.clip_grad", "monitor.max_share", "data_on_device", "visible.weight")  # say, since the run


@pytest.fixture
def earlier(colours: Path, tmp_path: Path) -> Path:
    """A run that an earlier version has left, which had not all settings."""
    out = tmp_path / "run"
    assert pretrain(colours, out, "--steps", "2") == 0
    checkpoint = out / "checkpoints" / "step-00000002"
    state, config = (
        json.loads((checkpoint / "state.json").read_text()),
        yaml.safe_load((out / "config.yaml").read_text()),
    )
    for settings in (state["settings"], config):
        for name in NEW:
            section, _, key = name.rpartition(".")
            del (settings[section] if section else settings)[key]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    digests = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(digests | {"state.json": sha256(checkpoint / "state.json")}))
    return out


def test_resume__settings_that_are_new_since_count_as_having_had_their_defaults(
    earlier: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "--data", str(colours), "--out", str(earlier), "--resume", "--steps", "3"]) == 0
    assert "changed: steps 2 -> 3" in capsys.readouterr().err.splitlines()
    assert json.loads((earlier / "summary.json").read_text())["steps"] == 3


def test_resume__a_new_setting_that_is_not_its_default_is_refused(
    earlier: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--data", str(colours), "--out", str(earlier), "--resume"]
    assert main([*words, "--optim.clip_grad", "1"]) == 4
    assert "other settings: optim.clip_grad 0.0 -> 1.0" in capsys.readouterr().err


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parted(paint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"train": 4, "val": 1, "test": 2}
    return paint(
        tmp_path_factory.mktemp("parted") / "set",
        {f"{part}/{name}": count for part, count in counts.items() for name in ("red", "green", "blue")},
    )


@pytest.mark.parametrize("verb", [["knn"], ["linear"], FINETUNE])
def test_part__says_which_images_a_backbone_is_judged_by(
    verb: list[str], backbones, parted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*verb, "--backbone", str(backbones["vit"]), "--data", str(parted), "--device", "cpu"]
    for flags, part, images in (([], "val", 3), (["--part", "test"], "test", 6)):
        assert main([*words, "--out", str(tmp_path / part), *flags]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (said["part"], said["images"]) == (part, images)
    assert "(test)" in (tmp_path / "test" / "report.html").read_text()


def test_part__that_there_is_not_is_one_line(backbones, parted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["knn", "--backbone", str(backbones["vit"]), "--device", "cpu", "--part", "dev", "--data"]
    assert main([*words, str(parted)]) == 3
    assert capsys.readouterr().err == f"error: no such part; --part dev; {parted} has val, test\n"
    assert main([*words, str(parted / "train")]) == 3
    assert "has no held-out part" in capsys.readouterr().err


def test_part__of_a_set_without_parts_is_what_the_seed_holds_out(
    backbones, parted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["knn", "--backbone", str(backbones["vit"]), "--device", "cpu", "--data", str(parted / "train")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["part"] == "held out by seed"


# -- broken files ------------------------------------------------------------------------------------------------------


def test_pretrain__a_folder_of_broken_tiffs_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff writes to the file of stderr itself."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        path = folder / f"{number}.tif"
        Image.effect_noise((50, 40), 90.0).save(path, compression="tiff_adobe_deflate")
        content = bytearray(path.read_bytes())
        content[40:60] = bytes(20)
        path.write_bytes(content)
    assert pretrain(folder, tmp_path / "run", "--steps", "1") == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("training: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: none of 1 images decodes")
