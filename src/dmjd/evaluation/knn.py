"""k-NN classification in feature space: the quality of features without any training."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def knn_votes(
    bank: Float[Tensor, "m D"],
    bank_labels: Int[Tensor, " m"],
    queries: Float[Tensor, "n D"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    max_similarities: int = 2**28,
) -> Float[Tensor, "n classes"]:
    """Let the k nearest neighbours in cosine similarity vote, each with weight exp(similarity / temperature).

    The weighting is that of instance discrimination (Wu et al. 2018), the standard for self-supervised features.

    Args:
        bank: Features of labelled images.
        bank_labels: Their classes.
        queries: Features to classify.
        k: Number of neighbours that vote.
        temperature: In units of cosine similarity.
        num_classes: Columns of the result, if there are more classes than the labels contain.
        max_similarities: Number held in memory at a time (2**28 are 1 GiB), at least those of one query.

    Returns:
        Shares of the votes; rows sum to one.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    columns = num_classes or int(bank_labels.max()) + 1
    shares = []
    for part in queries.split(max(max_similarities // len(bank), 1)):
        similarity, neighbour = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), columns).scatter_add_(
            1, bank_labels[neighbour], (similarity / temperature).exp()
        )
        shares.append(votes / votes.sum(dim=1, keepdim=True))
    return torch.cat(shares)


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy of the neighbours' votes (`knn_votes`), 0 to 1."""
    predicted = knn_votes(bank, bank_labels, queries, k=k, temperature=temperature).argmax(dim=1)
    return float((predicted == labels).float().mean())
