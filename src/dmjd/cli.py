"""`dmjd VERB [--preset NAME] [--config FILE] [--section.key VALUE ...]`: defaults < preset < file < flags."""

import errno
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import yaml
from cyclopts import (
    App,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
)
from cyclopts.config import Yaml
from safetensors import SafetensorError

from dmjd import errors
from dmjd.config import downstream
from dmjd.config.doctor import DoctorSettings
from dmjd.config.prepare import PrepareSettings
from dmjd.config.pretrain import PretrainSettings
from dmjd.config.rules import PRESETS, nearest

PATIENCE = 10.0  # seconds that the first process has to say the same error


class Verb(NamedTuple):
    """A row of the table of verbs: `dmjd NAME` is the function NAME of the module `PACKAGE.NAME`."""

    name: str
    settings: Any
    does: str
    presets: Path | None = None  # folder of its recipes
    package: str = "dmjd.tasks"


VERBS = (
    Verb("pretrain", PretrainSettings, "Pre-train a backbone on unlabelled images.", PRESETS),
    Verb("knn", downstream.KnnSettings, "Classify held-out images by their nearest neighbours in feature space."),
    Verb(
        "linear",
        downstream.LinearSettings,
        "Judge a frozen backbone by a linear classifier on its features.",
        PRESETS / "linear",
    ),
    Verb(
        "finetune",
        downstream.FinetuneSettings,
        "Train a backbone and a classifier on labelled images.",
        PRESETS / "finetune",
    ),
    Verb(
        "segment",
        downstream.SegmentSettings,
        "Train a backbone and UPerNet on images with a class for every pixel, or predict with them.",
        PRESETS / "segment",
    ),
    Verb(
        "detect",
        downstream.DetectSettings,
        "Train a backbone and Faster or Mask R-CNN on images with boxes, or predict with them.",
        PRESETS / "detect",
    ),
    Verb("embed", downstream.EmbedSettings, "Write the features of images to a file."),
    Verb("prepare", PrepareSettings, "Decode images once, make them smaller and pack them for the other verbs."),
    Verb("doctor", DoctorSettings, "Say what is in a set of images, a run or a backbone, and what is wrong with it."),
)


def verbs() -> tuple[Verb, ...]:
    """List the verbs: those of the table, and the rows that other distributions offer as `dmjd.verbs`."""
    return (*VERBS, *(offered.load() for offered in entry_points(group="dmjd.verbs")))


def command(verb: Verb) -> Callable[..., None]:
    """Make the function that the command line calls for a verb, whose settings' fields become its flags."""

    def run_verb(settings: Any = None) -> None:
        # torch takes seconds to import: only a verb that runs waits for it.
        task = getattr(import_module(f"{verb.package}.{verb.name}"), verb.name)
        task(verb.settings() if settings is None else settings)

    needed = any(setting.default is setting.default_factory is MISSING for setting in fields(verb.settings))
    default = inspect.Parameter.empty if needed else verb.settings()
    kind = Annotated[verb.settings, Parameter(name="*")]
    described: Any = run_verb  # cyclopts reads the signature, the annotations and the docstring
    described.__signature__ = inspect.Signature(
        [inspect.Parameter("settings", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)]
    )
    described.__annotations__ = {"settings": kind}
    described.__doc__ = verb.does
    return described


def report(run: Path, /, *, debug: bool = False) -> None:
    """Write RUN/report.html anew from what the run has recorded.

    Args:
        run: Directory of a pre-training run.
        debug: Show the traceback of an error.
    """
    from dmjd.tasks.report import report

    report(run)


def application(layers: Sequence[Path] = ()) -> App:
    """Make the command line; `layers` are YAML files, the first one has the last word after the flags."""
    app = App(
        name="dmjd",
        help="Masked image modelling: a folder of images in, a timm backbone out.",
        default_parameter=Parameter(name_transform=lambda name: name),
        config=[*(Yaml(path, use_commands_as_keys=False) for path in layers), whole_numbers],
    )
    for verb in verbs():
        app.command(command(verb), name=verb.name)
    app.command(report, name="report")
    return app


def whole_numbers(app: App, commands: Sequence[str], arguments: ArgumentCollection) -> None:
    """Refuse fractions where whole numbers belong, which cyclopts would round; it calls this after the last layer.

    Raises:
        CoercionError: If there is one.
    """
    for argument in arguments:
        if re.search(r"\bint\b", str(argument.hint)):
            for token in argument.tokens:
                if "." in token.value:
                    raise CoercionError(argument=argument, token=token, target_type=int)


def layers_of(arguments: Sequence[str]) -> list[Path]:
    """Find the YAML files below the flags: a run to resume, else --config, else --preset (or the default preset)."""
    verb = next((verb for verb in verbs() if arguments and verb.name == arguments[0]), None)
    if verb is None or verb.presets is None or "--help" in arguments:
        return []
    kinds = get_type_hints(verb.settings)
    defaults: Any = kinds["run"]
    sections = [name for name, kind in kinds.items() if hasattr(kind, "SECTION")]
    given = {name: flag_value(arguments, name) for name in ("--preset", "--config", "--out")}
    file = [Path(given["--config"])] if given["--config"] else []
    named = next((read_yaml(path, sections).get("preset") for path in file), None)
    preset = str(given["--preset"] or named or defaults.preset)
    names = sorted(path.stem for path in verb.presets.glob("*.yaml"))
    if preset not in names:
        nearest = get_close_matches(preset, names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(names)}"
        raise errors.ConfigError(f"no preset of this name; --preset {preset}; {hint}")
    path = verb.presets / f"{preset}.yaml"
    saved = Path(given["--out"] or defaults.out) / "config.yaml"
    if "--resume" in arguments and saved.is_file():
        read_yaml(saved, sections)
        # What is given again is compared with what was saved, not ignored.
        return [*file, *([path] if given["--preset"] else []), saved]
    if flag_value(arguments, "--model.size") and "embed_dim" in read_yaml(path).get("model", {}):
        raise errors.ConfigError(f"preset {preset} has a size of its own; --model.size; name another --preset")
    return [*file, path]


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Find the value of `--flag VALUE` or `--flag=VALUE`."""
    for flag, value in zip(arguments, [*arguments[1:], None], strict=True):
        if flag == name:
            return value
        if flag.startswith(f"{name}="):
            return flag.removeprefix(f"{name}=")
    return None


def read_yaml(path: Path, sections: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: If there is none, it holds no settings, or one of the sections is a single value.
    """
    if not path.is_file():
        raise errors.ConfigError(f"no configuration file; {path}; check --config")
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise errors.ConfigError(f"not YAML ({' '.join(str(error).split())}); {path}; correct the file") from None
    if not isinstance(content, dict):
        raise errors.ConfigError(f"no settings but a {type(content).__name__}; {path}; write `name: value` lines")
    for name in sections:
        if not isinstance(content.get(name) or {}, dict):
            raise errors.ConfigError(f"{name} is a section, not a value; {path}; write `{name}: {{name: value}}`")
    for name, value in content.items():
        for key, each in value.items() if isinstance(value, dict) else [(name, value)]:
            named = key if key is name else f"{name}.{key}"
            items = each if isinstance(each, list) else [each]
            if not all(isinstance(item, str | int | float | None) and "\0" not in str(item) for item in items):
                raise errors.ConfigError(f"{named} is neither a value nor a list of values; {path}; correct the file")
            if not (isinstance(name, str) and isinstance(key, str)):
                raise errors.ConfigError(f"{named} is no name of a setting; {path}; correct the file")
    return content


def run(arguments: Sequence[str]) -> None:
    """Parse the arguments and do what they say; errors are raised."""
    application(layers_of(arguments))(arguments, exit_on_error=False, print_error=False, result_action="return_value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; a user's mistake becomes one line on stderr and the documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # OpenMP's threads spin while they wait. On a machine that does anything else, that made a step four times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run(arguments)
    except (errors.UserError, CycloptsError, yaml.YAMLError, OSError, SafetensorError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = explain(error)
        say_error(message)
        return code
    except KeyboardInterrupt:  # while nothing was to be saved
        say_stopped("stopped")
        return 130
    except errors.Stopped as stop:
        say_stopped(stop.said)
        return 143
    except SystemExit as stop:  # --help, --version
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def say_error(message: str) -> None:
    """Print the line of an error; under torchrun once, of whatever number of processes.

    As soon as one process has ended with an error, torchrun ends the others. Those beside the first wait for that: they
    speak only if the first has nothing to say.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started it
        time.sleep(PATIENCE)
    print(f"error{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)


def say_stopped(message: str) -> None:
    """Print the line of a run that was stopped, by the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def explain(error: Exception) -> tuple[int, str]:
    """Turn a user's mistake into an exit code and one line."""
    message = " ".join(str(error).split())
    if isinstance(error, errors.UserError):
        return error.exit_code, message
    if isinstance(error, FileNotFoundError):
        return errors.DataError.exit_code, message
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else message
        todo = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check disk and permissions"
        return errors.StorageError.exit_code, f"{reason}; {error.filename or 'while writing'}; {todo}"
    if isinstance(error, SafetensorError):  # from writing: readers translate theirs
        return errors.StorageError.exit_code, f"{message}; while writing tensors; check disk and permissions"
    said = usage(error) if isinstance(error, CycloptsError) else message
    return errors.ConfigError.exit_code, f"{said}; `dmjd --help` lists verbs, `dmjd VERB --help` settings"


def usage(error: CycloptsError) -> str:
    """Write what the parser says in one line that names the flag, or what a wrong one may mean."""
    if isinstance(error, MissingArgumentError) and error.argument and error.argument.name == "*":
        # A group without a section has no name that a user could type: say which of its flags is missing.
        error.argument = next(flag for flag in error.argument.children if flag.required and not flag.has_tokens)
    message = re.sub(r"\[(\w+)\]\[(\w+)\]", r"\1.\2", " ".join(str(error).split())).rstrip(".")
    if isinstance(error, UnknownOptionError):
        names = [name for argument in error.argument_collection if argument.parse for name in argument.names]
        wrong = re.sub(r"[^\w-]+", ".", (error.token.keyword or error.token.value).partition("=")[0]).strip(".-")
        meant = nearest(wrong, [name.removeprefix("--") for name in names])
        hint = " Did you mean " + " or ".join(f"--{name}" for name in meant) + "?" if meant else ""
        return message.partition(" Did you mean ")[0] + hint
    if isinstance(error, CoercionError) and error.argument and error.argument.name.strip("-") not in message:
        return f"{error.argument.name}: {message}"
    return message


if __name__ == "__main__":
    sys.exit(main())
