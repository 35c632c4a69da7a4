"""`dmjd VERB [--preset NAME] [--config FILE] [--section.key VALUE ...]`: defaults < preset < file < flags.

`pretrain`, `plan` and the verbs that train on labels have presets and files; the others have only flags.
"""

import errno
import inspect
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from cyclopts import (
    App,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter, HelpPanel
from safetensors import SafetensorError

from dmjd import errors
from dmjd.config import auto, downstream
from dmjd.config.common import group
from dmjd.config.doctor import DoctorSettings
from dmjd.config.export import ExportSettings
from dmjd.config.load import by_flag, layers, read_yaml
from dmjd.config.plan import PlanSettings
from dmjd.config.predict import PredictSettings
from dmjd.config.prepare import PrepareSettings
from dmjd.config.pretrain import PretrainSettings
from dmjd.config.rules import PRESETS, nearest, plain, to_yaml
from dmjd.config.search import SearchSettings

PRINT_CONFIG = Annotated[
    bool,
    group("Run"),
    Parameter(negative="", show_default=False, help="Print the resolved settings as YAML, and do nothing else."),
]
PATIENCE = 10.0  # seconds that other processes wait for the first one to report the same error


class Verb(NamedTuple):
    """A row of the table of verbs: `dmjd NAME` calls the function NAME of the module `PACKAGE.NAME`."""

    name: str
    settings: Any
    does: str
    presets: Path | None = None  # folder of its recipes
    package: str = "dmjd.tasks"


VERBS = (
    Verb(
        "pretrain",
        PretrainSettings,
        "Pre-train a backbone on unlabelled images.\n\n"
        "The preset auto, the default, replaces the sizes, epochs, batch and learning rate below by what suits the "
        "images and the machine. With --preset NAME, this page shows the values of that preset.",
        PRESETS,
    ),
    Verb("knn", downstream.KnnSettings, "Classify held-out images by their nearest neighbours in feature space."),
    Verb(
        "linear",
        downstream.LinearSettings,
        "Train a linear probe on frozen features.",
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
    Verb("predict", PredictSettings, "Run a trained classifier, segmenter or detector on images."),
    Verb("embed", downstream.EmbedSettings, "Write the features of images to a file."),
    Verb("search", SearchSettings, "Find the nearest neighbours of images, or near-duplicates, by their features."),
    Verb("export", ExportSettings, "Export the network of a run to timm, Hugging Face, ONNX or torch.export."),
    Verb("plan", PlanSettings, "Estimate what a pre-training run will cost.", PRESETS),
    Verb("prepare", PrepareSettings, "Decode images once, shrink them and pack them for the other verbs."),
    Verb("doctor", DoctorSettings, "Examine a set of images, a run or a backbone, and report what is wrong with it."),
)


def verbs() -> tuple[Verb, ...]:
    """List the verbs: those of the table, and those that other distributions offer as entry points `dmjd.verbs`."""
    return (*VERBS, *(offered.load() for offered in entry_points(group="dmjd.verbs")))


def command(verb: Verb) -> Callable[..., None]:
    """Make the command-line function of a verb, whose flags are the fields of its settings."""

    def run_verb(settings: Any = None, *, print_config: bool = False) -> None:
        settings = verb.settings() if settings is None else settings
        if print_config:
            print(to_yaml(settings), end="")
            return
        # torch takes seconds to import, so import it only when a verb runs.
        getattr(import_module(f"{verb.package}.{verb.name}"), verb.name)(settings)

    needed = any(setting.default is setting.default_factory is MISSING for setting in fields(verb.settings))
    default = inspect.Parameter.empty if needed else verb.settings()
    kind = Annotated[verb.settings, Parameter(name="*")]
    described: Any = run_verb  # cyclopts reads the signature, the annotations and the docstring
    described.__signature__ = inspect.Signature(
        [
            inspect.Parameter("settings", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind),
            inspect.Parameter("print_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=PRINT_CONFIG),
        ]
    )
    described.__annotations__ = {"settings": kind, "print_config": PRINT_CONFIG}
    described.__doc__ = verb.does
    return described


def report(run: Path, /, *others: Path, out: Path | None = None, debug: bool = False) -> None:
    """Rewrite the report of a run from its records, or compare several runs on one page.

    Args:
        run: Directory of a pre-training run.
        others: Directories of other runs to compare it with, at most seven.
        out: File to write. Default: RUN/report.html for one run, comparison.html for several.
        debug: Show the traceback of an error.
    """
    from dmjd.tasks.report import report

    report([run, *others], out)


def application(
    below: Sequence[Path] = (),
    known: Sequence[Verb] | None = None,
    given: Mapping[str, Any] | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> App:
    """Build the command-line application.

    Args:
        below: YAML files with lower precedence than the flags, in descending order of precedence.
        known: Its verbs, if not all.
        given: Settings by their flags, which override those of the files.
        chosen: Settings by their flags, which override those of the last file: the choices of `--preset auto`.
    """
    offered = verbs() if known is None else known

    def layer(values: Mapping[str, Any], source: str) -> Dict:
        """Hold settings under the names of the verbs: the parser ignores one beside them that is named like a verb."""
        return Dict({verb.name: dict(values) for verb in offered}, source=source)

    files = [layer(read_yaml(path), str(path)) for path in below]
    if chosen:
        files.insert(-1, layer(chosen, "--preset auto"))
    app = App(
        name="dmjd",
        help="Masked image modelling: a folder of images in, a timm backbone out.",
        default_parameter=Parameter(name_transform=lambda name: name, negative_iterable=()),  # no --empty-layers
        config=[
            layer(given or {}, "the call"),
            *files,
            words,
            sections,
            whole_numbers,
        ],
        help_formatter=InForce(below),
        suppress_keyboard_interrupt=False,  # `main` reports that it was stopped
    )
    for place, verb in enumerate(offered):
        app.command(command(verb), name=verb.name, sort_key=place)
    app.command(report, name="report")
    app.register_install_completion_command(help="Make the shell complete verbs and flags.")
    return app


class InForce(DefaultFormatter):
    """Writes the help with the effective defaults: those of the files, if they have one.

    Args:
        below: The files, in descending order of precedence.
    """

    def __init__(self, below: Sequence[Path]):
        super().__init__()
        self.below = below

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Write a group of settings."""
        values: dict[str, Any] = {}
        for path in reversed(self.below):
            values |= by_flag(read_yaml(path)) | ({"preset": path.stem} if path.is_relative_to(PRESETS) else {})
        entries = []
        for entry in panel.entries:
            if entry.default in ("()", '""'):
                entry = entry.copy(default=None)  # the help text explains what an empty value means
            name = next((name.removeprefix("--") for name in entry.positive_names), "")
            value = values.get(name)
            said = f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)
            entries.append(entry if value is None else entry.copy(default=said, required=False))
        super().__call__(console, options, panel.copy(entries=entries))


def words(app: App, commands: Sequence[str], arguments: ArgumentCollection) -> None:
    """Convert YAML's truth values back to words for settings with these choices: YAML reads `on` or `no` as a bool."""
    for argument in arguments:
        choices = get_args(argument.hint) if get_origin(argument.hint) is Literal else ()
        meant = {str(yaml.safe_load(choice)): choice for choice in choices if choice in ("on", "off", "yes", "no")}
        argument.tokens[:] = [token.evolve(value=meant.get(token.value, token.value)) for token in argument.tokens]


def sections(app: App, commands: Sequence[str], arguments: ArgumentCollection) -> None:
    """Refuse a value for a section, which cyclopts would take for its first setting and the defaults of all others.

    Raises:
        ConfigError: If there is one.
    """
    for argument in arguments:
        if argument.children and argument.tokens:
            such = f"a section, not a setting; {argument.name} {argument.tokens[0].value}"
            raise errors.ConfigError(f"{such}; choose one of its settings, such as {argument.children[0].name}")


def whole_numbers(app: App, commands: Sequence[str], arguments: ArgumentCollection) -> None:
    """Refuse fractions for integer settings, which cyclopts would round; cyclopts calls this after the last layer.

    Raises:
        CoercionError: If there is one.
    """
    for argument in arguments:
        if re.search(r"\bint\b", str(argument.hint)):
            for token in argument.tokens:
                if "." in token.value:
                    raise CoercionError(argument=argument, token=token, target_type=int)


def layers_of(arguments: Sequence[str]) -> list[Path]:
    """Find the YAML files that a command line uses, in descending order of precedence, all below the flags."""
    verb = next((verb for verb in verbs() if arguments and verb.name == arguments[0]), None)
    if verb is None or verb.presets is None:
        return []
    given: dict[str, Any] = {
        name: flag_value(arguments, f"--{name}") for name in ("preset", "config", "out", "model.size")
    }
    return layers(verb.settings, verb.presets, given | {"resume": is_set(arguments, "--resume")})


def is_set(arguments: Sequence[str], name: str) -> bool:
    """Tell whether a boolean flag is set, as `--flag` or with a word that the parser accepts as true."""
    value = flag_value(arguments, name)
    return name in arguments or (value or "").lower() in {"true", "t", "yes", "y", "1"}


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Find the value of `--flag VALUE` or `--flag=VALUE`; like the parser, treat hyphens in names as underscores."""
    for flag, following in zip(arguments, [*arguments[1:], None], strict=True):
        spelt, equals, value = flag.partition("=")
        if spelt.replace("-", "_") == name.replace("-", "_"):
            return value if equals else following
    return None


def settings_of(verb: str, **given: Any) -> Any:
    """Resolve the settings of a call from Python as the command line does: defaults < preset < file < `given`.

    Args:
        verb: Name of the verb.
        given: Settings by the names of their flags; those of a section as a mapping, or each with the section and two
            underscores as prefix: `model={"size": "small"}` or `model__size="small"`. None means the default.

    Raises:
        ConfigError: If one is wrong, or a required one is missing.
    """
    row = next(each for each in verbs() if each.name == verb)
    values = {name.replace("__", "."): plain(value) for name, value in by_flag(given).items() if value is not None}
    below = layers(row.settings, row.presets, values) if row.presets else []

    def resolve(chosen: Mapping[str, Any]) -> Any:
        return parsed(application(below, (row,), values, chosen), [verb])

    try:
        return resolve(choice(below, values, resolve))
    except CycloptsError as error:
        raise errors.ConfigError(usage(error)) from None


def parsed(app: App, arguments: Sequence[str]) -> Any:
    """Parse the arguments of a verb without running it; returns its settings."""
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    return bound.arguments["settings"]


def choice(
    below: Sequence[Path], given: Mapping[str, Any], resolve: Callable[[Mapping[str, Any]], Any]
) -> Mapping[str, Any]:
    """Let `--preset auto`, if it is the lowest layer, choose settings that are not given; a resumed run keeps its own.

    Args:
        below: The files below the flags.
        given: Values of the flags in `auto.OWN`.
        resolve: Resolves settings with a choice above the lowest layer.
    """
    if not below or below[-1] != PRESETS / "auto.yaml":
        return {}
    own = {name: value for path in reversed(below[:-1]) for name, value in by_flag(read_yaml(path)).items()}
    own |= {name: value for name, value in given.items() if value is not None}
    usual = plain_flags({"model": auto.image(own, auto.SIDES["cpu"][-1], "cpu")})  # a size that fits `own`
    settings = resolve(usual)
    out = settings.run.out
    refused = (out / "config.yaml").exists() or out.is_file() or (settings.run.resume and not out.exists())
    if refused or isinstance(settings, PlanSettings):
        return usual  # the verb will refuse, or resume with the earlier choice: no need to read images
    from dmjd.automatic import choose  # imports torch

    return plain_flags(choose(settings, own, lambda chosen: resolve(plain_flags(chosen))))


def plain_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to plain values by their flags, as in files."""
    return {name: plain(value) for name, value in by_flag(values).items()}


def run(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the verb; errors propagate."""
    meant = [verb for verb in verbs() if arguments and verb.name == arguments[0]]  # alone, it is built sooner
    below, chosen = layers_of(arguments), dict[str, Any]()
    if not {"--help", "-h", "--version"} & {*arguments}:
        given = {name: flag_value(arguments, f"--{name}") for name in auto.OWN}
        chosen |= choice(below, given, lambda chosen: parsed(application(below, meant, None, chosen), arguments))
    app = application(below, meant or None, None, chosen)
    app(arguments, exit_on_error=False, print_error=False, result_action="return_value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; a user's mistake becomes one line on stderr and the documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # By default OpenMP's threads spin while they wait, which made a step four times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be text
    try:
        run(arguments)
    except (errors.UserError, CycloptsError, yaml.YAMLError, OSError, SafetensorError) as error:
        if is_set(arguments, "--debug"):
            traceback.print_exc()
        code, message = explain(error)
        say_error(message)
        return code
    except KeyboardInterrupt:  # when there was nothing to save
        say_stopped("stopped")
        return 130
    except errors.Stopped as stop:
        say_stopped(stop.said)
        return 143
    except SystemExit as stop:  # --help, --version
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def say_error(message: str) -> None:
    """Print an error line, under torchrun only once for all processes.

    When one process exits with an error, torchrun ends the others. All processes except the first wait for that, so
    that they print their error only if the first has none.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        time.sleep(PATIENCE)
    print(f"error{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)


def say_stopped(message: str) -> None:
    """Print the line of a run that was stopped, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def explain(error: Exception) -> tuple[int, str]:
    """Convert an error into an exit code and one line."""
    message = errors.one_line(error)
    if isinstance(error, errors.UserError):
        return error.exit_code, message
    if isinstance(error, FileNotFoundError):
        return errors.DataError.exit_code, message
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else message
        todo = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check disk and permissions"
        return errors.StorageError.exit_code, f"{reason}; {error.filename or 'while writing'}; {todo}"
    if isinstance(error, SafetensorError):  # raised by writing: readers convert theirs
        return errors.StorageError.exit_code, f"{message}; while writing tensors; check disk and permissions"
    said = usage(error) if isinstance(error, CycloptsError) else message
    return errors.ConfigError.exit_code, f"{said}; `dmjd --help` lists verbs, `dmjd VERB --help` settings"


def usage(error: CycloptsError) -> str:
    """Format a parser error in one line that names the flag and suggests a correction for an unknown one."""
    if isinstance(error, MissingArgumentError) and error.argument and error.argument.name == "*":
        # Settings outside a section have no name that a user could type: report which flag is missing.
        error.argument = next(flag for flag in error.argument.children if flag.required and not flag.has_tokens)
    message = re.sub(r"\[([\w.]+)\]", r"\1", errors.one_line(error).replace("][", ".")).rstrip(".")
    if isinstance(error, MissingArgumentError) and error.argument and error.argument.name == "--data":
        stray = f"not understood: {' '.join(error.unused_tokens)}; " if error.unused_tokens else ""
        return f"{stray}no data; --data; give a folder of images, or --data shapes for the built-in demo"
    if isinstance(error, UnusedCliTokensError):
        return f"not understood: {' '.join(error.unused_tokens or ())}; a flag of several values is given once for each"
    if isinstance(error, UnknownCommandError):
        return message.partition(" Available commands:")[0].rstrip(".")  # it lists only some of them
    if isinstance(error, UnknownOptionError):
        names = [name for argument in error.argument_collection if argument.parse for name in argument.names]
        wrong = re.sub(r"[^\w-]+", ".", (error.token.keyword or error.token.value).partition("=")[0]).strip(".-")
        meant = nearest(wrong, [name.removeprefix("--") for name in names])
        hint = ". Did you mean " + " or ".join(f"--{name}" for name in meant) + "?" if meant else ""
        return message.partition(" Did you mean ")[0].rstrip(".") + hint
    if isinstance(error, CoercionError) and error.argument and error.argument.name.strip("-") not in message:
        return f"{error.argument.name}: {message}"
    return message


if __name__ == "__main__":
    sys.exit(main())
