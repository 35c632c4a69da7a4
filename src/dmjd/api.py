"""The verbs of the command line as functions: `run = dmjd.pretrain("photos", "runs/photos", minutes=10)`.

Settings have the names of their flags; those of a section are a mapping, `model={"size": "small"}`, or have two
underscores, `model__size="small"`; `dmjd VERB --help` lists them. Precedence is that of the command line: defaults <
preset < the file that `config` names < arguments. Mistakes of the user raise `dmjd.errors.UserError`. Ctrl-C stops a
run as on the command line and then raises `KeyboardInterrupt`; other signals end the process.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from dmjd.backbones.files import load_backbone
from dmjd.cli import say_stopped, settings_of
from dmjd.engine.run import read_metrics
from dmjd.errors import Stopped


@dataclass(frozen=True)
class Outcome:
    """The result of a verb.

    Attributes:
        numbers: Its results by name; empty on all ranks except the first.
        out: The file or directory that it wrote, if any.
    """

    numbers: dict[str, Any]
    out: Path | None


@dataclass(frozen=True)
class TrainingOutcome(Outcome):
    """The result of a training run, in its directory `out`.

    Attributes:
        numbers: Its final numbers by name.
        backbone: File of the network, for the argument `backbone` of other verbs; for segmenters, detectors and
            classifiers it includes the head. With labels, it holds the best network of the run, whose numbers are
            `best_top1`, `best_miou` or `best_map`; numbers without `best_` are those of the last network. A linear
            classifier on features of several layers has no such file.
        report: The page of the run.
    """

    out: Path
    backbone: Path
    report: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: numbers over steps, for your own tables and plots."""
        return read_metrics(self.out / "metrics.jsonl")

    def load(self) -> nn.Module:
        """Load the network as a timm model in evaluation mode, see `dmjd.load_backbone`.

        Raises:
            CheckpointError: If the run has no such file.
        """
        return load_backbone(self.backbone)


def pretrain(data: str | Path, out: str | Path, **settings: Any) -> TrainingOutcome:
    """Pre-train a backbone on unlabelled images, by default with settings that suit them, this machine and 30 minutes.

    Args:
        data: Folder of images, or anything else that `--data` accepts.
        out: Directory of the run.
        settings: `minutes=10`, `preset="dmjd"`, `epochs=100`, `model__size="small"`, `resume=True` ...

    Returns:
        The run; its `numbers` are those of summary.json, with measurements of the trained features in `trained`.

    Raises:
        UserError: See `dmjd.tasks.pretrain`.
    """
    return _train("pretrain", "backbone.safetensors", data=data, out=out, **settings)


def linear(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> TrainingOutcome:
    """Train a linear probe on frozen features; `numbers["top1"]` is its accuracy.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Labelled images.
        out: Directory of the result. Default: runs/linear.
        settings: `recipe="paper"`, `fraction=0.1`, `layers=[-1, -2]` ...
    """
    return _train("linear", "linear.safetensors", backbone=backbone, data=data, out=out, **settings)


def finetune(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> TrainingOutcome:
    """Train a backbone and a classifier on labelled images; `numbers["top1"]` is the final accuracy.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Labelled images.
        out: Directory of the run. Default: runs/finetune.
        settings: `epochs=50`, `batch_size=64`, `optim__blr=1e-3` ...
    """
    return _train("finetune", "best.safetensors", backbone=backbone, data=data, out=out, **settings)


def segment(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> TrainingOutcome:
    """Train a backbone and UPerNet on images with a class for every pixel; `predict` then runs it on other images.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Images and masks.
        out: Directory of the run. Default: runs/segment.
        settings: `epochs=50`, `crop_size="512"` ...
    """
    return _train("segment", "best.safetensors", backbone=backbone, data=data, out=out, **settings)


def detect(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> TrainingOutcome:
    """Train a backbone and Faster or Mask R-CNN on images with boxes; `predict` then runs it on other images.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Images and annotations.
        out: Directory of the run. Default: runs/detect.
        settings: `epochs=50`, `crop_size="512"` ...
    """
    return _train("detect", "best.safetensors", backbone=backbone, data=data, out=out, **settings)


def knn(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> Outcome:
    """Classify held-out images by their nearest neighbours in feature space; `numbers["top1"]` is the accuracy.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Labelled images.
        out: Directory for a report; none is written by default.
        settings: `k=20`, `part="test"` ...
    """
    return _do("knn", backbone=backbone, data=data, out=out, **settings)


def embed(backbone: str | Path, data: str | Path, out: str | Path, **settings: Any) -> Outcome:
    """Write the features of images to a file, for `numpy.load`.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Images.
        out: F.npy; paths and labels go to F.csv beside it.
        settings: `tokens=True`, `layers=[-1]` ...
    """
    return _do("embed", backbone=backbone, data=data, out=out, **settings)


def predict(backbone: str | Path, data: str | Path, out: str | Path, **settings: Any) -> Outcome:
    """Run a trained classifier, segmenter or detector on images.

    Args:
        backbone: File of the network: the attribute `backbone` of the result of `finetune`, `linear`, `segment` or
            `detect`.
        data: Images, or one image.
        out: Table of classes and probabilities; for a segmenter or a detector, a folder.
        settings: `top=5` ...
    """
    return _do("predict", backbone=backbone, data=data, out=out, **settings)


def search(features: str | Path, out: str | Path, **settings: Any) -> Outcome:
    """Find the nearest neighbours of images, or near-duplicates, by their features.

    Args:
        features: File written by `embed`.
        out: Folder for a table, and a page with pictures.
        settings: `query="photo.jpg"` or `duplicates=True`; `k=10` ...
    """
    return _do("search", features=features, out=out, **settings)


def export(run: str | Path, out: str | Path, to: str = "timm", **settings: Any) -> Outcome:
    """Export the network of a run to timm, Hugging Face, ONNX or torch.export.

    Args:
        run: Directory of a run, or a file from one.
        out: File to write, whose suffix may be omitted, or folder.
        to: timm, hf, onnx or torch.
        settings: `license="mit"` ...
    """
    return _do("export", run=run, out=out, to=to, **settings)


def prepare(data: str | Path, out: str | Path, **settings: Any) -> Outcome:
    """Decode images once, shrink them and pack them into a folder that the other verbs read faster.

    Args:
        data: Images.
        out: The folder.
        settings: `size=256` ...
    """
    return _do("prepare", data=data, out=out, **settings)


def plan(images: int | None = None, **settings: Any) -> Outcome:
    """Estimate the cost of a pre-training run, and print it as a page of text.

    Args:
        images: Number of training images. Default: that of `data`.
        settings: `device="h100"`, `devices=8`, `price=2.5`, `measure=30`, and those of `pretrain` ...

    Returns:
        The plan; its `numbers` are those of the page.
    """
    return _do("plan", images=images, **settings)


def doctor(data: str | Path, out: str | Path | None = None, **settings: Any) -> Outcome:
    """Examine a set of images, a run or a backbone, and report what is wrong with it.

    Args:
        data: Set of images, run or backbone.
        out: Folder for the report on a set of images. Default: doctor.
        settings: `max_images=1000` ...
    """
    return _do("doctor", data=data, out=out, **settings)


def report(run: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Rewrite the page of a pre-training run, or write one that compares several runs; returns its path.

    Args:
        run: Directory of the run.
        others: Directories of other runs to compare it with.
        out: File to write. Default: RUN/report.html for one run, comparison.html for several.
    """
    from dmjd.tasks.report import report

    return report([Path(each) for each in (run, *others)], out if out is None else Path(out))


def _do(verb: str, **given: Any) -> Outcome:
    """Run a verb; its output path is the one it reports, or else the one it was given."""
    numbers = _run(verb, settings_of(verb, **given))
    out = numbers.get("out", given.get("out"))
    return Outcome(numbers, None if out is None else Path(out))


def _train(verb: str, network: str, **given: Any) -> TrainingOutcome:
    """Run a verb that trains; `network` is the file name of its network in the directory of the run."""
    settings = settings_of(verb, **given)
    numbers = _run(verb, settings)
    out = settings.run.out
    return TrainingOutcome(numbers, out, out / network, out / "report.html")


def _run(verb: str, settings: Any) -> dict[str, Any]:
    """Run a verb; after Ctrl-C, when everything is saved, raise `KeyboardInterrupt` as Python does elsewhere."""
    try:
        return getattr(import_module(f"dmjd.tasks.{verb}"), verb)(settings) or {}
    except Stopped as stop:
        if stop.received == "SIGINT":
            raise KeyboardInterrupt(stop.said) from None
        say_stopped(stop.said)
        raise
