"""Object detection: torchvision's Faster R-CNN or Mask R-CNN on the maps of any backbone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from dmjd.backbones.pyramid import Pyramid
from dmjd.engine.device import float32

BOX_SIDE = 7  # RoIAlign resamples the features of a box to 7 x 7, as in torchvision


class PyramidFPN(nn.Module):
    """A feature pyramid network (Lin et al. 2017) on the maps of a backbone, as torchvision's detectors expect it."""

    def __init__(self, pyramid: Pyramid, width: int):
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, extra_blocks=LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        """Compute maps of strides 4, 8, 16, 32 and 64, named 0, 1, 2, 3 and pool."""
        return self.fpn(dict(zip("0123", self.pyramid(images), strict=True)))


class FitIntoCrop(GeneralizedRCNNTransform):
    """torchvision's resizing of images, and of what is found in them.

    torchvision fails on very long images, because it rounds the shorter side down to 0 pixels; and it holds the masks
    of all objects in the size of the image as floats, twice: 10 GB for a photograph of 12 million pixels.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Stretch the shorter side so that a pixel of it remains; boxes are scaled back for each side separately."""
        least = max(image.shape[-2:]) // self.max_size + 1
        if min(image.shape[-2:]) < least:
            image = F.interpolate(image[None], [max(side, least) for side in image.shape[-2:]], mode="bilinear")[0]
        resized: tuple[Tensor, dict[str, Tensor] | None] = super().resize(image, target)
        return resized

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Bring boxes and masks to the size of their image; masks are True where an object is likelier than not."""
        small = [found.pop("masks", None) for found in result]
        results: list[dict[str, Tensor]] = super().postprocess(result, image_shapes, original_image_sizes)
        for found, masks, size in zip(results, small, original_image_sizes, strict=False):  # in training, none is found
            if masks is not None:
                found["masks"] = masks.new_empty((len(masks), 1, *size), dtype=torch.bool)
                for place, box in enumerate(found["boxes"]):
                    pasted = paste_masks_in_image(masks[place : place + 1], box[None], size)
                    found["masks"][place] = pasted[0] >= 0.5
        return results


def create_detector(
    pyramid: Pyramid,
    num_classes: int,
    *,
    masks: bool,
    crop_hw: tuple[int, int],
    statistics: tuple[Sequence[float], Sequence[float]],
    fpn_channels: int,
    head_channels: int,
) -> nn.Module:
    """Build torchvision's detector: a list of images (C, H, W) of 0..1 in, losses or boxes out.

    Args:
        pyramid: Computes the maps.
        num_classes: Number of classes, without the background.
        masks: Whether to add a mask head.
        crop_hw: Height and width of training images; others are resized to fit into them in either orientation.
        statistics: Mean and standard deviation of the channels.
        fpn_channels: Width of the feature pyramid network.
        head_channels: Width of the box head.
    """
    options: dict[str, Any] = {
        "box_head": TwoMLPHead(fpn_channels * BOX_SIDE**2, head_channels),
        "box_predictor": FastRCNNPredictor(head_channels, num_classes + 1),  # and the background
    }
    if masks:
        options["mask_head"] = MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, 1)
        options["mask_predictor"] = MaskRCNNPredictor(fpn_channels, fpn_channels, num_classes + 1)
    model: Any = (MaskRCNN if masks else FasterRCNN)(PyramidFPN(pyramid, fpn_channels), **options)
    model.transform = FitIntoCrop(
        min(crop_hw),
        max(crop_hw),
        *map(list, statistics),
        size_divisible=64,  # the coarsest map's stride
        _skip_resize=True,  # in training, since crops already have their size
    )
    # Boxes are computed in the dtype of these outputs, and 8 bits of bf16 are too few for coordinates.
    for part in (model.backbone, model.rpn.head, model.roi_heads.box_predictor):
        part.register_forward_hook(lambda module, given, found: float32(found))
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        if pooler is not None:  # by default it infers strides from the first image, wrongly for some sizes
            pooler.scales = [1 / stride for stride in pyramid.strides]
            pooler.map_levels = initLevelMapper(*(round(math.log2(pyramid.strides[end])) for end in (0, -1)))
    return model
