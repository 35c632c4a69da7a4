"""Measures that need no labels: effective rank and spread of features, and explained variance of predictions."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def rankme(embeddings: Float[Tensor, "n D"]) -> float:
    """Effective rank of features (RankMe, Garrido et al. 2023): exp of the entropy of their singular values.

    Between 1 (all features on a line: collapse) and min(n, D).
    """
    singular = torch.linalg.svdvals(embeddings.double())
    share = singular / singular.sum().clamp_min(1e-12)
    return float((-(share * share.clamp_min(1e-12).log()).sum()).exp())


def feature_std(embeddings: Float[Tensor, "n D"]) -> float:
    """Spread of features over the unit sphere: the mean standard deviation of normalised coordinates, times sqrt(D).

    1 for directions spread evenly, 0 if all are the same: collapse (SimSiam, Chen and He 2021).
    """
    directions = F.normalize(embeddings.double(), dim=1)
    return float(directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5)


class Explained:
    """Share of the variance of targets that predictions explain (R squared), accumulated over batches of tokens.

    1 for perfect predictions, 0 if the mean target of all tokens would be as good or all targets are the same, below 0
    if the mean would be better. Dimensions of the target are weighted by their variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = torch.zeros(())
        self.missed = 0.0

    def add(self, predicted: Float[Tensor, "N M T"], target: Float[Tensor, "N M T"]) -> None:
        """Add a batch."""
        predicted, target = predicted.cpu().double(), target.cpu().double()  # MPS has no float64
        self.missed += float((predicted - target).square().sum())
        target = target.flatten(0, 1)
        self.count += len(target)
        self.sum, self.squares = self.sum + target.sum(0), self.squares + target.square().sum(0)

    @property
    def share(self) -> float:
        """The share explained so far."""
        mean = self.sum / max(self.count, 1)
        variance = float((self.squares - self.count * mean.square()).clamp_min(0).sum())
        alike = variance <= 1e-9 * float(self.squares.sum())  # all that remains is rounding error
        return 0.0 if alike else 1 - self.missed / variance
