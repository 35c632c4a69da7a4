"""A folder in the layout of the Hugging Face hub: config.json, model.safetensors and a model card, README.md.

timm and transformers open it from disk or from the hub; transformers uses its wrapper for timm models, whose image
processor reads config.json too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dmjd.backbones.files import images_cfg
from dmjd.backbones.normalize import Normalize
from dmjd.citation import CITATION
from dmjd.formats.network import Original, compare, compare_models
from dmjd.formats.timm_file import imports, save_model

CARD = "card.md"
# The transformers class that opens the folder, and the output that is compared: for features, and for a classifier.
AUTO = (("AutoModel", "pooler_output"), ("AutoModelForImageClassification", "logits"))


def write_hub(original: Original, path: Path, card: Mapping[str, Any]) -> None:
    """Write the folder, and check that timm, and transformers if installed, compute the same from it: 1e-5.

    Args:
        original: The network.
        path: The folder, which must not exist yet.
        card: Facts for the model card: `name`, `license`, `runs`, `version`.
    """
    path.mkdir()
    save_model(original, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(configuration(original), indent=1), "utf-8")
    (path / "README.md").write_text(model_card(original, card), "utf-8")
    compare_models(original, timm.create_model(f"local-dir:{path}", pretrained=True).eval())
    try:
        import transformers
    except ModuleNotFoundError:
        return
    transformers.utils.logging.disable_progress_bar()
    name, said = AUTO[original.kind == "classifier"]
    wrapped = getattr(transformers, name).from_pretrained(path, local_files_only=True).eval()
    normalize = Normalize(*original.statistics)

    def run(images: Tensor) -> Tensor:
        found: Tensor = wrapped(normalize(images * 255))[said]
        return found

    compare(original.features, run, original.model_size, tolerance=1e-5)


def configuration(original: Original) -> dict[str, Any]:
    """Describe the model as timm's `config.json` does: its name, its arguments and its input images."""
    name, arguments = original.architecture
    model: Any = original.model
    channels, *image_hw = original.model_size
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            **images_cfg(channels, image_hw, *original.statistics),
            "fixed_input_size": "img_size" in arguments or model.pretrained_cfg["fixed_input_size"],
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": model.pretrained_cfg["first_conv"],
            "classifier": model.pretrained_cfg["classifier"],
        },
    }
    if isinstance(pooling := getattr(model, "global_pool", None), str):  # many have a module, or pool in the head
        config["global_pool"] = pooling
    return config | ({"label_names": list(original.classes)} if model.num_classes else {})


def model_card(original: Original, card: Mapping[str, Any]) -> str:
    """Render the model card."""
    environment = Environment(  # no HTML escaping: names are in Markdown code spans, where tags have no effect
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["code"] = code_span
    model = original.model
    kind = "image-classification" if model.num_classes else "image-feature-extraction"
    about = {
        "license": card["license"],
        "library_name": "timm",
        "pipeline_tag": kind,
        "tags": [kind, "timm", "transformers", "dmjd", "self-supervised-learning", "masked-image-modeling"],
    }
    facts = {
        "about": yaml.safe_dump(about, sort_keys=False),
        "citation": CITATION,
        "original": original,
        "model": model,
        "auto": AUTO[original.kind == "classifier"][0],
        "imports": imports(original).splitlines()[1:],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return environment.get_template(CARD).render({**facts, **card})


def code_span(value: Any) -> str:
    """Write text chosen by a user as a code span that fits in a table cell."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"
