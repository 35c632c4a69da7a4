"""The ConvMAE hybrid: two stages of convolutions, then a transformer, and no work on hidden tokens.

A token covers 4 x 4 positions of stage 1 and 2 x 2 of stage 2. Every patch embedding is aligned with the tokens, so
pointwise operations (norms, 1x1 convolutions, MLPs, embeddings) run for visible tokens only, as rows of a matrix. Only
the depthwise convolution (`depthwise`) mixes positions: it sees a map with zeros at hidden positions.

Rows are nested: token by token, within it the 2 x 2 positions of stage 2, within each of those 2 x 2 of stage 1. A
patch embedding then merges consecutive rows, which is a free reshape. S is the number of rows of a stage.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dmjd.backbones import Architecture, Latents, encodes, register_encoder
from dmjd.backbones.blocks import NORM_EPS, init_weights, transformer_blocks
from dmjd.backbones.depthwise import Layout, depthwise, layout_of
from dmjd.backbones.positions import resample_positions, sincos_positions
from dmjd.masking import TokenIds, gather_tokens

CONV_NORM_EPS = 1e-5  # of the LayerNorms of stages 1 and 2

# widths and depths of the three stages, heads of the third
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dims": (48, 96, 192), "depths": (1, 1, 6), "num_heads": 3},
    "small": {"embed_dims": (96, 192, 384), "depths": (2, 2, 11), "num_heads": 6},
    "base": {"embed_dims": (256, 384, 768), "depths": (2, 2, 11), "num_heads": 12},
    "large": {"embed_dims": (384, 768, 1024), "depths": (2, 2, 23), "num_heads": 16},
}


class Pointwise(nn.Conv2d):
    """A 1x1 convolution (its official shape) on rows."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 1)

    def forward(self, rows: Float[Tensor, "S D"]) -> Float[Tensor, "S E"]:
        """Multiply every row by the same matrix."""
        return F.linear(rows, self.weight.flatten(1), self.bias)


class PatchMerge(nn.Conv2d):
    """A side x side convolution of stride side (its official shape) on nested rows, merging side^2 rows into one."""

    def __init__(self, in_dim: int, out_dim: int, side: int):
        super().__init__(in_dim, out_dim, side, stride=side)

    def forward(self, rows: Float[Tensor, "S D"]) -> Float[Tensor, "R E"]:
        """Concatenate each side^2 consecutive rows, and multiply them by the weights in nested order."""
        weight = self.weight.permute(0, 2, 3, 1)  # E, row, column, D
        if self.kernel_size[0] == 4:
            weight = weight.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3)
        return F.linear(rows.reshape(-1, weight[0].numel()), weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """A convolution without overlap, LayerNorm, GELU."""

    def __init__(self, proj: nn.Conv2d):
        super().__init__()
        self.proj = proj
        self.norm = nn.LayerNorm(proj.out_channels, eps=CONV_NORM_EPS)

    def forward(self, x: Tensor) -> Float[Tensor, "S D"]:
        """Embed nested rows, or images (B, C, H, W) into raster rows."""
        x = self.proj(x)
        return F.gelu(self.norm(x.permute(0, 2, 3, 1).flatten(0, 2) if x.ndim == 4 else x))


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1, self.fc2 = Pointwise(dim, hidden_dim), Pointwise(hidden_dim, dim)

    def forward(self, rows: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        """Transform every row independently."""
        return self.fc2(F.gelu(self.fc1(rows)))


class ConvBlock(nn.Module):
    """x + conv2(attn(conv1(norm1(x)))), then x + mlp(norm2(x)); `attn`, officially so named, is depthwise 5x5."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=CONV_NORM_EPS)
        self.conv1 = Pointwise(dim, dim)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = Pointwise(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=CONV_NORM_EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, rows: Float[Tensor, "S D"], layout: Layout) -> Float[Tensor, "S D"]:
        """Transform the rows of a stage; map positions without a row count as zero."""
        inner = depthwise(self.conv1(self.norm1(rows)), self.attn.weight, self.attn.bias, layout)
        rows = rows + self.drop(self.conv2(inner), layout)
        return rows + self.drop(self.mlp(self.norm2(rows)), layout)

    def drop(self, rows: Float[Tensor, "S D"], layout: Layout) -> Float[Tensor, "S D"]:
        """Drop the rows of whole maps at random (stochastic depth), in training."""
        return self.drop_path(rows.view(layout.num_maps, -1, rows.shape[1])).view_as(rows)


def token_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of tokens of an image; raises ValueError if it does not consist of whole tokens."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if patch_size not in (4, 8, 16) or height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} px does not consist of tokens of {patch_size} px (16, 8, 4)")
    return height // patch_size, width // patch_size


class ConvViT(nn.Module):
    """The hybrid as an image classifier or feature extractor, following timm's conventions.

    Args:
        img_size: Side, or height and width, in pixels; other sizes interpolate the positions.
        patch_size: Token stride in pixels: 16 (official), 8 or 4; the first convolution has a quarter of it.
        in_chans: Channels of an image.
        num_classes: Number of classes; 0 omits `head`, so that features are the normalised mean of tokens.
        embed_dims: Widths of the three stages.
        depths: Blocks of the three stages.
        num_heads: Heads of stage 3.
        mlp_ratios: MLP width relative to the width of each stage: DMJD's 8, 8, 4 or ConvMAE's 4, 4, 4.
        global_pool: `avg`, or the empty string for a map of tokens (B, D, h, w), each normalised and classified.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0 at the first one.
        drop_rate: Dropout before `head`.
        fc_norm: Give the norm weights even without classes, to keep those that were trained with a head.
    """

    def __init__(  # 12 parameters: timm's own, as its `create_model` passes them
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (256, 384, 768),
        depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0),
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        fc_norm: bool = False,
    ):
        super().__init__()
        first, second, third = embed_dims
        mlp1, mlp2, mlp3 = map(float, mlp_ratios)
        self.patch_size, self.global_pool = patch_size, global_pool
        self.grid = token_grid(img_size, patch_size)
        self.num_features = self.head_hidden_size = self.embed_dim = third
        self.patch_embed1 = PatchEmbed(nn.Conv2d(in_chans, first, patch_size // 4, stride=patch_size // 4))
        self.patch_embed2 = PatchEmbed(PatchMerge(first, second, 2))
        self.patch_embed3 = PatchEmbed(PatchMerge(second, third, 2))
        self.patch_embed4 = nn.Linear(third, third)
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, third))
        rates = iter(drop_path_rate * block / max(sum(depths) - 1, 1) for block in range(sum(depths)))
        self.blocks1 = nn.ModuleList(ConvBlock(first, mlp1, next(rates)) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(second, mlp2, next(rates)) for _ in range(depths[1]))
        self.blocks3 = transformer_blocks(third, depths[2], num_heads, mlp3, drop_path=rates)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size // 4 * 2**level, "module": module}
            for level, (dim, module) in enumerate(
                [(first, "blocks1"), (second, "blocks2"), (third, "blocks3"), (third, "pool")]
            )
        ]
        self.fc_norm = nn.LayerNorm(third, eps=NORM_EPS, elementwise_affine=fc_norm)
        self.head_drop = nn.Dropout(drop_rate)
        self.grad_checkpointing = False
        self.reset_classifier(num_classes, global_pool)
        # As in the official program, all other convolutions keep torch's default, uniform within 1 / sqrt(fan_in).
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.data.view(third, -1))
        for part in (self.patch_embed4, self.blocks3, self.head):
            part.apply(init_weights)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes remove it. The norm is kept, and gets weights with its first head."""
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool {global_pool!r}: a ConvViT has no other pooling than 'avg' or none, ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes and not self.fc_norm.elementwise_affine:
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS).to(self.pos_embed)
        self.head = nn.Linear(self.embed_dim, num_classes).to(self.pos_embed) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Interpolate the position embeddings permanently to another image size, see `img_size`."""
        grid = token_grid(img_size, self.patch_size)
        positions = resample_positions(self.pos_embed.detach(), self.grid, grid)
        self.pos_embed = nn.Parameter(positions, self.pos_embed.requires_grad)
        self.grid = grid
        update_model_input_size(self, img_size)  # for what timm saves

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the input of every block, and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the weights without weight decay."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for timm's layer decay: 0 before the transformer, i + 1 for block i, then the rest."""
        return {
            "stem": r"^pos_embed|patch_embed|blocks1|blocks2",
            "blocks": r"^blocks3\.(\d+)",
        }

    def stages(
        self, images: Float[Tensor, "B C H W"], tokens: Int[Tensor, "N K"]
    ) -> tuple[Float[Tensor, "R D1"], Float[Tensor, "S D2"], Float[Tensor, "N K D"]]:
        """Run all three stages on some tokens of V = N / B views of every image; other tokens have no influence.

        Returns:
            The nested rows of stage 1 and of stage 2, and the tokens of stage 3 in the order of `tokens`.

        Raises:
            ValueError: If an image does not consist of whole tokens.
        """
        grid = token_grid(images.shape[-2:], self.patch_size)
        num_tokens = grid[0] * grid[1]
        num_rows, batch_size = tokens.shape[0], images.shape[0]
        layout1 = layout_of(tokens, grid, 4).for_its_device()
        layout2 = layout_of(tokens, grid, 2).for_its_device()
        embedded = self.patch_embed1(images)  # once per image, in raster order
        size1 = layout1.height * layout1.width
        view_N = torch.arange(num_rows, device=tokens.device)
        shift_N = (view_N // (num_rows // batch_size) - view_N) * size1  # from places in N maps to places in B maps
        places = (layout1.places.view(num_rows, -1) + shift_N[:, None]).flatten()
        rows1 = embedded.index_select(0, places)
        for block in self.blocks1:
            rows1 = self._run(block, rows1, layout1)
        rows2 = self.patch_embed2(rows1)
        for block in self.blocks2:
            rows2 = self._run(block, rows2, layout2)
        position = resample_positions(self.pos_embed, self.grid, grid)
        x = self.patch_embed4(self.patch_embed3(rows2)).view(num_rows, -1, self.embed_dim)
        x = x + gather_tokens(position.expand(num_rows, num_tokens, -1), tokens)
        for block in self.blocks3:
            x = self._run(block, x)
        return rows1, rows2, x

    def _run(self, block: nn.Module, *given: Any) -> Any:
        again = self.grad_checkpointing and self.training
        return checkpoint(block, *given, use_reentrant=False) if again else block(*given)

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Compute the map of stage 3."""
        (features,) = self.forward_intermediates(images, indices=[2], intermediates_only=True)
        return features

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute maps of strides 4, 8, 16 and 32 (for tokens of 16 px), the last by pooling; arguments as in timm.

        `norm` and `stop_early` have no effect: the norm comes after pooling, and all stages run in one pass.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: the maps of a ConvViT are NCHW")
        wanted, _ = feature_take_indices(4, indices)
        grid = token_grid(x.shape[-2:], self.patch_size)
        tokens = torch.arange(grid[0] * grid[1], device=x.device).expand(x.shape[0], -1)
        rows1, rows2, latent = self.stages(x, tokens)
        last = latent.transpose(1, 2).unflatten(2, grid)
        maps = [
            layout_of(tokens, grid, 4).to_map(rows1),
            layout_of(tokens, grid, 2).to_map(rows2),
            last,
            F.max_pool2d(last, 1, stride=2) if 3 in wanted else last,
        ]
        found = [maps[index] for index in sorted({*wanted})]
        return found if intermediates_only else (last, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove norm and head, which no map needs (`features_only=True`); the stages run in one pass, so all stay."""
        if prune_head:
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS, elementwise_affine=False)
            self.reset_classifier(0, "")
        return [*feature_take_indices(4, indices)[0]]

    def forward_head(self, x: Float[Tensor, "B D h w"], pre_logits: bool = False) -> Tensor:
        """Pool a map over its tokens, normalise and, unless `pre_logits`, classify; without pooling, token by token."""
        pooled = self.fc_norm(x.mean(dim=(2, 3)) if self.global_pool else x.movedim(1, -1))
        found = pooled if pre_logits else self.head(self.head_drop(pooled))
        return found if self.global_pool else found.movedim(-1, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Tensor:
        """Classify, or compute pooled features if there is no head."""
        return self.forward_head(self.forward_features(images))


@encodes(ConvViT)
class ConvViTEncoder(nn.Module):
    """The hybrid in pre-training: stages 1 and 2 are added to the transformer's output before the last norm.

    This freezes the backbone's position embeddings; a backbone loaded for another task trains them.
    """

    def __init__(self, backbone: ConvViT, architecture: Architecture | None = None):
        super().__init__()
        self.backbone, self.architecture = backbone, architecture
        self.embed_dim, self.grid, self.patch_size = backbone.embed_dim, backbone.grid, backbone.patch_size
        first, second = (info["num_chs"] for info in backbone.feature_info[:2])
        self.stage1_output_decode = PatchMerge(first, self.embed_dim, 4)
        self.stage2_output_decode = PatchMerge(second, self.embed_dim, 2)
        self.norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS)
        backbone.pos_embed.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B C H W"], tokens: TokenIds) -> Latents:
        """Encode the visible tokens of every view."""
        rows1, rows2, x = self.backbone.stages(images, tokens.visible)
        stages = self.stage1_output_decode(rows1) + self.stage2_output_decode(rows2)
        visible_NKD = self.norm(x + stages.view_as(x))
        return Latents(visible_NKD[:, :0], visible_NKD, None)


@register_encoder("convvit")
def create_convvit(
    size: str = "base",
    *,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    conv_mlp_ratio: float = 8.0,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
) -> ConvViTEncoder:
    """Create an untrained hybrid with fixed sine-cosine position embeddings and ConvMAE's initialisation.

    Args:
        size: One of `SIZES`.
        image_size: Side, or height and width, in pixels; multiples of `patch_size`.
        patch_size: Token stride in pixels: 16, 8 or 4.
        in_chans: Channels of an image.
        conv_mlp_ratio: MLP width relative to the width of stages 1 and 2: DMJD's 8 or ConvMAE's 4.
        embed_dim: Width of stage 3 instead of the size's; stages 1 and 2 have a quarter and a half of it.
        depth: Blocks of stage 3 instead of the size's.
        num_heads: Heads of stage 3 instead of the size's.

    Raises:
        ValueError: If the image does not consist of whole tokens or the size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"there is no ConvViT of size {size!r}; choose one of {', '.join(SIZES)}")
    shape = SIZES[size]
    arguments: dict[str, Any] = {
        "img_size": (image_size, image_size) if isinstance(image_size, int) else image_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": 0,
        "embed_dims": (embed_dim // 4, embed_dim // 2, embed_dim) if embed_dim else shape["embed_dims"],
        "depths": (*shape["depths"][:2], depth or shape["depths"][2]),
        "num_heads": num_heads or shape["num_heads"],
        "mlp_ratios": (conv_mlp_ratio, conv_mlp_ratio, 4.0),
    }
    name = f"convvit_{size}"
    try:
        return ConvViTEncoder(timm.create_model(name, **arguments), (name, arguments))
    except AssertionError as error:  # a width that the number of heads does not divide
        raise ValueError(f"ConvViT {size}: {error}") from None


default_cfgs = generate_default_cfgs(
    {
        f"convvit_{size}": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed1.proj",
            "classifier": "head",
        }
        for size in SIZES
    }
)


def at_its_size(weights: dict[str, Tensor], model: ConvViT) -> dict[str, Tensor]:
    """Interpolate the positions of weights to a model's size; their own is the input size in its `pretrained_cfg`."""
    config: Any = model.pretrained_cfg
    before, positions = token_grid(config["input_size"][1:], model.patch_size), weights["pos_embed"]
    if positions.shape[1] != before[0] * before[1]:  # the size there is not that of these weights
        return weights
    return {**weights, "pos_embed": resample_positions(positions, before, model.grid)}


def _create(size: str, pretrained: bool, **arguments: Any) -> nn.Module:
    return build_model_with_cfg(
        ConvViT,
        f"convvit_{size}",
        pretrained,
        pretrained_filter_fn=at_its_size,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**SIZES[size], **arguments},
    )


@register_model
def convvit_tiny(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Hybrid of widths 48, 96, 192: for 2 cores."""
    return _create("tiny", pretrained, **arguments)


@register_model
def convvit_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Hybrid of widths 96, 192, 384: for one small GPU."""
    return _create("small", pretrained, **arguments)


@register_model
def convvit_base(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Official base hybrid."""
    return _create("base", pretrained, **arguments)


@register_model
def convvit_large(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Official large hybrid."""
    return _create("large", pretrained, **arguments)
