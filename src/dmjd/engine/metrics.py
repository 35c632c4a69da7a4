"""What features are worth without training on them: k-NN, RankMe, a linear probe."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dmjd.data.images import BadImage
from dmjd.data.sources import Images
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


def knn_predict(
    bank: Float[Tensor, "m D"],
    bank_labels: Int[Tensor, " m"],
    queries: Float[Tensor, "n D"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Int[Tensor, " n"]:
    """Classify by the k nearest neighbours in cosine similarity, each with weight exp(similarity / temperature).

    The weighting is that of instance discrimination (Wu et al. 2018), usual for self-supervised features. At most
    `chunk` * m similarities exist at a time.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    num_classes = int(bank_labels.max()) + 1
    predicted = []
    for part in queries.split(chunk):
        similarity, neighbour = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), num_classes)
        votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of queries that `knn_predict` classifies right."""
    predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature)
    return float((predicted == labels).float().mean())


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression (scikit-learn, L2 penalty C = 1) on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-3))
    probe.fit(bank.double().numpy(), bank_labels.numpy())
    return float(np.mean(probe.predict(queries.double().numpy()) == labels.numpy()))


def rankme(embeddings: Float[Tensor, "n D"]) -> float:
    """Effective rank of features (RankMe, Garrido et al. 2023): exp of the entropy of their singular values.

    Between 1 (all features on a line: collapse) and min(n, D).
    """
    singular = torch.linalg.svdvals(embeddings.double())
    share = singular / singular.sum().clamp_min(1e-12)
    return float((-(share * share.clamp_min(1e-12).log()).sum()).exp())
