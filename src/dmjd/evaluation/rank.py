"""What features are worth without labels: how many directions they use."""

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
    """Spread of features over the unit sphere: the mean deviation of their directions' coordinates, times sqrt(D).

    1 where they point everywhere alike, 0 where all point the same way: collapse (SimSiam, Chen and He 2021).
    """
    directions = F.normalize(embeddings.double(), dim=1)
    return float(directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5)
