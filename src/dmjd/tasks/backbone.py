"""What every verb that starts from a backbone does first: load it, find its images, compute features."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmjd.backbones.files import open_backbone
from dmjd.config import Embed, Knn
from dmjd.data.sources import Images
from dmjd.data.transforms import center_crop
from dmjd.engine.devices import choose_device, choose_precision
from dmjd.engine.metrics import features
from dmjd.errors import ConfigError


class Extractor:
    """Computes a backbone's pooled features of images as its `pretrained_cfg` wants them: size, mean and deviation."""

    def __init__(self, settings: Knn | Embed):
        self.settings = settings
        self.device = choose_device(settings.device)
        self.autocast = choose_precision(settings.precision, self.device)
        self.model: nn.Module = open_backbone(settings.backbone).to(self.device)
        wanted: Any = self.model.pretrained_cfg
        self.in_chans, *size = wanted["input_size"]
        if self.in_chans not in (1, 3):
            raise ConfigError(f"the backbone takes {self.in_chans} channels; {settings.backbone}; images have 1 or 3")
        self.image_hw: tuple[int, int] = (size[0], size[1])
        self.mean, self.std = (torch.tensor(wanted[key], device=self.device)[:, None, None] for key in ("mean", "std"))

    def pooled(self, images: Tensor) -> Tensor:
        """Compute features (B, D) of images (B, C, H, W) of 0..255."""
        with self.autocast():
            return self.model((images / 255 - self.mean) / self.std)

    def features(self, images: Images) -> tuple[Tensor, list[int]]:
        """Compute features of all images that decode, and say which these are."""
        return features(
            self.pooled,
            images,
            range(len(images)),
            transform=partial(center_crop, size=self.image_hw),
            device=self.device,
            batch_size=self.settings.batch_size,
            progress=True,
        )
