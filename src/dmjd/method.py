"""Disjoint masking with joint distillation (DMJD, arXiv 2301.00230) on one page.

ConcatTarget views of an image hide disjoint tokens (`masking`). One encoder reads what is visible of every view. The masked
branch predicts the targets of hidden tokens, the visible branch those of visible tokens. Plain MAE, ConvMAE, SimMIM and
MaskFeat are the same page with one view and no visible branch.

Shape letters, here and everywhere:
    B images, V views, N = B*V rows (image-major), C H W an image;
    L tokens of an image, of which a view shows K and hides M (L = K + M), P prefix (class, register) tokens;
    D width of the encoder, E of the decoder, T of the target.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from dmjd.backbones import Encoder
from dmjd.heads import Decoder, LinearHead, Projector
from dmjd.losses import LossName, regression_loss
from dmjd.masking import gather_tokens, token_ids
from dmjd.targets import EmaTeacher, Target


class Predictions(NamedTuple):
    """What the two branches say, beside what is true; tokens in the order of `masking.TokenIds`."""

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
        target: Any target of `dmjd.targets`; a module if it has weights or buffers. Of both branches, unless
            `visible_target` is given.
        decoder: The masked branch.
        projector: The visible branch; None for masked modelling alone.
        visible_weight: Weight theta of the visible branch (equation of the total loss; official: 1).
        visible_target: Target of the visible branch, where it shall have one of its own.
        masked_loss: Loss of the masked branch.
        visible_loss: Loss of the visible branch.
        beta: Where smooth-L1 turns linear.
        mean: Mean of every channel of the images, for values in 0..1.
        std: Standard deviation of every channel, for values in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
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
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        self.encoder, self.target, self.decoder, self.projector = encoder, target, decoder, projector
        self.visible_target = visible_target
        self.visible_weight, self.masked_loss, self.visible_loss = visible_weight, masked_loss, visible_loss
        self.beta = beta
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(
        self,
        images: Num[Tensor, "B C H W"],
        masked: Bool[Tensor, "B V L"],
        visible_order: Int[Tensor, "N K"] | None = None,
    ) -> Losses:
        """Compute the losses of a batch.

        Args:
            images: Pixels of 0..255, uint8 or float, where the model is.
            masked: True = hidden; best on the CPU (see `masking.token_ids`).
            visible_order: For the ablation only. The official program compares predictions in this order of the visible
                tokens with targets in raster order.

        Raises:
            ValueError: If the views hide different numbers of tokens.
        """
        said = self.predict(images, masked)
        dims, own = (getattr(target, "dims", ()) for target in (self.target, self.visible_target))
        masked_loss = regression_loss(said.masked, said.masked_target, self.masked_loss, beta=self.beta, dims=dims)
        if said.visible is None or said.visible_target is None:
            return Losses(masked_loss, masked_loss, torch.zeros_like(masked_loss))
        visible_NKT = said.visible
        if visible_order is not None:
            places_NK = torch.searchsorted(token_ids(masked).visible.contiguous(), visible_order).to(images.device)
            visible_NKT = gather_tokens(visible_NKT, places_NK)
        dims = dims if self.visible_target is None else own
        visible_loss = regression_loss(visible_NKT, said.visible_target, self.visible_loss, beta=self.beta, dims=dims)
        return Losses(masked_loss + self.visible_weight * visible_loss, masked_loss, visible_loss)

    def normalize(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Bring pixels of 0..255 to what the encoder takes."""
        return (images / 255 - self.mean) / self.std

    def follow(self, progress: float) -> None:
        """Let targets that are a running mean of the backbone follow it; `progress` is the share of the run done."""
        for module in self.modules():
            if isinstance(module, EmaTeacher):
                module.follow(self.encoder.backbone, progress)

    def predict(self, images: Num[Tensor, "B C H W"], masked: Bool[Tensor, "B V L"]) -> Predictions:
        """Run both branches; arguments as in `forward`."""
        tokens = token_ids(masked, images.device)
        with torch.no_grad():  # once per image, for all its views
            target_BLT = self.target(images)
            visible_BLT = target_BLT if self.visible_target is None else self.visible_target(images)
        latents = self.encoder(self.normalize(images), tokens)
        masked_NMT = self.decoder(latents, tokens)
        masked_target = gather_tokens(target_BLT, tokens.hidden)
        if self.projector is None:
            return Predictions(masked_NMT, masked_target, None, None)
        # Predictions and targets are aligned token by token; the official program compares different tokens here.
        return Predictions(
            masked_NMT, masked_target, self.projector(latents), gather_tokens(visible_BLT, tokens.visible)
        )
