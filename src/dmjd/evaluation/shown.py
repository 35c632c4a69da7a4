"""Output of a trained network for a few held-out images, for pictures: errors, patch features, nearest images."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor
from torch.nn import functional as F

from dmjd.backbones.feature_maps import token_layer
from dmjd.data.crops import center_crop
from dmjd.data.loader import read_batches
from dmjd.data.source import Source
from dmjd.evaluation.neighbours import nearest
from dmjd.method import DMJD

AT_A_TIME = 32
THUMB = 96  # longer side of a thumbnail, in pixels
BY_PIXELS = 16  # side to which images are shrunk before their pixels are compared


class Glance(NamedTuple):
    """A few images, with features and pixels to compare them by."""

    numbers: Int[Tensor, " m"]  # indices in their set
    thumbs: UInt8[Tensor, "m C h w"]
    features: Float[Tensor, "m D"]  # of the backbone
    pixels: Float[Tensor, "m P"]  # minus their mean, so that brightness does not count


class Alike(NamedTuple):
    """The rows of a bank that are most like each query."""

    rows: Int[Tensor, "q k"]
    similarity: Float[Tensor, "q k"]  # cosine, in descending order


def token_errors(predicted: Float[Tensor, "n V L T"], truth: Float[Tensor, "n L T"]) -> Float[Tensor, "n V L"]:
    """Compute each token's squared error relative to the variance of the targets: 1 is as good as their mean."""
    variance = truth.flatten(0, 1).var(dim=0, correction=0).mean().clamp(min=1e-12)
    return (predicted - truth[:, None]).square().mean(dim=-1) / variance


def patch_features(network: DMJD, images: Num[Tensor, "n C H W"]) -> Float[Tensor, "n D h w"]:
    """Compute the backbone's features of all tokens of whole images of 0..255, after the norm on tokens."""
    backbone: Any = network.encoder.backbone
    (features,) = backbone.forward_intermediates(
        network.normalize(images),
        indices=[token_layer(backbone)],
        norm=True,
        intermediates_only=True,
        output_fmt="NCHW",
    )
    return features.float()


def principal_colours(features: Float[Tensor, "n D h w"]) -> UInt8[Tensor, "n 3 h w"]:
    """Colour tokens by the first three principal components of all tokens' features.

    Each component is scaled so that its 2nd to 98th percentiles span 0..255. Its sign, which is arbitrary, is chosen so
    that its largest weight is positive.
    """
    tokens = features.movedim(1, -1).flatten(0, -2).cpu().double()
    tokens = tokens - tokens.mean(dim=0)
    axes = torch.linalg.eigh(tokens.mT @ tokens).eigenvectors.flip(1)[:, :3]  # eigenvalues are in ascending order
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    values = F.pad(tokens @ axes, (0, 3 - axes.shape[1]))
    low, high = values.quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    shades = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    return shades.round().byte().view(len(features), *features.shape[2:], 3).movedim(-1, 1)


def glance(network: DMJD, source: Source, numbers: Sequence[int], image_hw: tuple[int, int]) -> Glance | None:
    """Read some images of a set, skipping those that do not decode; returns None if none does."""
    middle = partial(center_crop, size=image_hw)
    read = read_batches(source, numbers, middle, batch_size=AT_A_TIME, workers=0, pin_memory=False)
    seen = [look(network, crops.float(), kept) for crops, kept in read if kept]
    return Glance(*map(torch.cat, zip(*seen, strict=True))) if seen else None


def look(network: DMJD, images: Float[Tensor, "m C H W"], numbers: Sequence[int]) -> Glance:
    """Compute the features and thumbnails of images of 0..255."""
    height, width = images.shape[2:]
    scale = min(1.0, THUMB / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    thumbs = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 255)
    pixels = F.interpolate(thumbs, (BY_PIXELS, BY_PIXELS), mode="bilinear", antialias=True).flatten(1)
    features = network.features(images.to(next(network.parameters()).device)).float().cpu()
    return Glance(torch.tensor(numbers), thumbs.round().byte(), features, pixels - pixels.mean(dim=1, keepdim=True))


def most_alike(queries: Float[Tensor, "q D"], bank: Float[Tensor, "m D"], k: int) -> Alike:
    """Find the k rows of highest cosine similarity to each query, or all rows if there are fewer."""
    similarity, rows = nearest(bank.numpy(), queries, k=k, device=torch.device("cpu"))
    return Alike(rows, similarity)
