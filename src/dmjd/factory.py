"""From settings to a model."""

from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
import yaml

from dmjd import config
from dmjd.backbones import Encoder
from dmjd.backbones.convvit import ConvViTEncoder, create_convvit
from dmjd.backbones.feature_maps import Maps
from dmjd.backbones.files import open_backbone
from dmjd.backbones.huggingface import HuggingFace
from dmjd.backbones.vit import ViT, create_vit
from dmjd.heads import Decoder, LinearHead, Projector
from dmjd.masking import mask_counts
from dmjd.method import DMJD
from dmjd.targets import HOG, ConcatTarget, EmaTeacher, Pixels, Target, Teacher

# Sections of the settings that a model is made of.
SECTIONS = ("model", "masking", "masked", "visible", "hog", "teacher", "decoder")
SHAPE = ("embed_dim", "depth", "num_heads")  # what a size stands for
# Mean and standard deviation of the channels, for values in 0..1: ImageNet's for colour, round numbers for grey.
STATISTICS = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.5,), (0.25,))}


def build(preset: str, size: str = "base", *, image_size: int | tuple[int, int] = 224, **overrides: Any) -> DMJD:
    """Build the model of a preset, untrained.

    Args:
        preset: Name of a file in `dmjd/presets`.
        size: `tiny`, `small`, `base` or `large`.
        image_size: Side, or height and width, in pixels.
        **overrides: Settings by name, such as `patch_size=8` or `num_views=4`; with the section in front where a name
            stands in several, such as `decoder_depth=2`. A bare name means the first section that has it.

    Raises:
        ValueError: If there is no such preset or setting, or the settings do not go together.
    """
    path = config.PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in config.PRESETS.glob("*.yaml"))
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(names)}")
    sections: dict[str, Any] = {name: type(getattr(config.Pretrain(), name)) for name in SECTIONS}
    places: dict[str, tuple[str, str]] = {}
    for section, kind in sections.items():
        for setting in fields(kind):
            places[f"{section}_{setting.name}"] = (section, setting.name)
            places.setdefault(setting.name, (section, setting.name))
    recipe = yaml.safe_load(path.read_text())
    values = {
        section: {key: tuple(value) if isinstance(value, list) else value for key, value in recipe[section].items()}
        for section in sections
        if section in recipe
    }
    values = {section: {} for section in sections} | values
    if size != recipe["model"]["size"]:  # another size than the preset's: what the preset changes of its own goes
        values["model"] = {key: value for key, value in values["model"].items() if key not in SHAPE}
    side = image_size if isinstance(image_size, int) else "x".join(map(str, image_size))
    for name, value in {"size": size, "image_size": str(side), **overrides}.items():
        if name not in places:
            nearest = get_close_matches(name, places, n=1)
            raise ValueError(f"there is no setting {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        section, key = places[name]
        values[section][key] = value
    return from_settings(config.Pretrain(**{section: kind(**values[section]) for section, kind in sections.items()}))


def from_settings(settings: config.Pretrain) -> DMJD:
    """Build the model that settings describe, untrained.

    Raises:
        ValueError: If the settings do not go together.
    """
    model, masking, decoder = settings.model, settings.masking, settings.decoder
    if model.in_chans not in STATISTICS:
        raise ValueError(f"model.in_chans {model.in_chans} is neither 3 (RGB) nor 1 (grey)")
    mask_counts(
        model.grid,
        block=masking.block,
        num_views=masking.num_views,
        mask_ratio=masking.mask_ratio,
        predict_ratio=masking.predict_ratio,
    )  # raises where no such masks exist
    encoder = create_encoder(model)
    mean, std = STATISTICS[model.in_chans]
    target, visible = create_target(settings.masked.target, settings, encoder), settings.visible
    differs = visible.weight and visible.target not in (None, settings.masked.target)
    own = create_target(visible.target, settings, encoder) if differs and visible.target else None
    head = (
        LinearHead(encoder.embed_dim, target.dim)
        if decoder.depth == 0
        else Decoder(
            encoder.embed_dim,
            target.dim,
            encoder.grid,
            embed_dim=decoder.embed_dim,
            depth=decoder.depth,
            num_heads=decoder.num_heads,
            mlp_ratio=decoder.mlp_ratio,
        )
    )
    return DMJD(
        encoder,
        target,
        decoder=head,
        projector=Projector(encoder.embed_dim, (own or target).dim, embed_dim=decoder.embed_dim)
        if visible.weight
        else None,
        visible_weight=visible.weight,
        visible_target=own,
        masked_loss=settings.masked.loss,
        visible_loss=visible.loss,
        beta=visible.beta,
        mean=mean,
        std=std,
    )


def create_target(name: str, settings: config.Pretrain, encoder: Encoder) -> Target:
    """Create a target by name, or several by names with `+` between them, for an encoder.

    Raises:
        ValueError: If it does not go together with the other settings.
        CheckpointError: If a teacher does not load.
    """
    if len(names := config.target_names(name)) > 1:
        return ConcatTarget([create_target(part, settings, encoder) for part in names])
    model, teacher = settings.model, settings.teacher
    mean, std = STATISTICS[model.in_chans]
    if name == "hog":
        variant = settings.hog.variant
        return HOG(model.patch_size, in_chans=model.in_chans, cell_size=settings.cell_size, variant=variant)
    if name in ("pixels", "normalized_pixels"):
        return Pixels(model.patch_size, mean=mean, std=std, standardize=name == "normalized_pixels")
    if name == "ema":
        wants = {"input_size": (model.in_chans, *model.image_hw), "mean": mean, "std": std}
        student = Maps(deepcopy(encoder.backbone), layers=teacher.layers, in_chans=model.in_chans, wants=wants)
        return EmaTeacher(student, model.grid, decay=teacher.decay)
    network = HuggingFace(name.removeprefix("hf:")) if name.startswith("hf:") else open_backbone(name)[0]
    network.to(memory_format=torch.channels_last)  # convolutions are faster so
    return Teacher(Maps(network, layers=teacher.layers, in_chans=model.in_chans, bf16=teacher.bf16), model.grid)


def create_encoder(model: config.Model) -> ViT | ConvViTEncoder:
    """Create the untrained backbone that settings describe."""
    shape: dict[str, Any] = {name: value for name in SHAPE if (value := getattr(model, name)) is not None}
    image: dict[str, Any] = {"image_size": model.image_hw, "patch_size": model.patch_size, "in_chans": model.in_chans}
    if model.backbone == "convvit":
        return create_convvit(model.size, conv_mlp_ratio=model.conv_mlp_ratio, **image, **shape)
    tokens: dict[str, Any] = {
        "class_token": model.class_token,
        "reg_tokens": model.reg_tokens,
        "mask_token": model.mask_token,
    }
    return create_vit(model.size, **image, **tokens, **shape)
