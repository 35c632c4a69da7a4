"""Models from settings."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Bool, Int
from torch import Tensor

from dmjd.backbones import Encoder, encoder_of, register_encoder
from dmjd.backbones.files import create_network, images_cfg, load_around, read_file, read_task, save_backbone
from dmjd.backbones.normalize import Normalize, default_statistics
from dmjd.backbones.pyramid import take_any_size
from dmjd.config.pretrain import SHAPE, ModelSettings, PretrainSettings
from dmjd.config.rules import PRESETS, to_dict
from dmjd.heads import Decoder, LinearHead, MisalignedProjector, Projector
from dmjd.initialization import StartingWeights
from dmjd.masking import mask_counts, seeded_masks
from dmjd.method import DMJD
from dmjd.targets import TargetRequest, create_target
from dmjd.targets.teacher import FeatureTarget

# Sections of the settings that define a model.
SECTIONS = ("model", "masking", "masked", "visible", "hog", "teacher", "decoder")
OPTIONS = (*SHAPE, "class_token", "reg_tokens", "mask_token", "conv_mlp_ratio")  # settings of some backbones only


def build(
    preset: str, size: str | None = None, *, image_size: int | Sequence[int] | None = None, **overrides: Any
) -> DMJD:
    """Build the model of a preset, untrained.

    Args:
        preset: Name of a file in `dmjd/presets`.
        size: `tiny`, `small`, `base` or `large`. Default: the preset's.
        image_size: Side, or height and width, in pixels. Default: the preset's, 224 in all full recipes.
        **overrides: Settings by name, such as `patch_size=8` or `num_views=4`, with the section as prefix if several
            sections have the name, such as `decoder_depth=2`. A bare name means the first section that has it.

    Raises:
        ValueError: If there is no such preset or setting, or the settings conflict.
    """
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if preset not in names:
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(names)}")
    recipe = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    values = sections_of(recipe)
    size = size or recipe["model"]["size"]
    if size != recipe["model"]["size"]:  # for another size, drop the shape that the preset sets for its own
        values["model"] = {key: value for key, value in values["model"].items() if key not in SHAPE}
    side = image_size or recipe["model"]["image_size"]
    side = str(side) if isinstance(side, int | str) else "x".join(map(str, side))
    places = setting_places()
    for name, value in {"size": size, "image_size": side, **overrides}.items():
        if name not in places:
            nearest = get_close_matches(name, places, n=1)
            raise ValueError(f"there is no setting {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        section, key = places[name]
        values[section][key] = value
    return from_settings(model_settings(sections_of(values)))


def save_pretrained(path: Path, network: DMJD, settings: PretrainSettings, value_range: tuple[float, float]) -> None:
    """Write a whole pre-trained network except for frozen teachers: encoder, decoder, projector and their settings.

    Args:
        path: File to write.
        network: A network built by `from_settings`.
        settings: The settings that it was built from.
        value_range: The values of images that became 0 and 1.
    """
    encoder, plain = network.encoder, to_dict(replace(settings, teacher=replace(settings.teacher, cache=None)))
    assert encoder.architecture
    save_backbone(
        path,
        encoder.backbone,
        encoder.architecture,
        *network.normalize.statistics,
        value_range=value_range,
        around=network,
        task={"name": "pretrain", "settings": {section: plain[section] for section in SECTIONS}},
    )


def load_pretrained(path: str | Path) -> DMJD:
    """Load a `pretrained.safetensors`: the network with decoder, projector and targets, to predict or train further.

    Teachers among the targets are loaded again from their original sources.

    Raises:
        CheckpointError: If the file is missing, broken or of another kind, or a teacher does not load.
    """
    values = sections_of(read_task(path, "pretrain")["settings"])
    if values["model"]["backbone"].endswith(".safetensors"):
        values["model"]["backbone"] = str(path)  # it has the same architecture, and the other file may be gone
    metadata = read_file(path)[0]
    config = json.loads(metadata["pretrained_cfg"])
    network = from_settings(model_settings(values), (config["mean"], config["std"]))
    load_around(path, network)
    backbone: Any = network.encoder.backbone
    backbone.value_range = json.loads(metadata.get("value_range", "null"))
    return network


def section_kinds() -> dict[str, Any]:
    """Return the settings classes of the sections that define a model."""
    return {section: type(getattr(PretrainSettings(), section)) for section in SECTIONS}


def sections_of(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read sections from plain values, converting lists to the tuples that settings have."""
    return {
        section: {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.get(section, {}).items()
        }
        for section in SECTIONS
    }


def model_settings(values: Mapping[str, Mapping[str, Any]]) -> PretrainSettings:
    """Build the settings of a model from its sections."""
    return PretrainSettings(**{section: kind(**values[section]) for section, kind in section_kinds().items()})


def setting_places() -> dict[str, tuple[str, str]]:
    """Map bare names and SECTION_NAME of all settings to section and name; for bare names, the first section wins."""
    places: dict[str, tuple[str, str]] = {}
    for section, kind in section_kinds().items():
        for setting in fields(kind):
            places[f"{section}_{setting.name}"] = (section, setting.name)
            places.setdefault(setting.name, (section, setting.name))
    return places


def from_settings(
    settings: PretrainSettings, statistics: tuple[Sequence[float], Sequence[float]] | None = None
) -> DMJD:
    """Build the model that settings describe, untrained, or with the weights of `settings.init` that fit.

    Args:
        settings: Settings of the model.
        statistics: Mean and standard deviation of every channel, 0 to 1. Default: ImageNet's, or round numbers.

    Raises:
        ValueError: If the settings conflict.
        CheckpointError: If the weights to start from, or a teacher, do not load.
    """
    model, masking = settings.model, settings.masking
    for height, width in settings.crop_sizes:  # raises if no such masks exist
        mask_counts((height // model.patch_size, width // model.patch_size), **asdict(masking))
    encoder = create_encoder(model)
    mean, std = statistics or default_statistics(model.in_chans)
    backbone: Any = encoder.backbone
    backbone.pretrained_cfg |= images_cfg(model.in_chans, model.image_hw, mean, std)
    request = TargetRequest(
        encoder=encoder,
        in_chans=model.in_chans,
        image_hw=model.image_hw,
        normalize=Normalize(mean, std),
        options={"hog": asdict(settings.hog), "teacher": asdict(settings.teacher)},
    )
    start = StartingWeights(settings.init) if settings.init else None
    if start:
        start.into_backbone(encoder)  # before building targets, which may be copies of it
    target, visible = create_target(settings.masked.target, request), settings.visible
    differs = visible.weight and visible.target not in (None, settings.masked.target)
    visible_target = create_target(visible.target, request) if differs and visible.target else None
    decoder = create_decoder(settings, encoder, target.dim)
    projector = None
    if visible.weight:
        branch = Projector if visible.aligned else MisalignedProjector
        projector = branch(encoder.embed_dim, (visible_target or target).dim, embed_dim=settings.decoder.embed_dim)
    network = DMJD(
        encoder,
        target,
        decoder=decoder,
        projector=projector,
        visible_weight=visible.weight,
        visible_target=visible_target,
        masked_loss=settings.masked.loss,
        visible_loss=visible.loss,
        beta=visible.beta,
        mean=mean,
        std=std,
    )
    if start:
        start.into_heads(network)
    if settings.crop.progressive:
        if any(isinstance(module, FeatureTarget) for module in network.modules()):
            raise ValueError("crop.progressive does not work with a network as the target; leave it out")
        take_any_size(encoder.backbone)
    return network


def masks_of(
    settings: PretrainSettings, seeds: Int[Tensor, " B"], grid: tuple[int, int] | None = None
) -> Bool[Tensor, "B V L"]:
    """Draw the masks of samples, True = hidden, from their seeds, for crops of full size or of another grid."""
    return seeded_masks(seeds, grid or settings.model.grid, **asdict(settings.masking))


def create_decoder(settings: PretrainSettings, encoder: Encoder, out_dim: int) -> Decoder | LinearHead:
    """Create the head of the masked branch, for targets of width `out_dim`."""
    decoder = settings.decoder
    if decoder.depth == 0:
        return LinearHead(encoder.embed_dim, out_dim)
    return Decoder(encoder.embed_dim, out_dim, encoder.grid, **asdict(decoder))


def create_encoder(model: ModelSettings) -> Encoder:
    """Create the untrained backbone that settings describe: a registered one, timm:NAME or the architecture of a file.

    Raises:
        ConfigError: If there is no such backbone.
        ValueError: If the settings conflict.
        CheckpointError: If the file is not that of a backbone.
    """
    if model.has_own_shape:
        if model.mask_token:
            raise ValueError(f"model.backbone {model.backbone} has no mask token; choose vit")
        if model.reg_tokens:
            raise ValueError(f"model.backbone {model.backbone} has tokens of its own; leave out model.reg_tokens")
        encoder = encoder_of(*create_network(model.backbone, image_hw=model.image_hw, in_chans=model.in_chans))
    else:
        create = register_encoder.get(model.backbone)
        options = {name: value for name in OPTIONS if (value := getattr(model, name))}
        size = {"image_size": model.image_hw, "patch_size": model.patch_size, "in_chans": model.in_chans}
        try:
            inspect.signature(create).bind(model.size, **size, **options)
        except TypeError as error:
            such = f"model.backbone {model.backbone} has no such setting: {error}"
            raise ValueError(f"{such}; set it to false or 0, or take another preset") from None
        encoder = create(model.size, **size, **options)
    if encoder.patch_size != model.patch_size:
        raise ValueError(
            f"model.patch_size {model.patch_size}, but {model.backbone} has tokens of {encoder.patch_size} px"
        )
    return encoder
