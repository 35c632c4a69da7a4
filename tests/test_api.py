"""The verbs are functions of Python: what they return is what they have written and found."""

import json
import pydoc
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmjd
from dmjd.cli import VERBS
from dmjd.engine.trainer import Trainer
from dmjd.errors import CheckpointError, ConfigError, DataError

TRAINING = {"steps": 2, "batch_size": 4, "workers": 0, "device": "cpu"}
TINY = TRAINING | {
    "preset": "quick",
    "model": {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "masking__block": 1,
    "monitor__evals": 0,
    "monitor__log_every": 1,
}


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> dmjd.TrainingOutcome:
    return dmjd.pretrain(colours, tmp_path_factory.mktemp("runs") / "run", **TINY)


def test_pretrain__returns_files_and_numbers_of_the_run(run: dmjd.TrainingOutcome) -> None:
    assert run.numbers == json.loads((run.out / "summary.json").read_text())
    assert [line["step"] for line in run.metrics if "loss" in line] == [1, 2]
    assert "<html" in run.report.read_text()
    assert not (run.out / "tensorboard").exists(), "nothing else is written that nobody has asked for"


def test_build__what_is_no_preset_of_pretraining_is_refused() -> None:
    with pytest.raises(ValueError, match="no preset 'finetune/quick'; choose one of"):
        dmjd.build("finetune/quick")


def test_pretrain__loads_as_a_timm_model(run: dmjd.TrainingOutcome) -> None:
    model: Any = run.load()
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)
    same = dmjd.load_backbone(run.backbone).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())


def test_pretrain__a_run_that_is_done_says_its_numbers_again(run: dmjd.TrainingOutcome) -> None:
    again = dmjd.pretrain(run.numbers["data"], run.out, **TINY, resume=True)
    assert again == run


def test_pretrain__settings_in_a_section_and_with_underscores_are_the_same(
    run: dmjd.TrainingOutcome, colours: Path, tmp_path: Path
) -> None:
    model = {f"model__{name}": value for name, value in TINY["model"].items()}
    same = dmjd.pretrain(colours, tmp_path, **{name: value for name, value in TINY.items() if name != "model"}, **model)
    losses = [[line["loss"] for line in each.metrics if "loss" in line] for each in (run, same)]
    assert losses[0] == losses[1]


def test_numbers__are_those_of_the_line_that_the_command_line_prints(
    run: dmjd.TrainingOutcome, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called = {
        "knn": lambda: dmjd.knn(run.backbone, colours, k=3),
        "linear": lambda: dmjd.linear(run.backbone, colours, tmp_path / "linear"),
        "finetune": lambda: dmjd.finetune(run.backbone, colours, tmp_path / "tuned", **TRAINING),
        "embed": lambda: dmjd.embed(run.backbone, colours, tmp_path / "features.npy"),
        "doctor": lambda: dmjd.doctor(colours, tmp_path / "doctor"),
    }
    for call in called.values():
        assert call().numbers == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_embed_search_and_prepare__return_where_they_have_written(
    run: dmjd.TrainingOutcome, colours: Path, tmp_path: Path
) -> None:
    features = dmjd.embed(run.backbone, colours, tmp_path / "features.npy")
    assert features.out == tmp_path / "features.npy"
    assert np.load(features.out).shape == (36, 16)
    found = dmjd.search(features.out, tmp_path / "twins", duplicates=True)
    assert found.out == tmp_path / "twins"
    assert found.numbers["images"] == 36
    packed = dmjd.prepare(colours, tmp_path / "packed", size=32)
    assert packed.numbers["images"] == 36
    assert dmjd.knn(run.backbone, packed.out).numbers["images"] == 12
    assert dmjd.knn(run.backbone, colours).out is None


def test_finetune_predict_and_export__go_on_from_each_other(
    run: dmjd.TrainingOutcome, colours: Path, tmp_path: Path
) -> None:
    tuned = dmjd.finetune(run.backbone, colours, tmp_path / "tuned", **TRAINING)
    assert tuned.load().num_classes == 3
    predicted = dmjd.predict(tuned.backbone, colours, tmp_path / "classes.csv")
    assert predicted.out == tmp_path / "classes.csv"
    assert len(predicted.out.read_text().splitlines()) == 37
    exported = dmjd.export(tuned.out, tmp_path / "classifier", "timm")
    assert exported.out == tmp_path / "classifier.safetensors"
    assert exported.out.is_file()
    assert callable(dmjd.export), "the package of the formats is not in its place"


def test_linear__of_joined_layers_has_no_network_to_load(
    run: dmjd.TrainingOutcome, colours: Path, tmp_path: Path
) -> None:
    probe = dmjd.linear(run.backbone, colours, tmp_path / "linear", layers=[-1, -1])
    assert probe.metrics == []
    with pytest.raises(CheckpointError):
        probe.load()


def test_report__writes_the_page_anew(run: dmjd.TrainingOutcome, tmp_path: Path) -> None:
    page = dmjd.report(run.out, out=tmp_path / "page.html")
    assert page == tmp_path / "page.html"
    assert page.read_text() == run.report.read_text()


def test_mistakes__are_errors_and_no_exits(run: dmjd.TrainingOutcome, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean --model\.size"):
        dmjd.pretrain(colours, tmp_path / "run", modl__size="tiny")
    with pytest.raises(DataError):
        dmjd.pretrain(tmp_path / "nothing", tmp_path / "run", **TINY)
    with pytest.raises(ConfigError, match="there is a run already"):
        dmjd.pretrain(colours, run.out, **TINY)


def test_pretrain__ctrl_c_is_an_interrupt_that_says_how_to_go_on(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_around = Trainer.look_around

    def interrupted(self: Trainer, step: Any) -> tuple[bool, bool]:
        signal.raise_signal(signal.SIGINT)
        return look_around(self, step)

    monkeypatch.setattr(Trainer, "look_around", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT at step 1; .*; go on with --resume"):
        dmjd.pretrain(colours, tmp_path / "run", **TINY)


def test_help__lists_every_verb_with_its_arguments() -> None:
    page = pydoc.plain(pydoc.render_doc(dmjd))
    for verb in [*(verb.name for verb in VERBS), "report"]:
        assert f"\n    {verb}(" in page
    assert "pretrain(data: str | pathlib.Path, out: str | pathlib.Path, **settings: Any)" in page.replace(
        "pathlib._local", "pathlib"
    )


def test_import__takes_no_torch() -> None:
    program = "import dmjd, sys; dmjd.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_import__alone_has_the_modules_that_a_user_needs() -> None:
    program = "import dmjd; print(dmjd.errors.UserError.exit_code, callable(dmjd.reference.read_weights), dir(dmjd)[0])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2 True DMJD\n"
