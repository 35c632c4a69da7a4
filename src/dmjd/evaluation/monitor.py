"""How good the features of a backbone are while it is pre-trained."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dmjd.data.source import Parts, has_labels, labels_of
from dmjd.engine.distributed import ParallelModel
from dmjd.evaluation.features import extract
from dmjd.evaluation.knn import knn_top1
from dmjd.evaluation.linear import linear_top1
from dmjd.evaluation.rank import feature_std, rankme
from dmjd.method import DMJD

Autocast = Callable[[], AbstractContextManager[None]]


def evenly(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` numbers, evenly spread, so that sorted classes all appear."""
    return np.linspace(0, count - 1, min(count, most), dtype=int).tolist() if count else []


@dataclass(frozen=True)
class Monitor:
    """Measures the mean-pooled features of the backbone as it is.

    Attributes:
        parts: Training and held-out images.
        image_hw: Size that the backbone takes.
        max_images: Images of each part that an evaluation looks at.
        workers: Processes that load images; None for as many as fit.
    """

    parts: Parts
    image_hw: tuple[int, int]
    max_images: int
    workers: int | None = None

    @property
    def num_images(self) -> int:
        """Images that `measure` looks at."""
        looked_at = [*self.parts] if has_labels(self.parts.train) else [self.parts.held_out]
        return sum(min(len(images), self.max_images) for images in looked_at)

    def measure(self, model: ParallelModel, autocast: Autocast, *, probe: bool = False) -> dict[str, float]:
        """Measure, on all ranks together.

        With labels: k-NN accuracy on held-out images and, with `probe`, that of a linear classifier. Without: RankMe
        and standard deviation of the held-out ones, which show a collapse.
        """
        network, ranks = model.whole(), model.ranks
        assert isinstance(network, DMJD)
        training = network.training
        network.eval()

        def pooled(images: torch.Tensor) -> torch.Tensor:
            with autocast():
                return network.features(images)

        compute = partial(extract, pooled, image_hw=self.image_hw, ranks=ranks, workers=self.workers)
        train, held_out = self.parts
        shown, shown_at = compute(held_out, evenly(len(held_out), self.max_images))
        if not (has_labels(train) and has_labels(held_out)):
            measured = ranks.on_main(lambda: {"rankme": rankme(shown), "feature_std": feature_std(shown)})
        else:
            bank, bank_at = compute(train, evenly(len(train), self.max_images))
            pairs = (bank, labels_of(train, bank_at), shown, labels_of(held_out, shown_at))
            probe = probe and len(pairs[1].unique()) > 1
            measured = ranks.on_main(
                lambda: {"knn_top1": knn_top1(*pairs)} | ({"linear_top1": linear_top1(*pairs)} if probe else {})
            )
        network.train(training)
        return measured
