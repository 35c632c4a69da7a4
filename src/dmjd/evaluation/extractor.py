"""What every verb that starts from a backbone does first: load it, find its images, compute features."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmjd.backbones.files import open_backbone
from dmjd.config import Embed, Few, Judge, Run
from dmjd.data import source as sources
from dmjd.data.crops import center_crop
from dmjd.data.source import Images, Parts
from dmjd.engine.device import choose_device, choose_precision
from dmjd.errors import ConfigError, DataError
from dmjd.evaluation.features import features


class FeatureExtractor:
    """A backbone on its device, with what its `pretrained_cfg` wants of images: channels, size, mean and deviation.

    Images of any other size are resized to it, colour becomes grey and grey colour.
    """

    def __init__(self, settings: Run, name: str, **options: Any):
        self.device = choose_device(settings.device)
        self.autocast = choose_precision(settings.precision, self.device)
        model, self.architecture = open_backbone(name, **options)
        self.model: nn.Module = model.to(self.device)
        wanted: Any = model.pretrained_cfg
        self.in_chans, *size = wanted["input_size"]
        if self.in_chans not in (1, 3):
            raise ConfigError(f"the backbone takes {self.in_chans} channels; {name}; images have 1 or 3")
        self.image_hw: tuple[int, int] = (size[0], size[1])
        self.statistics: tuple[list[float], list[float]] = (list(wanted["mean"]), list(wanted["std"]))
        self.mean, self.std = (torch.tensor(values, device=self.device)[:, None, None] for values in self.statistics)

    def normalize(self, images: Tensor) -> Tensor:
        """Bring pixels of 0..255 to what the model takes."""
        return (images / 255 - self.mean) / self.std

    def features(
        self, images: Images, *, layers: tuple[int, ...] = (), batch_size: int = 256
    ) -> tuple[Tensor, list[int]]:
        """Compute features of all images that decode, and say which these are.

        Args:
            images: Their order is kept.
            layers: Blocks whose mean-pooled tokens are joined; none for the model's own output.
            batch_size: Images at a time.

        Raises:
            ConfigError: If the model has no such layers.
        """
        return features(
            partial(self.pooled, layers=layers),
            images,
            range(len(images)),
            transform=partial(center_crop, size=self.image_hw),
            device=self.device,
            batch_size=batch_size,
            progress=True,
        )

    def pooled(self, images: Tensor, layers: tuple[int, ...] = (), *, normalized: bool = False) -> Tensor:
        """Compute features (B, D) of images (B, C, H, W) of 0..255, or of what the model takes."""
        model: Any = self.model
        images = images if normalized else self.normalize(images)
        with self.autocast():
            if not layers:
                return model(images)
            try:
                maps = model.forward_intermediates(
                    images, indices=list(layers), intermediates_only=True, output_fmt="NCHW"
                )
            except (AttributeError, AssertionError, IndexError) as error:
                raise ConfigError(f"the backbone has no such layers ({error}); --layers {layers}") from None
            return torch.cat([tokens.flatten(2).mean(dim=2) for tokens in maps], dim=1)


def extractor(settings: Judge | Embed) -> FeatureExtractor:
    """Open the backbone that settings name, without a classifier."""
    torch.manual_seed(getattr(settings, "seed", 0))
    return FeatureExtractor(settings, settings.backbone, pretrained=not getattr(settings, "untrained", False))


def labelled(settings: Judge, backbone: FeatureExtractor) -> Parts:
    """Find the labelled images of settings, with only those training images whose labels are to be used.

    Raises:
        DataError: If there are no labels, or held-out images of a class that nothing can be learned about.
    """
    parts = sources.load(settings.data, in_chans=backbone.in_chans, image_hw=backbone.image_hw, seed=settings.seed)
    train, held_out = parts
    if train.labels is None or held_out.labels is None:
        raise DataError(
            f"no labels; {settings.data}; needs two classes or more, as folders PART/CLASS/IMAGE or CLASS/IMAGE"
        )
    unknown = [held_out.classes[label] for label in sorted({*held_out.labels} - {*train.labels})]
    if unknown:
        raise DataError(f"held-out classes without training images: {', '.join(unknown)}; {settings.data}; add some")
    if isinstance(settings, Few):
        train = train.subset(
            sources.few_labels(train.labels, settings.seed, fraction=settings.fraction, shots=settings.shots)
        )
    return Parts(train, held_out)
