"""Semantic segmentation: UPerNet on the maps of any backbone."""

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.pyramid import Pyramid
from dmjd.errors import extra

with extra("dense", "dmjd segment"):
    from segmentation_models_pytorch.base.modules import Conv2dReLU
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder


class Segmenter(nn.Module):
    """UPerNet (Xiao et al. 2018) on the maps of a backbone.

    Args:
        pyramid: Computes the maps.
        num_classes: Number of classes.
        channels: Width of UPerNet.
        auxiliary: Whether to add a second head, on the map of stride 16, for training.
    """

    def __init__(self, pyramid: Pyramid, num_classes: int, *, channels: int, auxiliary: bool):
        super().__init__()
        self.pyramid = pyramid
        # The decoder's list of widths starts with those of the image and of a map at stride 2, which are not used.
        self.decoder = UPerNetDecoder([3, 0, *pyramid.channels], encoder_depth=5, decoder_channels=channels)
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary: nn.Module | None = None
        if auxiliary:
            width = channels // 2
            self.auxiliary = nn.Sequential(
                Conv2dReLU(pyramid.channels[2], width, 3, padding=1, use_norm="batchnorm"),
                nn.Dropout2d(0.1),
                nn.Conv2d(width, num_classes, 1),
            )

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B classes H W"]]:
        """Compute logits of normalised images; in training, the auxiliary head adds a second set."""
        maps = self.pyramid(images)
        logits = [self.classifier(self.decoder([images, images, *maps]))]
        if self.training and self.auxiliary is not None:
            logits.append(self.auxiliary(maps[2]))
        return [F.interpolate(each, images.shape[-2:], mode="bilinear") for each in logits]


def pixel_loss(
    logits: Float[Tensor, "B classes H W"], labels: Int[Tensor, "B H W"], ignore_index: int
) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy over the pixels that have a class; 0 if none has, where torch's mean is NaN."""
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)
