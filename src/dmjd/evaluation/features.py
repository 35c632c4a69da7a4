"""Features of images from a frozen backbone, on any device, in any precision and on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from dmjd.backbones import Architecture
from dmjd.backbones.feature_maps import token_layer
from dmjd.backbones.files import open_backbone, save_backbone
from dmjd.backbones.normalize import Normalize
from dmjd.data.crops import center_crop
from dmjd.data.decode import Wanted
from dmjd.data.levels import BYTES, Levels
from dmjd.data.loader import read_batches
from dmjd.data.source import Parts, Source, labels_of, measure_levels, none_decodes, open_source
from dmjd.data.transfer import transfer
from dmjd.engine.device import choose_precision, float32
from dmjd.engine.distributed import Ranks
from dmjd.engine.signals import stoppable
from dmjd.errors import ConfigError

_Found = TypeVar("_Found", bound=Iterable[Any])
LabelledFeatures = tuple[Tensor, Tensor]  # (n, D) and (n)


class Seen(NamedTuple):
    """Values of the next images of a set."""

    values: Float[Tensor, "n ..."] | None  # of those that decode, on the CPU; None if none does
    numbers: list[int]  # indices of these images
    end: int  # index of the first image that has not been read yet


@torch.inference_mode()
def extract(
    pooled: Callable[[Tensor], Tensor],
    source: Source,
    indices: Sequence[int],
    *,
    image_hw: tuple[int, int],
    ranks: Ranks,
    workers: int | None = None,
    batch_size: int = 256,
) -> tuple[Float[Tensor, "n D"], list[int]]:
    """Compute features of some images, skipping those that do not decode; every rank does its share.

    Args:
        pooled: Maps uint8 images (B, C, H, W) on the device to features (B, D).
        source: The images.
        indices: Indices of the wanted images.
        image_hw: Input size of `pooled`: images are resized to cover it, then centre-cropped.
        ranks: The ranks that share the work.
        workers: Processes that load images; None chooses a number that suits the machine.
        batch_size: Images per batch and rank.

    Returns:
        Features on the CPU in the order of `indices`, and the indices of their images, on every rank.

    Raises:
        DataError: If none decodes.
        Stopped: After a signal that ends runs.
    """
    batches = read_batches(
        source,
        ranks.share(indices),
        partial(center_crop, size=image_hw),
        batch_size=batch_size,
        workers=workers,
        pin_memory=ranks.device.type == "cuda",
    )
    chunks: list[Tensor] = []
    kept: list[int] = []
    total = -(-len(ranks.share(indices)) // batch_size)
    seen = tqdm(batches, desc="features", total=total, unit=" batches", leave=False, disable=None)
    for images, numbers in stoppable(seen, ranks.agree):
        if numbers:
            chunks.append(pooled(transfer(images, ranks.device)).float().cpu())
            kept += numbers
    shares = [share for share in ranks.gather((torch.cat(chunks), kept) if chunks else None) if share is not None]
    if not shares:
        raise none_decodes(source, indices[0], len(indices))
    if len(shares) == 1:
        return shares[0]
    features, numbers = torch.cat([share[0] for share in shares]), [number for share in shares for number in share[1]]
    place = {index: place for place, index in enumerate(indices)}
    order = sorted(range(len(numbers)), key=lambda row: place[numbers[row]])
    return features[order], [numbers[row] for row in order]


class FeatureExtractor:
    """A backbone on its device, with the channels, size, mean and standard deviation from its `pretrained_cfg`.

    Images are resized to that size, and converted to grey or to colour where the channels require it.

    Args:
        name: A backbone file or timm:NAME.
        ranks: The ranks that share the work.
        precision: Precision of matrix products, see `choose_precision`.
        workers: Processes that load images; None chooses a number that suits the machine.
        pretrained: Load the weights, or leave the same network untrained.
        drop_path_rate: Stochastic depth rate in training.
        value_range: Range of the values of images deeper than 8 bits. Default: the range of the training images if
            these were deeper than 8 bits, else that of a sample of the images.
        pages: How to read TIFFs of several pages, see `Wanted`.

    Raises:
        CheckpointError: If the backbone does not load.
        ConfigError: If it does not support drop_path_rate.
    """

    def __init__(
        self,
        name: str,
        *,
        ranks: Ranks,
        precision: str = "auto",
        workers: int | None = None,
        pretrained: bool = True,
        drop_path_rate: float = 0.0,
        value_range: Sequence[float] | None = None,
        pages: Literal["bands", "frames"] | None = None,
    ):
        self.ranks, self.device, self.workers = ranks, ranks.device, workers
        self.autocast = choose_precision(precision, self.device)
        model, self.architecture = open_backbone(name, pretrained=pretrained, drop_path_rate=drop_path_rate)
        self.model = model.to(self.device)
        wanted: Any = model.pretrained_cfg
        self.in_chans, *size = wanted["input_size"]
        self.image_hw: tuple[int, int] = (size[0], size[1])
        trained = tuple(getattr(model, "value_range", None) or (0.0, 255.0))
        known = value_range or (trained if trained != (0.0, 255.0) else None)  # a file with 0..255 may be of bytes
        self.wanted = Wanted(self.in_chans, self.image_hw, Levels(*map(float, known)) if known else None, pages)
        self.statistics: tuple[list[float], list[float]] = (list(wanted["mean"]), list(wanted["std"]))
        self.normalize = Normalize(*self.statistics).to(self.device)

    def open(self, find: Callable[[Wanted], _Found]) -> _Found:
        """Open a set with the channels of the model, and with its size if images are generated.

        All ranks must call this: the first one downloads and lists images, and the others read its results from disk.

        Args:
            find: Opens the parts of a set; the first part is sampled if the range of values is unknown.
        """
        found = self.ranks.main_first(lambda: find(self.wanted))
        if self.wanted.levels is None and (levels := measure_levels(next(iter(found)))):
            self.wanted = replace(self.wanted, levels=levels)
            return self.ranks.main_first(lambda: find(self.wanted))
        return found

    def open_images(self, data: str, *, seed: int, part: str | None = None) -> Parts:
        """Open the training and the held-out images of a set by its path or name, see `open_source`."""
        return self.open(lambda wanted: open_source(data, wanted, seed=seed, part=part))

    @property
    def value_range(self) -> tuple[float, float]:
        """Value range of the images, for the metadata of a backbone file."""
        levels = self.wanted.levels or BYTES
        return levels.low, levels.high

    def save_classifier(
        self, path: Path, network: nn.Module, architecture: Architecture, classes: Sequence[str]
    ) -> None:
        """Write a classifier built on the model, with the names of its classes, as a file that timm can open too."""
        task = {"name": "classify", "classes": list(classes)}
        save_backbone(path, network, architecture, *self.statistics, value_range=self.value_range, task=task)

    def features(
        self, source: Source, *, layers: tuple[int, ...] = (), batch_size: int = 256
    ) -> tuple[Float[Tensor, "n D"], list[int]]:
        """Compute features of all images that decode, in order, and return them with the indices of these images.

        Args:
            source: The images.
            layers: Blocks whose mean-pooled tokens are concatenated; none for the model's own output.
            batch_size: Images per batch and rank.

        Raises:
            ConfigError: If the model has no such layers.
            DataError: If no image decodes.
        """
        return self.see_all(partial(self.pooled, layers=layers), source, batch_size=batch_size)

    def see_all(
        self, see: Callable[[Tensor], Tensor], source: Source, *, batch_size: int = 256
    ) -> tuple[Float[Tensor, "n D"], list[int]]:
        """Compute values of all images that decode, in order, and return them with the indices of these images.

        Args:
            see: Maps images (B, C, H, W) of 0..255 on the device to values (B, D).
            source: The images.
            batch_size: Images per batch and rank.

        Raises:
            DataError: If no image decodes.
        """
        return extract(
            see,
            source,
            range(len(source)),
            image_hw=self.image_hw,
            ranks=self.ranks,
            workers=self.workers,
            batch_size=batch_size,
        )

    def stream(
        self, see: Callable[[Tensor], Tensor], source: Source, *, batch_size: int, start: int = 0
    ) -> Iterator[Seen]:
        """Compute values of the images of a set in order, batch by batch, so that only one batch is in memory.

        Every rank computes its share of each batch; only rank 0 receives the values.

        Args:
            see: Maps images (B, C, H, W) of 0..255 on the device to values (B, ...).
            source: The images.
            batch_size: Images per batch and rank.
            start: Index of the first image to read.
        """
        indices, together = range(start, len(source)), batch_size * self.ranks.world_size
        own = read_batches(
            source,
            self.ranks.share(indices),
            partial(center_crop, size=self.image_hw),
            batch_size=batch_size,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for first in tqdm(indices[::together], desc="features", unit=" batches", leave=False, disable=None):
            images, numbers = next(own, (None, []))  # the last batch may be empty on this rank
            values = None
            if images is not None and numbers:
                with torch.inference_mode():
                    values = see(transfer(images, self.device)).float().cpu()
            shares = self.ranks.gather_on_main((values, numbers))
            found = [number for _, theirs in shares for number in theirs]
            order = sorted(range(len(found)), key=found.__getitem__)
            parts = [theirs for theirs, _ in shares if theirs is not None]
            joined = torch.cat(parts)[order] if parts else None
            yield Seen(joined, sorted(found), min(first + together, len(source)))

    def labelled_features(
        self, parts: Parts, *, layers: tuple[int, ...] = (), batch_size: int = 256
    ) -> tuple[LabelledFeatures, LabelledFeatures]:
        """Compute features and labels of the training and the held-out images of a labelled set."""
        train, held_out = (self.features(part, layers=layers, batch_size=batch_size) for part in parts)
        return (train[0], labels_of(parts.train, train[1])), (held_out[0], labels_of(parts.held_out, held_out[1]))

    def pooled(self, images: Tensor, layers: tuple[int, ...] = (), *, normalized: bool = False) -> Tensor:
        """Compute features (B, D) of images (B, C, H, W) of 0..255, or `normalized` ones."""
        images = images if normalized else self.normalize(images)
        with self.autocast():
            if not layers:
                return self.model(images)
            return torch.cat([maps.flatten(2).mean(dim=2) for maps in self._maps(images, layers)], dim=1)

    def logits(self, images: Tensor) -> Tensor:
        """Classify images (B, C, H, W) of 0..255, if the model has a head, which computes in float32.

        In the 8 bits of bf16, the logits of the likeliest classes would often be equal.
        """
        model: Any = self.model
        with self.autocast():
            found = model.forward_features(self.normalize(images))
        return model.forward_head(float32(found))

    def tokens(self, images: Tensor, layers: tuple[int, ...] = ()) -> Tensor:
        """Compute features of every patch (B, L, D) of images of 0..255, in raster order.

        Args:
            images: Pixels, (B, C, H, W).
            layers: Blocks whose tokens are concatenated; none for the normalised tokens of the last block.

        Raises:
            ConfigError: If the model has no such layers, or their grids differ.
        """
        model: Any = self.model
        with self.autocast():
            normalized = self.normalize(images)
            maps = self._maps(normalized, layers or (token_layer(model),), norm=not layers)
            if len({each.shape[2:] for each in maps}) > 1:
                raise ConfigError(f"layers of different grids have no tokens in common; --layers {layers}; choose one")
            return torch.cat([each.flatten(2).mT for each in maps], dim=2)

    def _maps(self, images: Tensor, layers: tuple[int, ...], *, norm: bool = False) -> list[Tensor]:
        model: Any = self.model
        try:
            return model.forward_intermediates(
                images, indices=list(layers), norm=norm, intermediates_only=True, output_fmt="NCHW"
            )
        except (AttributeError, AssertionError, IndexError) as error:
            raise ConfigError(f"the backbone has no such layers ({error}); --layers {layers}") from None
