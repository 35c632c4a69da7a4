"""Models from the weights of the official DMJD, ConvMAE and MAE programs, with a table of their parameter names."""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dmjd.backbones import Encoder
from dmjd.backbones.convvit import ConvViTEncoder, convvit_base
from dmjd.backbones.files import images_cfg
from dmjd.backbones.normalize import default_statistics
from dmjd.backbones.vit import create_vit
from dmjd.errors import CheckpointError, one_line
from dmjd.heads import Decoder, Projector
from dmjd.losses import LossName
from dmjd.method import DMJD
from dmjd.targets import HOG, Pixels, Target

# Official name (a pattern) -> ours. The first match counts; everything else belongs to the backbone.
NAMES = (
    (r"decoder_(embed|blocks|norm|pred|pos_embed)\b", r"decoder.\1"),
    (r"mask_token$", "decoder.mask_token"),
    (r"proj_embed\.", "projector.project."),
    (r"predictor\.0\.", "projector.predict."),
    (r"(stage[12]_output_decode)\.", r"encoder.\1."),
    (r"", "encoder.backbone."),
)
HYBRID_NORM = (r"norm\.", "encoder.norm.")  # the hybrid's last norm is not part of its backbone


def our_name(official: str, *, hybrid: bool = False) -> str:
    """Translate an official parameter name, of a hybrid or of a ViT."""
    names = (HYBRID_NORM, *NAMES) if hybrid else NAMES
    pattern, ours = next((pattern, ours) for pattern, ours in names if re.match(pattern, official))
    return re.sub(f"^{pattern}", ours, official, count=1)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors from a .safetensors file, or from a .pth without running pickled code.

    Raises:
        CheckpointError: If the file is missing, broken or pickles more than tensors.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint; {path}; check the path") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not found:
            raise CheckpointError(f"not a checkpoint; {path}; check the file") from None
        raise CheckpointError(
            f"the checkpoint pickles {found[1]} beside its tensors, which is not loaded; {path}; in a place you trust, "
            'run torch.save({"model": torch.load(FILE, weights_only=False)["model"]}, NEW) and load NEW'
        ) from None
    except Exception as error:  # a broken pickle may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"[:200]
        raise CheckpointError(f"not a checkpoint ({reason}); {path}; check the file") from None
    weights = content.get("model", content) if isinstance(content, dict) else {}
    if not (isinstance(weights, dict) and weights and all(isinstance(value, Tensor) for value in weights.values())):
        raise CheckpointError(f"no dictionary of tensors, nor one under 'model'; {path}; check the file")
    consume_prefix_in_state_dict_if_present(weights, "module.")  # of a model saved inside DistributedDataParallel
    return weights


def load_reference(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    decoder_num_heads: int,
    target: Literal["hog", "pixels", "normalized_pixels"] = "hog",
    masked_loss: LossName = "l2",
    visible_loss: LossName = "smooth_l1",
) -> DMJD:
    """Build the model of an official pre-training checkpoint, with its weights.

    Everything but the number of heads is read from the shapes: ViT or hybrid, widths, depths, MLP ratios, channels,
    token stride, image size (assumed square), class token, and a visible branch if there is a projector.

    Args:
        state_dict: Official names and tensors.
        num_heads: Heads of the encoder's blocks.
        decoder_num_heads: Heads of the decoder's blocks.
        target: The target that it was trained to predict.
        masked_loss: Loss of the masked branch.
        visible_loss: Loss of the visible branch.

    Raises:
        ValueError: If the weights are not those of such a checkpoint; the message names the first keys that do not fit.
    """
    hybrid = any(name.startswith("patch_embed1.") for name in state_dict)
    try:
        encoder = hybrid_encoder(state_dict, num_heads) if hybrid else vit_encoder(state_dict, num_heads)
        decoder = make_decoder(state_dict, encoder, decoder_num_heads)
        in_chans = state_dict[f"patch_embed{'1' if hybrid else ''}.proj.weight"].shape[1]
        positions = state_dict["decoder_pos_embed"]
    except KeyError as missing:
        raise ValueError(
            f"not a pre-training checkpoint of MAE, ConvMAE or DMJD: {missing.args[0]} is missing"
        ) from None
    out_dim = decoder.pred.out_features
    mean, std = default_statistics(in_chans)
    image_hw = [side * encoder.patch_size for side in encoder.grid]
    backbone: Any = encoder.backbone
    backbone.pretrained_cfg |= images_cfg(in_chans, image_hw, mean, std)
    model = DMJD(
        encoder,
        make_target(target, out_dim, encoder.patch_size, in_chans),
        decoder=decoder,
        projector=Projector(encoder.embed_dim, out_dim, embed_dim=decoder.pred.in_features)
        if any(name.startswith("proj_embed.") for name in state_dict)
        else None,
        masked_loss=masked_loss,
        visible_loss=visible_loss,
        mean=mean,
        std=std,
    )
    # The official decoder's positions have a row of zeros for the class token; ours have none.
    positions = positions[:, -math.prod(encoder.grid) :]
    load_weights(model, {**state_dict, "decoder_pos_embed": positions}, hybrid=hybrid)
    return model


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, hybrid: bool) -> None:
    """Load official weights into a model of the same sizes.

    Raises:
        ValueError: If names or shapes do not fit; the message names the first keys that do not.
    """
    ours = model.state_dict()
    weights = {our_name(name, hybrid=hybrid): (name, value) for name, value in state_dict.items()}
    unknown = [
        name for ours_, (name, value) in weights.items() if ours_ not in ours or value.shape != ours[ours_].shape
    ]
    wrong = unknown + [name for name in ours if name not in weights]
    if wrong:
        raise ValueError(f"these keys are missing, unknown or of another shape: {', '.join(sorted(wrong)[:5])}")
    model.load_state_dict({name: value for name, (_, value) in weights.items()})


def vit_encoder(state_dict: Mapping[str, Tensor], num_heads: int) -> Encoder:
    """Build an untrained ViT of the checkpoint's shapes; raises `KeyError` if a key is missing."""
    embed_dim, in_chans, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    class_token = "cls_token" in state_dict
    return create_vit(
        "base",
        image_size=math.isqrt(state_dict["pos_embed"].shape[1] - class_token) * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        class_token=class_token,
        embed_dim=embed_dim,
        depth=count_blocks(state_dict, "blocks"),
        num_heads=num_heads,
        mlp_ratio=len(state_dict["blocks.0.mlp.fc1.weight"]) / embed_dim,
    )


def hybrid_encoder(state_dict: Mapping[str, Tensor], num_heads: int) -> ConvViTEncoder:
    """Build an untrained hybrid of the checkpoint's shapes; raises `KeyError` if a key is missing.

    Raises:
        ValueError: If the number of heads does not divide its width.
    """
    stages = ("blocks1", "blocks2", "blocks3")
    embed_dims = [len(state_dict[f"patch_embed{stage}.proj.weight"]) for stage in (1, 2, 3)]
    _, in_chans, first_stride, _ = state_dict["patch_embed1.proj.weight"].shape
    mlps = [len(state_dict[f"{stage}.0.mlp.fc1.weight"]) for stage in stages]
    arguments: dict[str, Any] = {
        "img_size": [math.isqrt(state_dict["pos_embed"].shape[1]) * first_stride * 4] * 2,
        "patch_size": first_stride * 4,
        "in_chans": in_chans,
        "num_classes": 0,
        "embed_dims": embed_dims,
        "depths": [count_blocks(state_dict, stage) for stage in stages],
        "num_heads": num_heads,
        "mlp_ratios": [hidden / dim for hidden, dim in zip(mlps, embed_dims, strict=True)],
    }
    if embed_dims[-1] % num_heads:
        raise ValueError(
            f"a width of {embed_dims[-1]} cannot be split into {num_heads} heads: choose a number that divides it"
        )
    return ConvViTEncoder(convvit_base(**arguments), ("convvit_base", arguments))


def make_decoder(state_dict: Mapping[str, Tensor], encoder: Encoder, num_heads: int) -> Decoder:
    """Build an untrained decoder of the checkpoint's shapes; raises `KeyError` if a key is missing.

    Raises:
        ValueError: If the number of heads does not divide its width.
    """
    embed_dim = len(state_dict["decoder_embed.weight"])
    if embed_dim % num_heads:
        raise ValueError(
            f"a decoder of width {embed_dim} cannot be split into {num_heads} heads: choose a number that divides it"
        )
    return Decoder(
        encoder.embed_dim,
        len(state_dict["decoder_pred.weight"]),
        encoder.grid,
        embed_dim=embed_dim,
        depth=count_blocks(state_dict, "decoder_blocks"),
        num_heads=num_heads,
        mlp_ratio=len(state_dict["decoder_blocks.0.mlp.fc1.weight"]) / embed_dim,
    )


def count_blocks(state_dict: Mapping[str, Tensor], name: str) -> int:
    """Count the blocks of a stack."""
    return len({key.split(".")[1] for key in state_dict if key.startswith(f"{name}.")})


def make_target(name: str, out_dim: int, patch_size: int, in_chans: int) -> Target:
    """Build the target of a given width.

    Raises:
        ValueError: If the target cannot have this width.
    """
    found: Target
    if name == "hog":
        cells = math.isqrt(out_dim // (9 * in_chans))
        if not cells or patch_size % cells:
            cells = 1  # not a width of HOG at all: the check below fails with one cell too
        found = HOG(patch_size, in_chans=in_chans, cell_size=patch_size // cells)
    elif name in ("pixels", "normalized_pixels"):
        mean, std = default_statistics(in_chans)
        found = Pixels(patch_size, mean=mean, std=std, standardize=name == "normalized_pixels")
    else:
        raise ValueError(f"there is no target {name!r}; choose hog, pixels or normalized_pixels")
    if found.dim != out_dim:
        raise ValueError(f"decoder_pred.weight predicts {out_dim} numbers a token, target {name!r} has {found.dim}")
    return found
