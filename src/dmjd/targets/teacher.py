"""Features of a frozen network as the target: CLIP, DINO, any timm or transformers network, or one of dmjd's own."""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.feature_maps import FeatureMaps
from dmjd.backbones.files import open_backbone
from dmjd.backbones.huggingface import HuggingFace
from dmjd.errors import ConfigError
from dmjd.targets.protocol import TargetRequest, register_target

Compute = Callable[[Tensor], Tensor]


class FeatureTarget(nn.Module):
    """Features of a network that receives no gradients, on the student's grid, after a LayerNorm without affine.

    Several maps are each LayerNormed, resized to the grid and averaged (data2vec, section 3).

    Args:
        maps: Chosen layers of the network, which is frozen here and always in evaluation mode.
        grid: Rows and columns of the student's tokens.
    """

    backdrop: Literal["image", "target"] = "target"
    caption = "Colours are the first three principal components of a network's features."

    def __init__(self, maps: FeatureMaps, grid: tuple[int, int]):
        super().__init__()
        self.maps = maps.eval().requires_grad_(False)
        self.grid, self.dim = grid, maps.dim
        self.widths: tuple[int, ...] = (self.dim,)

    def train(self, mode: bool = True) -> "FeatureTarget":
        """Keep the network in evaluation mode: targets use no dropout and no drop path."""
        super().train(mode)
        self.maps.eval()
        return self

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        maps = self.maps(images)
        if len(maps) > 1:
            maps = [whiten(features.movedim(1, -1)).movedim(-1, 1) for features in maps]
        return whiten(torch.stack([on_grid(features, self.grid) for features in maps]).mean(dim=0))

    def picture(
        self, values: Float[Tensor, "L T"], image: UInt8[Tensor, "C H W"], truth: Float[Tensor, "n L T"]
    ) -> UInt8[Tensor, "3 H W"]:
        """Draw values in colour, by the first three principal components of the tokens `truth` of all images."""
        values, known = values.float().cpu().nan_to_num(), truth.float().cpu().flatten(0, 1).nan_to_num()
        mean = known.mean(dim=0)
        _, lengths, directions = torch.linalg.svd(known - mean, full_matrices=False)
        deviations = lengths[:3] / len(known) ** 0.5 + 1e-6
        colours = values.new_zeros(len(values), 3)
        colours[:, : len(deviations)] = (values - mean) @ directions[:3].T / deviations
        picture = ((colours / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # +- two standard deviations
        rows, columns = self.grid
        height, width = image.shape[-2] // rows, image.shape[-1] // columns
        return picture.T.unflatten(1, self.grid).repeat_interleave(height, 1).repeat_interleave(width, 2)


class Teacher(FeatureTarget):
    """A frozen network, left out of the student's checkpoints both when saving and when loading.

    Attributes:
        cache: Unless None, called with images and the function that computes missing targets; returns the targets.
    """

    def __init__(self, maps: FeatureMaps, grid: tuple[int, int]):
        super().__init__(maps, grid)
        self.cache: Callable[[Tensor, Compute], Tensor] | None = None
        self.register_state_dict_post_hook(_leave_out_maps)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_maps)  # type: ignore[no-untyped-call]

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255, or read them from the cache."""
        return super().forward(images) if self.cache is None else self.cache(images, super().forward)

    def fingerprint(self) -> str:
        """Hash all that the targets depend on except the images: grid, layers, size, precision, statistics, weights."""
        maps = self.maps
        digest = hashlib.sha256(repr((self.grid, maps.layers, maps.size, maps.bf16)).encode())
        statistics = {"mean": maps.normalize.mean, "std": maps.normalize.std}
        for name, value in {**statistics, **maps.network.state_dict()}.items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _leave_out_maps(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}maps.")]:
        del state_dict[name]


def _keep_maps(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    maps: Any = module.maps
    state_dict.update({f"{prefix}maps.{name}": value for name, value in maps.state_dict().items()})


def on_grid(features: Float[Tensor, "B T h w"], grid: tuple[int, int]) -> Float[Tensor, "B L T"]:
    """Resize a map to a grid (bilinear, antialiased) and flatten it to tokens in raster order."""
    if features.shape[-2:] != grid:
        features = F.interpolate(features, grid, mode="bilinear", antialias=True)
    return features.flatten(2).transpose(1, 2)


def whiten(tokens: Float[Tensor, "*shape T"]) -> Float[Tensor, "*shape T"]:
    """Standardise every token (LayerNorm without affine)."""
    return F.layer_norm(tokens, tokens.shape[-1:])


@register_target("timm")
def build_timm(request: TargetRequest) -> Teacher:
    """Build the teacher `timm:NAME`, with timm's weights."""
    return _frozen(open_backbone(f"timm:{request.argument}")[0], request)


@register_target("file")
def build_file(request: TargetRequest) -> Teacher:
    """Build a teacher from a backbone.safetensors."""
    return _frozen(open_backbone(request.argument)[0], request)


@register_target("hf")
def build_huggingface(request: TargetRequest) -> Teacher:
    """Build the teacher `hf:NAME`, where NAME is a name or a folder that Hugging Face transformers loads."""
    if not request.argument:
        raise ConfigError("the teacher has no name; hf:; give hf:NAME")
    return _frozen(HuggingFace(request.argument), request)


def _frozen(network: nn.Module, request: TargetRequest) -> Teacher:
    network.to(memory_format=torch.channels_last)  # makes convolutions faster
    maps = FeatureMaps(
        network,
        layers=request.option("teacher", "layers", None),
        in_chans=request.in_chans,
        bf16=request.option("teacher", "bf16", False),
    )
    return Teacher(maps, request.encoder.grid)
