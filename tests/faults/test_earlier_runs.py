"""Runs that earlier versions began go on in this one. Each zip file holds a run's directory as a kill after step 3 of 4
left it, of `dmjd pretrain --preset quick --data shapes` with the settings below.

Random numbers are others since the first, so that its fourth loss is not the one its own version would have had.
"""

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
from prefork import Dmjd

OLDEST, *LATER = sorted((Path(__file__).parents[1] / "fixtures" / "runs").glob("*.zip"))
RUNS = [OLDEST, *(pytest.param(path, marks=pytest.mark.slow) for path in LATER)]
SMALL = ["embed_dim=8", "depth=1", "num_heads=2"]
SETTINGS = ["--batch_size=8", "--steps=4", "--monitor.max_images=60", "--monitor.evals=0"]


@pytest.mark.long
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_resume__goes_on_with_the_runs_of_earlier_versions(path, tmp_path):
    run = tmp_path / "run"
    ZipFile(path).extractall(run)
    small = [f"--{part}.{setting}" for part in ("model", "decoder") for setting in SMALL]
    command = [
        "pretrain",
        "--preset=quick",
        "--data=shapes",
        "--out=run",
        "--resume",
        *SETTINGS,
        *small,
        "--device=cpu",
    ]
    process = Dmjd(command, cwd=tmp_path, stdout=-1, stderr=-1)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4]
    assert (run / "backbone.safetensors").exists()
    assert "step 4/4" in said
