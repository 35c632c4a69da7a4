"""The exponential moving average of the student's own weights as the teacher (data2vec, Baevski et al. 2022)."""

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dmjd.backbones.feature_maps import FeatureMaps
from dmjd.targets.protocol import TargetRequest, register_target
from dmjd.targets.teacher import FeatureTarget


class EmaTeacher(FeatureTarget):
    """Features of the moving average, which is saved in checkpoints but not trained: `update` moves it.

    Args:
        maps: Chosen layers of a copy of the student; data2vec takes the top ones.
        grid: Rows and columns of the student's tokens.
        decay: Decay of the average at the start and at the end of a run: the share that a step keeps.
    """

    caption = "Colours are the first three principal components of the features of the backbone's own moving average."

    def __init__(self, maps: FeatureMaps, grid: tuple[int, int], *, decay: tuple[float, float] = (0.996, 0.9999)):
        super().__init__(maps, grid)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module, progress: float) -> None:
        """Move towards the student; the decay changes linearly with `progress`, which goes from 0 to 1 over the run."""
        decay = self.decay[0] + (self.decay[1] - self.decay[0]) * progress
        network = self.maps.network
        move = get_ema_multi_avg_fn(decay)
        move([*network.parameters()], [*student.parameters()], None)
        for mean, value in zip(network.buffers(), student.buffers(), strict=True):
            mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)


@register_target("ema")
def build_ema(request: TargetRequest) -> EmaTeacher:
    """Build the moving average of an encoder's backbone, which starts as a copy of it."""
    request.refuse_argument()
    mean, std = request.normalize.statistics
    maps = FeatureMaps(
        deepcopy(request.encoder.backbone),
        layers=request.option("teacher", "layers", None),
        in_chans=request.in_chans,
        takes={"input_size": (request.in_chans, *request.image_hw), "mean": mean, "std": std},
    )
    return EmaTeacher(maps, request.encoder.grid, decay=tuple(request.option("teacher", "decay", (0.996, 0.9999))))
