"""Files that earlier versions wrote still load, and give the same outputs, those of a hybrid normed since then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import dmjd
from dmjd.backbones.convvit import ConvViT

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = sorted(path for path in FIXTURES.glob("*.safetensors") if path.stem != "outputs")
OUTPUTS = load_file(FIXTURES / "outputs.safetensors")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_load_backbone__reads_files_of_every_kind_of_before(path):
    backbone = dmjd.load_backbone(path)
    with torch.no_grad():
        output = backbone(OUTPUTS[f"{path.stem}.images"])
    expected = OUTPUTS[f"{path.stem}.output"]
    if isinstance(backbone, ConvViT):
        expected = F.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    torch.testing.assert_close(output, expected)
