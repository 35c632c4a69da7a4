"""`dmjd export`: write a network of ours in the formats of other programs."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from dmjd.config.common import StartSettings
from dmjd.config.downstream import FinetuneSettings, LinearSettings
from dmjd.config.export import ExportSettings
from dmjd.config.load import by_flag
from dmjd.config.pretrain import PretrainSettings
from dmjd.config.rules import PRESETS, to_dict
from dmjd.engine.checkpoint import flush
from dmjd.engine.run import read_facts
from dmjd.errors import CheckpointError, ConfigError
from dmjd.formats.hub_folder import AUTO, write_hub
from dmjd.formats.network import Original, open_original
from dmjd.formats.onnx_graph import OPSET, write_onnx
from dmjd.formats.timm_file import how_to_load, imports, write_timm
from dmjd.formats.torch_program import write_torch

FILES = ("best.safetensors", "linear.safetensors", "backbone.safetensors")  # of a run, in order of preference
ENDINGS = {"timm": ".safetensors", "hf": "", "onnx": ".onnx", "torch": ".pt2"}
START = StartSettings(backbone="")
# By a setting that only one kind of run has: its title, its default settings and its presets.
KINDS: dict[str, tuple[str, Callable[[], Any], Path]] = {
    "masking": ("Pre-training", PretrainSettings, PRESETS),
    "augment": ("Fine-tuning", partial(FinetuneSettings, start=START), PRESETS / "finetune"),
    "recipe": ("Linear classifier", partial(LinearSettings, start=START), PRESETS / "linear"),
}
OF_RUNS = {"data", "preset", "epochs", "batch_size"}  # settings in the config.yaml of every run
# Settings that say nothing about the network, or that have an entry of their own in the card.
UNTOLD = {
    *("data", "out", "preset", "config", "device", "workers", "debug", "resume", "checkpoint_minutes", "max_bad"),
    *("parallel", "compile", "allow_change", "backbone", "epochs", "steps", "batch_size", "monitor", "log"),
    *("log_to", "activation_checkpointing", "deterministic"),
}
RESULTS = {  # names of results in the card; others keep their own names
    "knn_top1": "k-NN, top-1",
    "linear_top1": "linear probe, top-1",
    "rankme": "RankMe",
    "top1": "top-1 at the end",
    "top1_low": "top-1, lower end of its 95 % interval",
    "top1_high": "top-1, upper end of its 95 % interval",
    "top5": "top-5 at the end",
    "best_top1": "top-1 of the best network",
    "images": "held-out images",
    "train_images": "images",
    "part": "held-out part",
}


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write the network of `settings.run` to `settings.out`, check it against the original, and print how to load it.

    Returns:
        The written path, the file of the network, and its kind.

    Raises:
        CheckpointError: If there is no network of ours.
        ConfigError: If the format does not support the network, a library is missing, the folder to write exists
            already, or the file to write belongs to a run.
        AssertionError: If the exported network does not compute the same.
    """
    original = open_original(find_file(settings.run))
    ending = ENDINGS[settings.to]
    out = settings.out if settings.out.suffix == ending or not ending else Path(f"{settings.out}{ending}")
    if not ending and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"it exists already; {out}; choose another --out")
    if ending and out.exists() and ((out.parent / "config.yaml").exists() or out.samefile(original.path)):
        raise ConfigError(f"a file of a run; {out}; choose another --out")
    # A folder that is there already stays: it may be a link or a mount, which no other folder can replace.
    fills = not ending and out.exists()
    place, name = out if fills else out.parent, out.absolute().name
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place, prefix=f".{name}.") as folder:
        write(settings, original, Path(folder) / name)
        for path in (path for path in Path(folder).rglob("*") if path.is_file()):
            flush(path)
        for path in (Path(folder) / name if fills else Path(folder)).iterdir():
            path.replace(place / path.name)  # a graph of over 2 GB has its weights in another file
    print(f"wrote {out}, with the outputs of {original.path}; {usage(settings.to, original, out)}")
    return {"out": str(out), "network": str(original.path), "kind": original.kind}


def write(settings: ExportSettings, original: Original, path: Path) -> None:
    """Write one format and check it."""
    match settings.to:
        case "timm":
            write_timm(original, path)
        case "onnx":
            write_onnx(original, path)
        case "torch":
            write_torch(original, path)
        case "hf":
            runs = describe_runs(original.path.parent)
            named = settings.out.resolve().name
            write_hub(
                original, path, {"name": named, "license": settings.license, "runs": runs, "version": version("dmjd")}
            )


def usage(to: str, original: Original, out: Path) -> str:
    """Describe in a few lines what the file holds and how to load it."""
    beside = ""
    if to in ("timm", "hf") and original.kind in ("segmenter", "detector"):
        beside = f"the backbone alone, for the format has no {original.kind}s; "
    match to:
        case "timm":
            return f"{beside}in Python:\n\n{how_to_load(original, out)}"
        case "hf":
            model = AUTO[original.kind == "classifier"][0]
            return (
                f"{beside}in Python:\n\n{imports(original)}model = timm.create_model({f'local-dir:{out}'!r}, "
                f"pretrained=True).eval()\n\nor transformers.{model}.from_pretrained({str(out)!r}); "
                "read README.md there, the model card, before you publish it"
            )
        case "onnx":
            return f"it takes any number of float32 images of 0 to 1 (opset {OPSET}); its metadata say more"
        case _:
            return f"in Python:\n\nimport torch\n\nmodel = torch.export.load({str(out)!r}).module()  # images of 0 to 1"


def find_file(run: Path) -> Path:
    """Find the network in the directory of a run.

    Raises:
        CheckpointError: If there is none.
    """
    if not run.is_dir():
        return run
    found = next((run / name for name in FILES if (run / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"no network in it; {run}; give a finished run, or a file")
    return found


def describe_runs(folder: Path) -> list[dict[str, Any]]:
    """Describe the run in a directory for a model card, after the run whose backbone it started from."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except FileNotFoundError:  # a linear classifier on features leaves no run to resume
        found = results(folder, 1)
        return [{"title": "Linear classifier", "facts": found}] if found else []
    except (UnicodeDecodeError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict) or not settings.keys() >= OF_RUNS:  # of another program
        return []
    backbone = Path(settings.get("backbone", ""))  # or timm:NAME
    other = backbone.is_file() and backbone.parent.resolve() != folder.resolve()  # a run may start in its own folder
    before = describe_runs(backbone.parent) if other else []
    key = next((key for key in KINDS if key in settings), None)
    title = KINDS[key][0] if key else "Training"
    facts = {
        "data": Path(settings["data"]).name,  # its location is private
        "recipe": settings.get("preset"),
        "length": length(settings),
        "images in a step": settings["batch_size"],
        "settings that differ from the recipe": differing(settings, key),
    }
    views = settings.get("masking", {}).get("num_views", 1)
    return [*before, {"title": title, "facts": {**facts, **results(folder, views)}}]


def length(settings: Mapping[str, Any]) -> str:
    """Describe the planned length of a run."""
    if "steps" in settings:
        return f"{settings['steps']} steps"
    return f"{settings['epochs']:g} epochs" if settings["epochs"] else "as many epochs as its images need"


def differing(settings: Mapping[str, Any], key: str | None) -> str:
    """List the settings of a run that differ from its preset, or the defaults."""
    if key is None:
        return "see its config.yaml"
    _, default, presets = KINDS[key]
    preset = presets / f"{settings.get('preset')}.yaml"
    recipe = yaml.safe_load(preset.read_text("utf-8")) if preset.is_file() else {}
    expected = by_flag(to_dict(default())) | by_flag(recipe)
    return (
        ", ".join(
            f"{name} {value}"
            for name, value in by_flag(settings).items()
            if name.partition(".")[0] not in UNTOLD and str(value) != str(expected.get(name))
        )
        or "none"
    )


def results(folder: Path, views: int) -> dict[str, Any]:
    """Read the results of a run, by their names in the model card; `views` is the number of views of an image."""
    found: dict[str, Any] = {}
    if summary := read_facts(folder / "summary.json"):  # of pre-training
        effective = summary["images"] * views / summary["num_images"]
        found = {"images": summary["num_images"], "effective epochs": f"{effective:.4g}", "seconds": summary["seconds"]}
        for key, value in summary.get("trained", {}).items():
            before = summary.get("untrained", {}).get(key)
            found[RESULTS.get(key, key)] = f"{value:.4g}" + (f" (untrained: {before:.4g})" if before else "")
    else:
        result = read_facts(folder / "result.json")
        found = {RESULTS.get(key, key): value for key, value in result.items()}
    return found
