"""From a folder of images, some of them with labels, to a classifier.

    python examples/small.py photos runs/small

`photos` has class folders: photos/CLASS/IMAGE, or photos/train/CLASS/IMAGE and photos/val/CLASS/IMAGE.
Pre-training looks at no label and takes ten minutes; it would take a folder without classes as well.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dmjd


def main(images: str, out: str, pretraining: Mapping[str, Any], training: Mapping[str, Any]) -> Path:
    """Pre-train, look at the numbers, probe, fine-tune and export; settings are those of the command line."""
    run = dmjd.pretrain(images, f"{out}/pretrain", **pretraining)
    print("Pre-training:", run.numbers["verdict"]["line"])
    print("Losses:", [round(line["loss"], 3) for line in run.metrics if "loss" in line])
    print("Pictures and curves:", run.report)

    probe = dmjd.linear(run.backbone, images, f"{out}/linear")
    print(f"A linear classifier on frozen features: {probe.numbers['top1']:.1%}")

    tuned = dmjd.finetune(run.backbone, images, f"{out}/finetune", **training)
    print(f"Fine-tuned: {tuned.numbers['top1']:.1%}")

    exported = dmjd.export(tuned.out, f"{out}/classifier", to="timm")
    print("For timm:", exported.out)
    model = tuned.load()  # the same network, in Python
    print(
        type(model).__name__, model.num_classes, "classes, trained with images of", model.pretrained_cfg["input_size"]
    )
    return exported.out


if __name__ == "__main__":
    main(*sys.argv[1:3], pretraining={"minutes": 10}, training={"epochs": 20, "batch_size": 64})
