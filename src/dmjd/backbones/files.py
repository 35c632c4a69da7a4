"""`backbone.safetensors`: a timm model's weights under timm's names, with metadata that tell how to build the model.

A file may come from anyone: of the metadata, only the name of a timm model and arguments of networks are passed on. A
digest detects any bit that has changed since the file was written.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import VisionTransformer, model_entrypoint, resolve_model_input_args
from torch import Tensor, nn

from dmjd.backbones import Architecture, register_encoder
from dmjd.backbones.convvit import ConvViT  # also registers its models with timm
from dmjd.backbones.vit import pools_by_weights
from dmjd.errors import CheckpointError, ConfigError, one_line

DIGEST = "sha256"
METADATA = {"architecture", "model_args", "pretrained_cfg", "value_range", "task", "backbone_prefix", DIGEST, "format"}
FOREIGN = {".pth", ".pt", ".bin", ".tar", ".ckpt"}  # suffixes of checkpoints in other formats
OVERLAY = {"input_size", "num_classes", "mean", "std", "crop_pct", "crop_mode", "interpolation"}
# Arguments of networks. Those of `timm.create_model` and its helpers are excluded, since some would open files.
ARGUMENTS = {*inspect.signature(VisionTransformer).parameters, *inspect.signature(ConvViT).parameters}


def images_cfg(in_chans: int, image_hw: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Describe a network's input images as timm's `pretrained_cfg` does."""
    # All evaluations here use the largest centre crop, whatever the transforms of the network in timm.
    crop = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
    return {"input_size": (in_chans, *image_hw), "mean": tuple(mean), "std": tuple(std), **crop}


def save_backbone(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    mean: Any,
    std: Any,
    *,
    value_range: tuple[float, float] = (0.0, 255.0),
    around: nn.Module | None = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write a timm model: weights, its name and arguments for `timm.create_model`, and the statistics of its images.

    These are the mean and standard deviation of every channel, after `value_range`, that of the images, is scaled to
    0 to 1.

    `task` describes what the network was trained for, by its `name` and its `classes`; `task_of` reads it. If a network
    `around` the model is given, all its weights are written: `load_around` reads them, `load_backbone` only the model.
    """
    name, arguments = architecture
    default: Any = model.pretrained_cfg
    in_chans, size = arguments.get("in_chans", default["input_size"][0]), arguments.get("img_size")
    size = [size, size] if isinstance(size, int) else size or default["input_size"][1:]
    metadata = {
        "architecture": name,
        "model_args": json.dumps(arguments),
        "pretrained_cfg": json.dumps(
            {**images_cfg(in_chans, size, mean, std), "num_classes": arguments["num_classes"]}
        ),
        "value_range": json.dumps(value_range),
    }
    if task is not None:
        metadata["task"] = json.dumps(dict(task))
    if around is not None:
        place = next(name for name, module in around.named_modules() if module is model)
        metadata["backbone_prefix"] = f"{place}."
    weights = {key: value.contiguous() for key, value in (around or model).state_dict().items()}
    content = save(weights, metadata | {DIGEST: digest(weights, metadata), "format": "pt"})  # transformers requires it
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute a SHA-256 of tensors with names, types and shapes, and of the metadata except for the digest itself."""
    said = {key: value for key, value in sorted(metadata.items()) if key not in (DIGEST, "format")}
    found = hashlib.sha256(json.dumps(said).encode())
    for name, value in sorted(tensors.items()):
        found.update(json.dumps([name, str(value.dtype), [*value.shape]]).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_file(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors; a file of an earlier version has no digest and is accepted without.

    Raises:
        CheckpointError: If the file has changed since it was written.
        SafetensorError: If it is broken or of another format.
        OSError: If it cannot be opened.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    if unknown := sorted(metadata.keys() - METADATA):
        raise CheckpointError(f"unknown metadata {', '.join(unknown)[:200]!r}; {path}; copy or write the file again")
    if metadata.get(DIGEST, "") and metadata[DIGEST] != digest(tensors, metadata):
        raise CheckpointError(f"the file has changed since it was written; {path}; copy or write it again")
    return metadata, tensors


def task_of(path: str | Path) -> dict[str, Any]:
    """Read the task that the network of a file was trained for; empty for a plain backbone or a file not of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            task = json.loads((file.metadata() or {}).get("task", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return task if isinstance(task, dict) else {}


def read_task(path: str | Path, name: str) -> dict[str, Any]:
    """Read the description of the network around a backbone.

    Raises:
        CheckpointError: If the file has no network for the task of this name.
    """
    task = task_of(path)
    if task.get("name") != name:
        file = "pretrained.safetensors" if name == "pretrain" else "last.safetensors"
        raise CheckpointError(f"no network of dmjd {name}; {path}; give the {file} of such a run")
    return task


def load_around(path: str | Path, model: nn.Module) -> None:
    """Load the weights of a network around a backbone.

    Raises:
        CheckpointError: If they are those of another network.
    """
    try:
        model.load_state_dict(read_file(path)[1])
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = one_line(error, 300)
        raise CheckpointError(f"weights and metadata do not agree: {reason}; {path}; write the file again") from None


def load_backbone(path: str | Path) -> nn.Module:
    """Load a trained backbone as a timm model, in evaluation mode.

    Its `pretrained_cfg` has the input size, and the mean and standard deviation for normalising images; its
    `value_range` is that of the training images. Plain timm builds the same model from the metadata:
    `timm.create_model(architecture, **model_args, pretrained_cfg_overlay=pretrained_cfg, checkpoint_path=path)`.

    Args:
        path: A `backbone.safetensors`, or a file that fine-tuning, segmentation or detection wrote.

    Raises:
        CheckpointError: If the file is missing, broken or not a backbone of ours.
    """
    return _read(path)[0].eval()


def open_backbone(name: str, *, pretrained: bool = True, drop_path_rate: float = 0.0) -> tuple[nn.Module, Architecture]:
    """Open a backbone for a task, by its file or by timm's name, without a classifier.

    `timm:NAME` is a model with timm's weights; NAME may be `hf-hub:OWNER/MODEL` or `local-dir:FOLDER`, as in timm.

    Args:
        name: File or `timm:NAME`.
        pretrained: Load the weights, or leave the same network untrained.
        drop_path_rate: Stochastic depth rate in training.

    Returns:
        The model in evaluation mode, and its architecture.

    Raises:
        CheckpointError: If there is no such file or model, or its weights cannot be downloaded.
        ConfigError: If the model cannot have stochastic depth, or has no pooled features.
    """
    kind, _, timm_name = name.partition(":")
    extra = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        if kind == "timm":
            model, (architecture, arguments) = _fetch(timm_name, name, pretrained, extra)
        else:
            model, (architecture, arguments) = _read(name, pretrained, extra)
    except TypeError:
        raise ConfigError(f"the model takes no drop_path_rate; {name}; leave --drop_path at 0") from None
    if getattr(model, "global_pool", None) == "":  # its output is tokens, not features of an image
        if getattr(model, "cls_token", None) is None:
            raise ConfigError(f"its output is tokens, not pooled features (global_pool); {name}; take another")
        arguments = {**arguments, "global_pool": "token"}
        model.reset_classifier(0, "token")  # type: ignore[operator]
    return put_head(model, (architecture, arguments), 0)


def create_network(name: str, *, image_hw: tuple[int, int], in_chans: int) -> tuple[nn.Module, Architecture]:
    """Build the untrained network of `timm:NAME` or of a backbone file for a given image size, without a classifier.

    Raises:
        CheckpointError: If there is no such file or model.
        ConfigError: If the network does not support the image size.
    """
    kind, _, timm_name = name.partition(":")
    size = {"img_size": list(image_hw), "in_chans": in_chans, "num_classes": 0}
    architecture: Architecture = (timm_name, {}) if kind == "timm" else _read(name, pretrained=False)[1]
    arguments = {**architecture[1], **size}
    if kind == "timm" and not is_model(timm_name):
        raise CheckpointError(f"timm has no such model; {name}; see timm.list_models()")
    try:
        network = timm.create_model(architecture[0], **arguments)
        if isinstance(network, VisionTransformer | ConvViT) and pools_by_weights(network):
            # Masked views need the norm on all tokens, and features must not use weights that are never trained.
            arguments |= {"global_pool": "avg", "fc_norm": False}
            network = timm.create_model(architecture[0], **arguments)
        return network, (architecture[0], arguments)
    except TypeError:
        what = "a network without img_size, such as one of convolutions, cannot read masked views"
        raise ConfigError(f"{what}; {name}; take a ViT") from None
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"no network of {image_hw[0]}x{image_hw[1]} px ({error}); {name}; see --model") from None


def is_model(name: str) -> bool:
    """Tell whether timm has a model of this name, with or without a tag for its weights."""
    return name in timm.list_models(name.partition(".")[0]) or name in timm.list_pretrained(name)


def put_head(model: nn.Module, architecture: Architecture, num_classes: int) -> tuple[nn.Module, Architecture]:
    """Give a model a new linear head with near-zero weights, as in MAE's fine-tuning; 0 classes mean pooled features.

    With the head, a pre-trained ViT gets a new norm after pooling, in place of the norm on all tokens (MAE).
    """
    network: Any = model
    name, arguments = architecture
    network.reset_classifier(num_classes)
    if num_classes:
        found = network.get_classifier()
        for head in found if isinstance(found, tuple) else [found]:  # distilled models have two
            for layer in head.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.trunc_normal_(layer.weight, std=2e-5)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        if isinstance(model, VisionTransformer) and arguments.get("fc_norm") is False:  # as pre-training builds ViTs
            network.norm.reset_parameters()
            network.fc_norm, network.norm = network.norm, nn.Identity()
            arguments = {**arguments, "fc_norm": True}
    if isinstance(model, ConvViT) and model.fc_norm.elementwise_affine:
        arguments = {**arguments, "fc_norm": True}  # kept when the head is removed
    return model.eval(), (name, {**arguments, "num_classes": num_classes})


def _fetch(model: str, given: str, pretrained: bool, extra: dict[str, Any]) -> tuple[nn.Module, Architecture]:
    """Create a timm model."""
    hub = model.startswith(("hf-hub:", "local-dir:"))  # timm's prefixes for a hub and for a folder
    if not hub and not is_model(model):
        raise CheckpointError(f"timm has no such model; {given}; see timm.list_models()")
    try:
        source: dict[str, Any] = resolve_model_input_args(model) if hub else {"model_name": model}
        architecture: Architecture = source["model_name"], source.get("pretrained_model_args", {})
        _refuse_unknown(*architecture, {}, given)  # as opening a file of ours made from it will
        return timm.create_model(model, pretrained=pretrained, **extra), architecture
    except (OSError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise CheckpointError(f"its weights cannot be fetched ({reason}); {given}; check the network") from None


def _read(
    path: str | Path, pretrained: bool = True, extra: dict[str, Any] | None = None
) -> tuple[nn.Module, Architecture]:
    """Build the model of a file."""
    if Path(path).is_dir():
        # Suggest the backbone of a run first; a folder of another program, or of dmjd linear, has no such file.
        there = sorted(Path(path).glob("*.safetensors"), key=lambda file: (file.stem != "backbone", file.name))
        todo = f"a file in it, such as {there[0].name}" if there else "a run's backbone.safetensors"
        raise CheckpointError(f"a directory; {path}; give {todo}")
    try:
        metadata, tensors = read_file(path)
        prefix = metadata.get("backbone_prefix", "")
        weights = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        name, arguments = metadata["architecture"], json.loads(metadata["model_args"])
        overlay, value_range = json.loads(metadata["pretrained_cfg"]), json.loads(metadata.get("value_range", "null"))
    except FileNotFoundError:
        raise CheckpointError(f"no such backbone; {path}; give a run's backbone.safetensors") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = f"no {error} in its metadata" if isinstance(error, KeyError) else error
        what, todo = f"not a backbone file ({reason})", "give a run's backbone.safetensors"
        if Path(path).suffix in FOREIGN:
            what, todo = "weights of another program", f"{todo}; dmjd pretrain --init takes such weights to start from"
        raise CheckpointError(f"{what}; {path}; {todo}") from None
    register_encoder.names()  # encoders of other distributions may register models with timm
    _refuse_unknown(name, arguments, overlay, path)
    try:
        model = timm.create_model(name, **arguments, **(extra or {}), pretrained_cfg_overlay=overlay)
        if pretrained:
            model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError) as error:
        reason = one_line(error, 300)
        raise CheckpointError(f"weights and metadata do not agree: {reason}; {path}; write the file again") from None
    # Not an entry of `pretrained_cfg`: timm saves that, and refuses to load it with unknown entries.
    model.value_range = value_range
    return model, (name, arguments)


def _refuse_unknown(name: str, arguments: Any, overlay: Any, path: str | Path) -> None:
    """Refuse anything but the name of a timm model and arguments of networks: numbers, strings and lists of them.

    Raises:
        CheckpointError: If there is anything else.
    """
    if not is_model(name):
        raise CheckpointError(f"timm has no model {name[:80]!r}; {path}; see timm.list_models()")
    # A model of another distribution may have further arguments: those that its entry function names.
    own = set(inspect.signature(model_entrypoint(name.partition(".")[0])).parameters)
    known = ARGUMENTS | own - set(inspect.signature(timm.create_model).parameters)
    for values, keys in ((arguments, known), (overlay, OVERLAY)):
        if not isinstance(values, dict):
            raise CheckpointError(f"a {type(values).__name__} instead of arguments; {path}; write the file again")
        if unknown := sorted(values.keys() - keys):
            raise CheckpointError(f"unknown arguments {', '.join(unknown)[:200]!r}; {path}; write the file again")
        if any(isinstance(each, dict) for value in values.values() for each in (value, *_items(value))):
            raise CheckpointError(f"arguments that are not numbers or strings; {path}; write the file again")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
