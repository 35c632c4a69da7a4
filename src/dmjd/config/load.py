"""Where settings come from: defaults < preset < file < flags. This module finds and reads the files."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dmjd.errors import ConfigError, one_line


def layers(kind: Any, presets: Path, given: Mapping[str, Any]) -> list[Path]:
    """Find the YAML files that the given settings override: --config, then a run to resume, or else the preset.

    Args:
        kind: Settings of a verb.
        presets: Folder of its recipes.
        given: Settings of the command line or a call, by the names of their flags.

    Returns:
        The files, highest precedence first.

    Raises:
        ConfigError: If there is no such file or preset, or a file does not hold settings.
    """
    kinds = get_type_hints(kind)
    sections = [name for name, each in kinds.items() if hasattr(each, "SECTION")]
    defaults: Any = kinds["run"]
    file = [Path(given["config"])] if given.get("config") else []
    content = read_yaml(file[0], sections) if file else {}
    preset = str(given.get("preset") or content.get("preset") or defaults.preset)
    names = sorted(path.stem for path in presets.glob("*.yaml"))
    if preset not in names:
        nearest = get_close_matches(preset, names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(names)}"
        raise ConfigError(f"no preset of this name; --preset {preset}; {hint}")
    path = presets / f"{preset}.yaml"
    saved = Path(str(given.get("out") or content.get("out") or defaults.out)) / "config.yaml"  # `out: 2024` is a number
    if given.get("resume") and saved.is_file():
        own = read_yaml(saved, sections).get("preset")
        # A file or preset that is given again is compared with the saved settings, not ignored. The run's own preset is
        # left out: its values are saved, and flags or the choice of `auto` may have overridden them.
        return [*file, *([path] if given.get("preset") not in (None, own) else []), saved]
    if given.get("model.size") and "embed_dim" in read_yaml(path).get("model", {}):
        raise ConfigError(f"preset {preset} has a size of its own; --model.size; name another --preset")
    return [*file, path]


def by_flag(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name settings by their flags: those in sections, which are mappings, as SECTION.NAME."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


class Loader(yaml.SafeLoader):
    """Reads YAML, but refuses a name that is given twice, of which YAML's own loader silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping."""
        names = list[Any]()
        for name, _ in node.value:
            if name.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value} is given twice", name.start_mark)
            names.append(name.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, sections: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: If there is no such file, it holds no settings, or one of the sections is a single value.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file; {path}; check --config")
    try:
        content = Loader(path.read_text("utf-8")).get_single_data() or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not YAML ({one_line(error)}); {path}; correct the file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"no settings but a {type(content).__name__}; {path}; write `name: value` lines")
    for name in sections:
        if not isinstance(content.get(name) or {}, dict):
            raise ConfigError(f"{name} is a section, not a value; {path}; write `{name}: {{name: value}}`")
    for name, value in content.items():
        for key, each in value.items() if isinstance(value, dict) else [(name, value)]:
            named = key if key is name else f"{name}.{key}"
            items = each if isinstance(each, list) else [each]
            if not all(isinstance(item, str | int | float | None) and "\0" not in str(item) for item in items):
                raise ConfigError(f"{named} is neither a value nor a list of values; {path}; correct the file")
            if not (isinstance(name, str) and isinstance(key, str)):
                raise ConfigError(f"{named} is no name of a setting; {path}; correct the file")
    return content
