"""The examples do what they say, on a few images."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = {"steps": 2, "batch_size": 4, "workers": 0, "device": "cpu"}
PRETRAINING = TRAINING | {
    "preset": "quick",
    "model": {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "masking__block": 1,
    "monitor__evals": 0,
}


def test_small__ends_with_a_classifier_that_timm_opens(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / "small.py"))["main"]
    exported = main(str(colours), str(tmp_path), PRETRAINING, TRAINING)
    said = capsys.readouterr().out
    assert re.search(r"A linear classifier on frozen features: [0-9.]+%\n", said)
    assert re.search(r"Fine-tuned: [0-9.]+%\n", said)
    assert "3 classes" in said
    with safe_open(exported, "pt") as file:
        assert "head.weight" in file.keys()  # noqa: SIM118 (not a dict)


@pytest.mark.slow
def test_small__as_a_notebook_runs_to_its_end(colours: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "small.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given = {"images": str(colours), "out": str(tmp_path), "pretraining": PRETRAINING, "training": TRAINING}
    names = set(re.findall(r"^(\w+(?:, \w+)*) =", parameters.source, flags=re.MULTILINE))
    assert {name for each in names for name in each.split(", ")} == given.keys()
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "(3, " in notebook.cells[-1].outputs[0]["data"]["text/plain"]
    assert (tmp_path / "classifier.safetensors").is_file()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
