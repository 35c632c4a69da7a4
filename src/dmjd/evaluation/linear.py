"""Linear classifiers on frozen features."""

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dmjd.data.labelled import label_subset

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
FITTED = 0.8  # share of the training images that a penalty is fitted on; the others choose it


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


def choose_penalty(bank: Tensor, labels: Tensor, seed: int) -> float:
    """Choose the penalty by the accuracy on a slice of the training images, stratified, that is not fitted.

    The larger of two that do equally well; 1 where no image can be spared.
    """
    fitted = torch.zeros(len(labels), dtype=torch.bool)
    fitted[label_subset(labels.tolist(), seed, fraction=FITTED)] = True
    if fitted.all():
        return 1.0
    num_classes, right = int(labels.max()) + 1, []
    for penalty in tqdm(PENALTIES, desc="penalties", leave=False, disable=None):
        scores = logistic_regression(
            bank[fitted], labels[fitted], bank[~fitted], num_classes=num_classes, penalty=penalty
        )
        right.append(int((scores.argmax(dim=1) == labels[~fitted]).sum()))
    return max(zip(right, PENALTIES, strict=True))[1]
