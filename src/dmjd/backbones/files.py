"""`backbone.safetensors`: a timm model's weights under timm's names, and in its metadata how to make the model."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dmjd.backbones.convvit  # noqa: F401 (registers its models with timm)
from dmjd.errors import CheckpointError


def save_backbone(path: Path, model: nn.Module, architecture: tuple[str, dict[str, Any]], mean: Any, std: Any) -> None:
    """Write a timm model: weights, its name and arguments for `timm.create_model`, and the images' statistics."""
    name, arguments = architecture
    metadata = {
        "architecture": name,
        "model_args": json.dumps(arguments),
        "pretrained_cfg": json.dumps(
            {
                "input_size": [arguments["in_chans"], *arguments["img_size"]],
                "num_classes": 0,
                "mean": list(mean),
                "std": list(std),
            }
        ),
    }
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial, metadata)
    partial.replace(path)


def load_backbone(path: str | Path) -> nn.Module:
    """Load a trained backbone as a timm model, in evaluation mode.

    Its `pretrained_cfg` holds the input size and the mean and standard deviation to normalise images by. Plain
    timm makes the same of the metadata: `timm.create_model(architecture, **model_args,
    pretrained_cfg_overlay=pretrained_cfg, checkpoint_path=path)`.

    Args:
        path: A `backbone.safetensors`.

    Raises:
        CheckpointError: If the file is missing, broken or no backbone of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
        arguments = json.loads(metadata["model_args"])
        overlay = json.loads(metadata["pretrained_cfg"])
    except FileNotFoundError:
        raise CheckpointError(f"no such backbone; {path}; give a run's backbone.safetensors") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"not a backbone file ({error}); {path}; give a run's backbone.safetensors") from None
    try:
        model = timm.create_model(metadata["architecture"], **arguments, pretrained_cfg_overlay=overlay)
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"weights and metadata do not agree: {reason}; {path}; write the file again") from None
    return model.eval()


def open_backbone(name: str) -> nn.Module:
    """Load a backbone by its file, or by name with timm's own weights (`timm:NAME`), without a classifier.

    Raises:
        CheckpointError: If there is no such file or model, or its weights cannot be fetched.
    """
    kind, _, model = name.partition(":")
    if kind != "timm":
        return load_backbone(name)
    if model not in timm.list_models(model.partition(".")[0]) and model not in timm.list_pretrained(model):
        raise CheckpointError(f"timm has no such model; {name}; see timm.list_models()")
    try:
        return timm.create_model(model, pretrained=True, num_classes=0).eval()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"its weights cannot be fetched ({reason}); {name}; check the network") from None
