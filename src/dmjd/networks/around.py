"""Code that segmentation and detection share: networks with a backbone inside."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dmjd.backbones.files import save_backbone
from dmjd.backbones.pyramid import Pyramid
from dmjd.data.annotated import AnnotatedSamples, collate_annotated
from dmjd.engine.loop import Objective
from dmjd.engine.trainer import Trainer
from dmjd.errors import ConfigError
from dmjd.evaluation.dense import Judged
from dmjd.evaluation.features import FeatureExtractor


def make_pyramid(backbone: FeatureExtractor, name: str, *, window: int | None = None) -> Pyramid:
    """Build the pyramid of a backbone, with windowed attention if `window` is given, and run it once as a test.

    Raises:
        ConfigError: If it has no maps, takes images of one size only, or cannot have windows; the message has `name`.
    """
    try:
        pyramid = Pyramid(backbone.model, window).to(backbone.device).eval()
    except ValueError as error:
        raise ConfigError(f"{error}; {name}; take another backbone") from None
    try:
        with torch.no_grad():
            width = max(96, pyramid.multiple + 1)  # two windows: one alone may fit a network that cannot have windows
            pyramid(torch.zeros(1, backbone.in_chans, 64, width, device=backbone.device))
    except (AssertionError, RuntimeError):  # some timm models fix their image size in other ways
        what = "the backbone cannot take images of arbitrary size" + (", or not in windows" if window else "")
        raise ConfigError(f"{what}; {name}; take another backbone") from None
    return pyramid


def heads_of(network: nn.Module, backbone: nn.Module) -> nn.ModuleList:
    """List the outermost modules of a network that contain no part of its backbone."""
    return nn.ModuleList(_outermost(network, {id(module) for module in backbone.modules()}))


def _outermost(module: nn.Module, inside: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        if id(child) in inside:
            continue
        if any(id(each) in inside for each in child.modules()):
            yield from _outermost(child, inside)
        else:
            yield child


def fit_around(
    trainer: Trainer,
    backbone: FeatureExtractor,
    samples: AnnotatedSamples,
    objective: Objective,
    judge: Callable[[nn.Module], Judged],
    task: Mapping[str, Any],
) -> Judged:
    """Train a network around a backbone, save the best and the last one, and return the last evaluation.

    Args:
        trainer: Trainer of the network.
        backbone: The backbone, whose model is part of the network.
        samples: Training samples.
        objective: Maps the network and a batch to scalars by name; `loss` is minimised.
        judge: Evaluates a network, given in evaluation mode, on the held-out images.
        task: Description of the network, for `read_task`.
    """
    inside = next(name for name, module in trainer.model.module.named_modules() if module is backbone.model)
    judged: Judged | None = None

    def evaluate(step: int) -> dict[str, float]:
        nonlocal judged
        network = trainer.model.whole().eval()  # sharded weights cannot be gathered in inference mode
        with torch.inference_mode():
            judged = judge(network)
        return {name: value for name, value in judged.summary.items() if isinstance(value, float)}

    def keep(name: str) -> None:
        network, path = trainer.model.whole(), trainer.run.out / name
        model = network.get_submodule(inside)
        if trainer.ranks.is_main:
            save_backbone(
                path,
                model,
                backbone.architecture,
                *backbone.statistics,
                value_range=backbone.value_range,
                around=network,
                task=task,
            )

    trainer.fit(samples, collate_annotated, objective, evaluate, keep=keep)
    assert judged is not None
    best = {name: value for name, value in trainer.run.summary.items() if name.startswith("best_")}
    judged.summary |= best | {"train_images": len(samples.images), "seconds": round(trainer.run.seconds, 1)}
    return judged
