"""The verbs of the command line as functions: `run = dmjd.pretrain("photos", "runs/photos", minutes=10)`.

Settings have the names of their flags: those of a section as a mapping, `model={"size": "small"}`, or with two
underscores, `model__size="small"`; `dmjd VERB --help` lists them. What stands above what is as there: defaults, the
preset, the file that `config` names, what is given. What a user has to mend is a `dmjd.errors.UserError`. Ctrl-C ends a
run as it does on the command line, and is a `KeyboardInterrupt` then; other signals end the process.
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
    """What a verb has left behind.

    Attributes:
        numbers: What it has found out, by name; empty on all ranks but the first.
        out: The file or the directory that it has written, if any.
    """

    numbers: dict[str, Any]
    out: Path | None


@dataclass(frozen=True)
class TrainingOutcome(Outcome):
    """What a run has left behind in its directory, `out`.

    Attributes:
        numbers: Its final numbers, by name.
        backbone: File of the network, for the `backbone` of other verbs; segmenters, detectors and classifiers have
            their heads in it. It is the best of a run, with `best_top1`, `best_miou` or `best_map` in `numbers`; those
            without `best_` are of the last. A linear classifier of several layers' features has none.
        report: The page of the run.
    """

    out: Path
    backbone: Path
    report: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: numbers over steps, for a table or a plot of one's own."""
        return read_metrics(self.out / "metrics.jsonl")

    def load(self) -> nn.Module:
        """Load the network as a timm model, in evaluation mode, see `dmjd.load_backbone`.

        Raises:
            CheckpointError: If there is none.
        """
        return load_backbone(self.backbone)


def pretrain(data: str | Path, out: str | Path, **settings: Any) -> TrainingOutcome:
    """Pre-train a backbone on unlabelled images, by default with what suits them, this machine and 30 minutes.

    Args:
        data: Folder of images, or whatever `--data` takes.
        out: Directory of the run.
        settings: `minutes=10`, `preset="dmjd"`, `epochs=100`, `model__size="small"`, `resume=True` ...

    Returns:
        The run; its `numbers` are those of summary.json, with what the features are worth in `trained`.

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
    """Train a backbone and a classifier on labelled images; `numbers["top1"]` is its accuracy in the end.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Labelled images.
        out: Directory of the run. Default: runs/finetune.
        settings: `epochs=50`, `batch_size=64`, `optim__blr=1e-3` ...
    """
    return _train("finetune", "best.safetensors", backbone=backbone, data=data, out=out, **settings)


def segment(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> TrainingOutcome:
    """Train a backbone and UPerNet on images with a class for every pixel; `predict` looks at others with it.

    Args:
        backbone: A backbone.safetensors, or timm:NAME.
        data: Images and masks.
        out: Directory of the run. Default: runs/segment.
        settings: `epochs=50`, `crop_size="512"` ...
    """
    return _train("segment", "best.safetensors", backbone=backbone, data=data, out=out, **settings)


def detect(backbone: str | Path, data: str | Path, out: str | Path | None = None, **settings: Any) -> TrainingOutcome:
    """Train a backbone and Faster or Mask R-CNN on images with boxes; `predict` looks at others with it.

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
        out: Directory of a report, if one is wanted.
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
        backbone: File of the network: the `backbone` of what `finetune`, `linear`, `segment` or `detect` return.
        data: Images, or one image.
        out: Table of classes and probabilities; of a segmenter or a detector, the folder.
        settings: `top=5` ...
    """
    return _do("predict", backbone=backbone, data=data, out=out, **settings)


def search(features: str | Path, out: str | Path, **settings: Any) -> Outcome:
    """Find the nearest neighbours of images, or near-duplicates, by their features.

    Args:
        features: What `embed` has written.
        out: Folder of a table and a page with the pictures.
        settings: `query="photo.jpg"` or `duplicates=True`; `k=10` ...
    """
    return _do("search", features=features, out=out, **settings)


def export(run: str | Path, out: str | Path, to: str = "timm", **settings: Any) -> Outcome:
    """Export the network of a run to timm, Hugging Face, ONNX or torch.export.

    Args:
        run: Directory of a run, or a file of one.
        out: File to write, whose ending may be left out, or folder.
        to: timm, hf, onnx or torch.
        settings: `license="mit"` ...
    """
    return _do("export", run=run, out=out, to=to, **settings)


def prepare(data: str | Path, out: str | Path, **settings: Any) -> Outcome:
    """Decode images once, make them smaller and pack them: a folder that the other verbs read faster.

    Args:
        data: Images.
        out: The folder.
        settings: `size=256` ...
    """
    return _do("prepare", data=data, out=out, **settings)


def plan(images: int | None = None, **settings: Any) -> Outcome:
    """Estimate what a pre-training run will cost, as a page that is printed.

    Args:
        images: To train on. Default: those of `data`.
        settings: `device="h100"`, `devices=8`, `price=2.5`, `measure=30`, and those of `pretrain` ...

    Returns:
        The plan; its `numbers` are those of the page.
    """
    return _do("plan", images=images, **settings)


def doctor(data: str | Path, out: str | Path | None = None, **settings: Any) -> Outcome:
    """Say what is in a set of images, a run or a backbone, and what is wrong with it.

    Args:
        data: What to look at.
        out: Folder of what is found out about a set of images. Default: doctor.
        settings: `max_images=1000` ...
    """
    return _do("doctor", data=data, out=out, **settings)


def report(run: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a pre-training run anew, or that of several runs side by side; returns where it is.

    Args:
        run: Directory of the run.
        others: Those of other runs, to compare it with.
        out: The page. Default: RUN/report.html for one run, comparison.html for several.
    """
    from dmjd.tasks.report import report

    return report([Path(each) for each in (run, *others)], out if out is None else Path(out))


def _do(verb: str, **given: Any) -> Outcome:
    """Do what a verb does; where it has written is what it says, or what it was told."""
    numbers = _run(verb, settings_of(verb, **given))
    out = numbers.get("out", given.get("out"))
    return Outcome(numbers, None if out is None else Path(out))


def _train(verb: str, network: str, **given: Any) -> TrainingOutcome:
    """Train as a verb does; a network is called so in the directory of the run."""
    settings = settings_of(verb, **given)
    numbers = _run(verb, settings)
    out = settings.run.out
    return TrainingOutcome(numbers, out, out / network, out / "report.html")


def _run(verb: str, settings: Any) -> dict[str, Any]:
    """Do what a verb does; Ctrl-C, when all is saved, is the `KeyboardInterrupt` that it is elsewhere in Python."""
    try:
        return getattr(import_module(f"dmjd.tasks.{verb}"), verb)(settings) or {}
    except Stopped as stop:
        if stop.received == "SIGINT":
            raise KeyboardInterrupt(stop.said) from None
        say_stopped(stop.said)
        raise
