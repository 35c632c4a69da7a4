"""Models from the weights of other programs: official MAE parameter names, one table."""

import math
import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dmjd.backbones.vit import create_vit
from dmjd.factory import STATISTICS
from dmjd.heads import Decoder, Projector
from dmjd.losses import LossName
from dmjd.method import DMJD
from dmjd.targets import HOG, Pixels, Target

# Official name (a pattern) -> ours. The first that matches counts; what none matches is the encoder's.
NAMES = (
    (r"decoder_(embed|blocks|norm|pred|pos_embed)\b", r"decoder.\1"),
    (r"mask_token$", "decoder.mask_token"),
    (r"proj_embed\.", "projector.project."),
    (r"predictor\.0\.", "projector.predict."),
    (r"", "encoder.backbone."),
)


def our_name(official: str) -> str:
    """Translate a parameter's name."""
    pattern, ours = next((pattern, ours) for pattern, ours in NAMES if re.match(pattern, official))
    return re.sub(f"^{pattern}", ours, official, count=1)


def load_reference(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    decoder_num_heads: int,
    target: Literal["hog", "pixels", "normalized_pixels"] = "hog",
    masked_loss: LossName = "l2",
    visible_loss: LossName = "smooth_l1",
) -> DMJD:
    """Make the model that a pre-training checkpoint of the official MAE program describes, with its weights.

    Everything but the heads is read from the shapes: widths, depths, MLP ratios, channels, patch size, image size
    (taken as square), class token, and a visible branch where there is a projector.

    Args:
        state_dict: Official names and tensors.
        num_heads: Heads of the encoder's blocks.
        decoder_num_heads: Heads of the decoder's blocks.
        target: What it was trained to predict.
        masked_loss: Loss of the masked branch.
        visible_loss: Loss of the visible branch.

    Raises:
        ValueError: If the weights are not of this kind; the message names the first keys that do not fit.
    """
    wanted = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "decoder_embed.weight")
    missing = [
        name for name in (*wanted, "decoder_blocks.0.mlp.fc1.weight", "decoder_pred.weight") if name not in state_dict
    ]
    if missing:
        raise ValueError(f"not a pre-training checkpoint of a ViT: {', '.join(missing[:5])} missing")
    embed_dim, in_chans, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    class_token = "cls_token" in state_dict
    side = math.isqrt(state_dict["pos_embed"].shape[1] - class_token)
    encoder = create_vit(
        "base",
        image_size=side * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        class_token=class_token,
        embed_dim=embed_dim,
        depth=count_blocks(state_dict, "blocks"),
        num_heads=num_heads,
        mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
    )
    decoder_dim, out_dim = state_dict["decoder_embed.weight"].shape[0], state_dict["decoder_pred.weight"].shape[0]
    mean, std = STATISTICS[in_chans]
    model = DMJD(
        encoder,
        make_target(target, out_dim, patch_size, in_chans),
        decoder=Decoder(
            embed_dim,
            out_dim,
            encoder.grid,
            embed_dim=decoder_dim,
            depth=count_blocks(state_dict, "decoder_blocks"),
            num_heads=decoder_num_heads,
            mlp_ratio=state_dict["decoder_blocks.0.mlp.fc1.weight"].shape[0] / decoder_dim,
        ),
        projector=Projector(embed_dim, out_dim, embed_dim=decoder_dim) if "proj_embed.0.weight" in state_dict else None,
        masked_loss=masked_loss,
        visible_loss=visible_loss,
        mean=mean,
        std=std,
    )
    weights = {our_name(name): value for name, value in state_dict.items()}
    positions = weights["decoder.pos_embed"]
    weights["decoder.pos_embed"] = positions[:, class_token:]  # the official row of the class token is zero
    ours = model.state_dict()
    wrong = sorted(
        (ours.keys() ^ weights.keys())
        | {name for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape}
    )
    if wrong:
        raise ValueError(f"these keys are missing, unknown or of another shape: {', '.join(wrong[:5])}")
    model.load_state_dict(weights)
    return model


def count_blocks(state_dict: Mapping[str, Tensor], name: str) -> int:
    """Count the blocks of a stack."""
    return len({key.split(".")[1] for key in state_dict if key.startswith(f"{name}.")})


def make_target(name: str, out_dim: int, patch_size: int, in_chans: int) -> Target:
    """Make the target of a given width.

    Raises:
        ValueError: If the target cannot have this width.
    """
    if name == "hog":
        cells = math.isqrt(out_dim // (9 * in_chans)) or 1
        found: Target = HOG(patch_size, in_chans=in_chans, cell_size=patch_size // cells)
    else:
        mean, std = STATISTICS[in_chans]
        found = Pixels(patch_size, mean=mean, std=std, standardize=name == "normalized_pixels")
    if found.dim != out_dim:
        raise ValueError(f"decoder_pred.weight predicts {out_dim} numbers a token, target {name!r} has {found.dim}")
    return found
