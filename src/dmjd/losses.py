"""The regression losses of the two branches."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LossName = Literal["l2", "l1", "smooth_l1", "cosine"]


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Average over tokens of one minus the cosine similarity of prediction and target."""
    return torch.mean(1 - F.cosine_similarity(predicted, target, dim=-1))


# Means over all elements. Every row has the same number of tokens, so this equals the paper's mean over a token's width
# and then over all tokens of the batch.
LOSSES: dict[LossName, Callable[..., Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": cosine_loss,
}


def regression_loss(
    predicted: Float[Tensor, "N S T"],
    target: Float[Tensor, "N S T"],
    name: LossName,
    *,
    beta: float = 2.0,
    widths: Sequence[int] = (),
) -> Float[Tensor, ""]:
    """Compute the loss between predictions and targets, in float32 even if the model computes in bf16.

    Args:
        predicted: Predictions of S tokens per row.
        target: Their targets.
        name: `l2` (squared error), `l1`, `smooth_l1` or `cosine` (1 - cosine similarity).
        beta: Where smooth-L1 changes from quadratic to linear, in units of the target (official DMJD: 2).
        widths: Widths of several targets side by side, whose losses are summed; default: one target.
    """
    options = {"beta": beta} if name == "smooth_l1" else {}
    predicted, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (predicted, target))
    parts = (x.split(list(widths) or target.shape[-1], dim=-1) for x in (predicted, target))
    return torch.stack([LOSSES[name](*pair, **options) for pair in zip(*parts, strict=True)]).sum()
