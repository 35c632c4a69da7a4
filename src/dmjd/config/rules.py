"""Rules of single settings, and settings as YAML. Nothing in this package imports torch: `--help` is instant."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dmjd.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "presets"


def flag(settings: Any, name: str) -> str:
    """Name a setting as a user does: `optim.blr`; a class of settings says in `SECTION` which section it is, if any."""
    return f"{getattr(settings, 'SECTION', '')}{name}"


def at_least(lowest: int | float, settings: Any, *names: str) -> None:
    """Refuse numbers below `lowest` and those that are not finite; None passes.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not lowest <= value < math.inf:
            raise ConfigError(f"{flag(settings, name)} {value} is out of range; choose {lowest} or more")


def within(lowest: float, highest: float, settings: Any, *names: str) -> None:
    """Refuse numbers outside `lowest` .. `highest`.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if not lowest <= (value := getattr(settings, name)) <= highest:
            raise ConfigError(f"{flag(settings, name)} {value} is out of range; choose {lowest:g} to {highest:g}")


def one_of(choices: Any, settings: Any, *names: str) -> None:
    """Refuse values that are not among the choices of a `Literal`.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if (value := getattr(settings, name)) not in get_args(choices):
            raise ConfigError(f"{flag(settings, name)} {value!r}; choose one of {', '.join(get_args(choices))}")


def divides(batch_size: int, accumulation: int) -> None:
    """Refuse a batch that its parts do not divide.

    Raises:
        ConfigError: If there is a remainder.
    """
    if batch_size % accumulation:
        raise ConfigError(f"batch_size {batch_size} is no multiple of optim.accumulation {accumulation}")


def height_width(name: str, size: str) -> tuple[int, int]:
    """Read a size in pixels, SIDE or HEIGHTxWIDTH.

    Raises:
        ConfigError: If it is neither.
    """
    sides = str(size).split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ConfigError(f"{name} {size!r} is neither a number nor HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def is_flat(kind: Any) -> bool:
    """Tell whether the settings of a group go by their own names, without that of the group."""
    return get_origin(kind) is not None and any(getattr(each, "name", None) == ("*",) for each in kind.__metadata__)


def to_dict(settings: Any) -> dict[str, Any]:
    """Turn settings into plain YAML values, as a file of settings has them; those left at None are left out."""
    plain: dict[str, Any] = {}
    kinds = get_type_hints(type(settings), include_extras=True)
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if is_dataclass(value):
            plain |= to_dict(value) if is_flat(kinds[setting.name]) else {setting.name: to_dict(value)}
        elif value is not None:
            plain[setting.name] = (
                list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            )
    return plain


def to_yaml(settings: Any) -> str:
    """Write settings as YAML."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False)
