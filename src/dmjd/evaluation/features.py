"""What features are worth without training the network: k-NN, a linear classifier, RankMe, standard deviation."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dmjd.data.decode import BadImage
from dmjd.data.source import Images
from dmjd.errors import DataError


@torch.inference_mode()
def features(
    pooled: Callable[[Tensor], Tensor],
    images: Images,
    indices: Sequence[int],
    *,
    transform: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int = 256,
    progress: bool = False,
) -> tuple[Float[Tensor, "n D"], list[int]]:
    """Compute features of some images, leaving out what does not decode.

    Args:
        pooled: From uint8 images (B, C, H, W) on the device to features (B, D).
        images: The set.
        indices: Which of its images, by number.
        transform: Brings an image to the size that `pooled` takes.
        device: Where to compute.
        batch_size: Images at a time.
        progress: Show a bar.

    Returns:
        Features on the CPU, and the numbers of their images.

    Raises:
        DataError: If none decodes.
    """
    chunks, kept = [], []
    starts = range(0, len(indices), batch_size)
    for start in tqdm(starts, desc="features", unit=" batches", leave=False, disable=None if progress else True):
        batch = []
        for index in indices[start : start + batch_size]:
            try:
                batch.append(transform(images.read(index)))
                kept.append(index)
            except BadImage:
                continue
        if batch:
            chunks.append(pooled(torch.stack(batch).to(device)).float().cpu())
    if not chunks:
        raise DataError(f"none of {len(indices)} images decodes; {images.root}; check --data")
    return torch.cat(chunks), kept


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

    The weighting is that of instance discrimination (Wu et al. 2018), usual for self-supervised features.

    Args:
        bank: Features of labelled images.
        bank_labels: Their classes.
        queries: Features to classify.
        k: Neighbours that vote.
        temperature: In units of cosine similarity.
        num_classes: Columns of the result, if more than the labels show.
        max_similarities: As many exist at a time (2**28 are 1 GiB), at least one query's.

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
    """Share of queries for whose class their neighbours vote (`knn_votes`)."""
    predicted = knn_votes(bank, bank_labels, queries, k=k, temperature=temperature).argmax(dim=1)
    return float((predicted == labels).float().mean())


def logistic_regression(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, penalty: float = 1.0
) -> Float[Tensor, "n classes"]:
    """Fit a logistic regression on standardised features and return the classes' probabilities.

    Args:
        bank: Features of labelled images.
        bank_labels: Their classes, two at least.
        queries: Features to classify.
        num_classes: Columns of the result.
        penalty: Weight of half the squared norm against the sum of the losses (scikit-learn's 1 / C).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000, tol=1e-3))
    probe.fit(bank.double().numpy(), bank_labels.numpy())
    found = torch.from_numpy(probe.predict_proba(queries.double().numpy()))
    return torch.zeros(len(queries), num_classes).index_copy_(1, torch.from_numpy(probe.classes_), found.float())


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression with penalty 1."""
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    shares = logistic_regression(bank, bank_labels, queries, num_classes=num_classes)
    return float((shares.argmax(dim=1) == labels).float().mean())


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
