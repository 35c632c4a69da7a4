"""The quality of a backbone's features during pre-training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from dmjd.data.crops import center_crop
from dmjd.data.loader import read_batches
from dmjd.data.source import Parts, Source, evenly, has_labels, labels_of
from dmjd.engine.distributed import ParallelModel
from dmjd.evaluation.features import extract
from dmjd.evaluation.knn import knn_top1
from dmjd.evaluation.linear import linear_top1
from dmjd.evaluation.rank import Explained, feature_std, rankme
from dmjd.method import DMJD

Autocast = Callable[[], AbstractContextManager[None]]
NUM_PREDICTED = 128  # images of each part whose hidden tokens are predicted: thousands of tokens
AT_A_TIME = 32
FEW = 20  # with fewer held-out images, the spread of features is measured on training images


@dataclass(frozen=True)
class Monitor:
    """Measures the pooled features of the backbone in its current state.

    Attributes:
        parts: Training and held-out images.
        image_hw: Input size of the backbone.
        masks: Draws masks (B, V, L) for images from their seeds, as training does.
        max_images: Maximum number of images of each part in an evaluation.
        workers: Processes that load images; None chooses a number that suits the machine.
    """

    parts: Parts
    image_hw: tuple[int, int]
    masks: Callable[[torch.Tensor], torch.Tensor]
    max_images: int
    workers: int | None = None

    @property
    def labelled(self) -> bool:
        """Whether all images have labels."""
        return all(map(has_labels, self.parts))

    @property
    def few(self) -> bool:
        """Whether there are too few held-out images to measure the spread of features."""
        return len(self.parts.held_out) < FEW

    @property
    def looked_at(self) -> list[Source]:
        """Parts whose features are computed: held-out images, then training images if k-NN or spread needs them."""
        train, held_out = self.parts
        return [held_out, train] if self.labelled or self.few else [held_out]

    @property
    def num_images(self) -> int:
        """Number of images that `measure` reads."""
        predicted = sum(min(len(images), self.max_images, NUM_PREDICTED) for images in self.parts)
        return predicted + sum(min(len(images), self.max_images) for images in self.looked_at)

    def measure(self, model: ParallelModel, autocast: Autocast, *, probe: bool = False) -> dict[str, float]:
        """Measure, on all ranks together.

        Always: the explained variance of hidden tokens of training and of held-out images (`Explained`). With more than
        one image, RankMe and standard deviation of their features, which reveal a collapse; with a visible branch, the
        explained variance of visible tokens of held-out images; with labels, k-NN accuracy on held-out images and, with
        `probe`, that of a linear classifier.
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
        features = [compute(part, evenly(len(part), self.max_images)) for part in self.looked_at]
        (shown, shown_at), (bank, bank_at) = features[0], features[-1]
        learned, explained = (self.explained(network, part, autocast) for part in self.parts)
        predicted = {"explained_train": learned["explained"], **explained}
        spread = bank if self.few else shown
        pairs = (bank, labels_of(train, bank_at), shown, labels_of(held_out, shown_at)) if self.labelled else None

        def numbers() -> dict[str, float]:
            found = dict(predicted)
            if len(spread) > 1:
                found |= {"rankme": rankme(spread), "feature_std": feature_std(spread)}
            if pairs:
                found["knn_top1"] = knn_top1(*pairs)
            if pairs and probe and len(pairs[1].unique()) > 1:
                found["linear_top1"] = linear_top1(*pairs)
            return found

        measured = ranks.on_main(numbers)
        network.train(training)
        return measured

    @torch.inference_mode()
    def explained(self, network: DMJD, images: Source, autocast: Autocast) -> dict[str, float]:
        """Predict the tokens of a few images, the same at every call, and return their explained variance."""
        device = next(network.parameters()).device
        hidden, visible = Explained(), Explained()
        middle = partial(center_crop, size=self.image_hw)
        numbers = evenly(len(images), min(self.max_images, NUM_PREDICTED))
        for crops, seen in read_batches(images, numbers, middle, batch_size=AT_A_TIME, workers=0, pin_memory=False):
            if seen:
                with autocast():
                    said = network.predict(crops.to(device), self.masks(torch.tensor(seen)))
                hidden.add(said.masked.float(), said.masked_target.float())
                if said.visible is not None and said.visible_target is not None:
                    visible.add(said.visible.float(), said.visible_target.float())
        return {"explained": hidden.share} | ({"explained_visible": visible.share} if visible.count else {})
