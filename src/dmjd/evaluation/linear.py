"""Linear classifiers on frozen features."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

PENALTIES = (10000.0, 1000.0, 100.0, 10.0, 1.0, 0.1, 0.01)
NUM_FOLDS = 5
NEVER = -1e4  # logit of a class that was not fitted


def fit_logistic(bank: Tensor, bank_labels: Tensor, *, penalty: float = 1.0) -> Any:
    """Fit a logistic regression on standardised features: a pipeline of scikit-learn.

    Args:
        bank: Features of labelled images.
        bank_labels: Their classes, at least two.
        penalty: Weight of half the squared norm relative to the sum of the losses (scikit-learn's 1 / C).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000, tol=1e-3))
    return probe.fit(bank.double().numpy(), bank_labels.numpy())


def class_probabilities(probe: Any, queries: Tensor, num_classes: int) -> Float[Tensor, "n classes"]:
    """Compute class probabilities; 0 for classes that the regression was not fitted on."""
    found = torch.from_numpy(probe.predict_proba(queries.double().numpy()))
    return torch.zeros(len(queries), num_classes).index_copy_(1, torch.from_numpy(probe.classes_), found.float())


def logistic_regression(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, penalty: float = 1.0
) -> Float[Tensor, "n classes"]:
    """Fit a logistic regression on standardised features and return the class probabilities of `queries`."""
    return class_probabilities(fit_logistic(bank, bank_labels, penalty=penalty), queries, num_classes)


def logistic_head(probe: Any, num_classes: int) -> nn.Linear:
    """Convert a logistic regression to a linear layer on unstandardised features, whose softmax gives its output."""
    scaler, regression = probe[0], probe[-1]
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if len(weight) == 1:  # for two classes, scikit-learn has one logit, of the second against the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = nn.Linear(weight.shape[1], num_classes, dtype=torch.float64)
    fitted = torch.from_numpy(regression.classes_)
    with torch.no_grad():
        head.weight.zero_().index_copy_(0, fitted, weight)
        head.bias.fill_(NEVER).index_copy_(0, fitted, bias)
    return unstandardised(head, torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_))


@torch.no_grad()
def unstandardised(head: nn.Linear, mean: Float[Tensor, " D"], scale: Float[Tensor, " D"]) -> nn.Linear:
    """Fold standardisation into a layer: the result applied to features equals `head` on (features - mean) / scale."""
    found = nn.Linear(head.in_features, head.out_features)
    weight = head.weight.cpu().double() / scale.cpu()
    found.weight.copy_(weight)
    found.bias.copy_(head.bias.cpu().double() - weight @ mean.cpu().double())
    return found


def normalized_head(norm: Any, head: nn.Linear) -> nn.Linear:
    """Fold a BatchNorm without affine, in evaluation mode, into the layer `head` that follows it."""
    return unstandardised(head, norm.running_mean, (norm.running_var + norm.eps).sqrt())


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression with penalty 1."""
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    shares = logistic_regression(bank, bank_labels, queries, num_classes=num_classes)
    return float((shares.argmax(dim=1) == labels).float().mean())


def choose_penalty(bank: Tensor, labels: Tensor, seed: int) -> float:
    """Choose the penalty with the smallest log-loss in five-fold stratified cross-validation.

    Held-out images of a class that is missing from the other folds do not count; if none counts, the penalty is 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    fold = torch.empty_like(by_class)
    fold[by_class] = torch.arange(len(labels)) % NUM_FOLDS
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for number in tqdm(range(NUM_FOLDS), desc="folds", leave=False, disable=None):
        fitted = fold != number
        if fitted.all() or len(labels[fitted].unique()) < 2:
            continue
        scaler = StandardScaler().fit(bank[fitted].double().numpy())
        known, unseen = (scaler.transform(bank[part].double().numpy()) for part in (fitted, ~fitted))
        probe = LogisticRegression(max_iter=1000, tol=1e-3, warm_start=True)  # each fit starts from the previous one
        for place, penalty in enumerate(PENALTIES):
            probe.set_params(C=1 / penalty).fit(known, labels[fitted].numpy())
            logits = torch.from_numpy(probe.decision_function(unseen))
            if logits.ndim == 1:  # for two classes, scikit-learn has one logit, of the second against the first
                logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
            log_shares = torch.zeros(len(unseen), int(labels.max()) + 1, dtype=torch.float64)
            log_shares[:, probe.classes_] = logits.log_softmax(dim=1)  # scikit-learn's may be the logarithm of 0
            losses[place] -= log_shares[torch.arange(len(unseen)), labels[~fitted]].sum()  # 0 for classes not fitted
    return PENALTIES[int(losses.argmin())] if losses.any() else 1.0
