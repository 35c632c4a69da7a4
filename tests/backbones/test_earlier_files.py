"""Files that earlier versions wrote still load, and give the same outputs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dmjd

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = sorted(path for path in FIXTURES.glob("*.safetensors") if path.stem != "outputs")
OUTPUTS = load_file(FIXTURES / "outputs.safetensors")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_load_backbone__reads_files_of_every_kind_of_before(path):
    backbone = dmjd.load_backbone(path)
    with torch.no_grad():
        output = backbone(OUTPUTS[f"{path.stem}.images"])
    torch.testing.assert_close(output, OUTPUTS[f"{path.stem}.output"])
