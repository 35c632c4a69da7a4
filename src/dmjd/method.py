"""Disjoint masking with joint distillation (DMJD, arXiv 2301.00230) on one page.

Several views of an image hide disjoint sets of tokens (`masking`). One encoder reads the visible tokens of every view.
The masked branch predicts the targets of hidden tokens, the visible branch those of visible tokens. Plain MAE, ConvMAE,
SimMIM and MaskFeat are the special case of one view and no visible branch.

Shape letters, here and everywhere:
    B images, V views, N = B*V rows (image-major), C H W an image;
    L tokens of an image, of which a view shows K and hides M (L = K + M); U tokens are hidden in at least one view;
    P prefix (class, register) tokens, S tokens of any kind; D width of the encoder, E of the decoder, T of the target.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from dmjd.backbones import Encoder
from dmjd.backbones.normalize import STATISTICS, Normalize
from dmjd.heads import Decoder, LinearHead, Projector
from dmjd.losses import LossName, regression_loss
from dmjd.masking import TokenIds, gather_tokens, token_ids
from dmjd.targets import EmaTeacher, Target


class Predictions(NamedTuple):
    """Predictions of the two branches and their targets, with tokens in the order of `masking.TokenIds`."""

    masked: Float[Tensor, "N M T"]
    masked_target: Float[Tensor, "N M T"]
    visible: Float[Tensor, "N K T"] | None
    visible_target: Float[Tensor, "N K T"] | None


class Losses(NamedTuple):
    """Scalars of one batch: total = masked + visible_weight * visible."""

    total: Float[Tensor, ""]
    masked: Float[Tensor, ""]
    visible: Float[Tensor, ""]


class DMJD(nn.Module):
    """A backbone in training: encoder, target and two branches.

    Args:
        encoder: Any backbone of `dmjd.backbones`.
        target: Any target of `dmjd.targets`; a module if it has weights or buffers. Used by both branches, unless
            `visible_target` is given.
        decoder: The masked branch.
        projector: The visible branch; None for masked modelling alone.
        visible_weight: Weight theta of the visible branch (equation of the total loss; official: 1).
        visible_target: Target of the visible branch, if it differs.
        masked_loss: Loss of the masked branch.
        visible_loss: Loss of the visible branch.
        beta: Where smooth-L1 becomes linear.
        mean: Mean of every channel of the images, for values in 0..1.
        std: Standard deviation of every channel, for values in 0..1.
    """

    def __init__(  # 11 parameters: the terms of the paper's loss, each by its own name
        self,
        encoder: Encoder,
        target: Target,
        *,
        decoder: Decoder | LinearHead,
        projector: Projector | None = None,
        visible_weight: float = 1.0,
        visible_target: Target | None = None,
        masked_loss: LossName = "l2",
        visible_loss: LossName = "smooth_l1",
        beta: float = 2.0,
        mean: Sequence[float] = STATISTICS[3][0],
        std: Sequence[float] = STATISTICS[3][1],
    ):
        super().__init__()
        self.encoder, self.target, self.decoder, self.projector = encoder, target, decoder, projector
        self.visible_target = visible_target
        self.visible_weight, self.masked_loss, self.visible_loss = visible_weight, masked_loss, visible_loss
        self.beta = beta
        self.normalize = Normalize(mean, std)

    def forward(self, images: Num[Tensor, "B C H W"], masked: Bool[Tensor, "B V L"] | TokenIds) -> Losses:
        """Compute the losses of a batch.

        Args:
            images: Pixels of 0..255, uint8 or float, on the model's device.
            masked: True = hidden; or the result of `masking.token_ids`, with which torch.compile makes one graph of
                all this, since no shape depends on a mask.

        Raises:
            ValueError: If the views hide different numbers of tokens, or masks or channels do not match the images.
        """
        predictions = self.predict(images, masked)
        masked_loss = regression_loss(
            predictions.masked, predictions.masked_target, self.masked_loss, beta=self.beta, widths=self.target.widths
        )
        if predictions.visible is None or predictions.visible_target is None:
            return Losses(masked_loss, masked_loss, torch.zeros_like(masked_loss))
        visible_loss = regression_loss(
            predictions.visible,
            predictions.visible_target,
            self.visible_loss,
            beta=self.beta,
            widths=(self.visible_target or self.target).widths,
        )
        return Losses(masked_loss + self.visible_weight * visible_loss, masked_loss, visible_loss)

    def predict(self, images: Num[Tensor, "B C H W"], masked: Bool[Tensor, "B V L"] | TokenIds) -> Predictions:
        """Run both branches; arguments are those of `forward`."""
        if isinstance(masked, Tensor):
            if masked.ndim != 3 or len(masked) != len(images):
                raise ValueError(f"masks are (images, views, tokens), not {(*masked.shape,)}, for {len(images)} images")
            masked = token_ids(masked)
        tokens = TokenIds(*(ids.to(images.device) for ids in masked))
        grid = images.shape[-2] // self.encoder.patch_size, images.shape[-1] // self.encoder.patch_size
        if (count := sum(ids.shape[1] for ids in tokens)) != grid[0] * grid[1]:
            raise ValueError(f"masks of {count} tokens for images of {grid[0]} x {grid[1]}")
        with torch.no_grad():  # once per image, for all its views
            target_BLT = self.target(images)
            visible_BLT = target_BLT if self.visible_target is None else self.visible_target(images)
        latents = self.encoder(self.normalize(images), tokens)
        masked_NMT = self.decoder(latents, tokens, grid)
        masked_target_NMT = gather_tokens(target_BLT, tokens.hidden)
        if self.projector is None:
            return Predictions(masked_NMT, masked_target_NMT, None, None)
        # Predictions and targets are aligned token by token; the official program compares different tokens here.
        visible_target_NKT = gather_tokens(visible_BLT, tokens.visible)
        return Predictions(masked_NMT, masked_target_NMT, self.projector(latents), visible_target_NKT)

    def features(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Compute the backbone's pooled features of whole images of 0..255."""
        return self.encoder.backbone(self.normalize(images))

    def update_targets(self, progress: float) -> None:
        """Update targets that are a moving average of the backbone; `progress` goes from 0 to 1 over the run."""
        for module in self.modules():
            if isinstance(module, EmaTeacher):
                module.update(self.encoder.backbone, progress)
