"""Checks of single settings, and settings as YAML. Nothing in this package imports torch, so `--help` is instant."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from dmjd.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "presets"
LONGEST = 16_384  # side of a crop in pixels


def flag(settings: Any, name: str) -> str:
    """Name a setting as a user does, such as `optim.blr`; the section is `SECTION` of its class, if it has one."""
    return f"{getattr(settings, 'SECTION', '')}{name}"


def within(lowest: int | float, highest: int | float, settings: Any, *names: str) -> None:
    """Refuse numbers outside `lowest` .. `highest`, alone or in a tuple, and NaN; None passes.

    Every number has an upper bound, far beyond what anybody trains with: larger ones would exhaust memory or time
    before any error.

    Raises:
        ConfigError: If a number is out of range.
    """
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(lowest <= number <= highest for number in numbers):
            raise ConfigError(f"{flag(settings, name)} {value} is out of range; choose {lowest} to {highest}")


def ordered(lowest: int | float, highest: int | float, settings: Any, *names: str) -> None:
    """Refuse pairs of numbers outside `lowest` .. `highest`, or in descending order.

    Raises:
        ConfigError: If a pair is out of range or out of order.
    """
    within(lowest, highest, settings, *names)
    for name in names:
        low, high = getattr(settings, name)
        if low > high:
            raise ConfigError(f"{flag(settings, name)} {low, high}; low before high, within {lowest} to {highest}")


def one_of(choices: Any, settings: Any, *names: str) -> None:
    """Refuse values that are not among the choices of a `Literal`.

    Raises:
        ConfigError: If a value is not among them.
    """
    for name in names:
        if (value := getattr(settings, name)) not in get_args(choices):
            raise ConfigError(f"{flag(settings, name)} {value!r}; choose one of {', '.join(get_args(choices))}")


def names_settings(settings: Any, names: Sequence[str]) -> None:
    """Refuse names that no setting of a verb has.

    Raises:
        ConfigError: If a name is unknown.
    """
    known = [*flags_of(type(settings))]
    for name in names:
        if name not in known:
            hint = " or ".join(nearest(name, known)) or "a setting as config.yaml names it, such as optim.blr"
            raise ConfigError(f"no setting of this name; --allow_change {name}; did you mean {hint}?")


def height_width(name: str, size: str) -> tuple[int, int]:
    """Parse a size in pixels, SIDE or HEIGHTxWIDTH.

    Raises:
        ConfigError: If it is neither, or too large.
    """
    sides = str(size).split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,5}", side) and 0 < int(side) <= LONGEST for side in sides):
        raise ConfigError(f"{name} {size!r} is neither SIDE nor HEIGHTxWIDTH; choose 1 to {LONGEST} pixels")
    return int(sides[0]), int(sides[-1])


def is_flat(kind: Any) -> bool:
    """Tell whether the flags of a group's settings leave out the name of the group."""
    return get_origin(kind) is not None and any(getattr(each, "name", None) == ("*",) for each in kind.__metadata__)


def flags_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Map the flags of all settings of a verb (`data`, `optim.blr`) to their defaults, if any."""
    hints, found = get_type_hints(kind, include_extras=True), dict[str, Any]()
    for setting in fields(kind):
        hint = hints[setting.name]
        group = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if is_dataclass(group):
            found |= flags_of(group, prefix if is_flat(hint) else f"{prefix}{setting.name}.")
        else:
            found[f"{prefix}{setting.name}"] = None if setting.default is MISSING else plain(setting.default)
    return found


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Find the settings that a wrong name may mean: those of that name in any section, else those spelt like it."""
    by_last: dict[str, list[str]] = {}
    for each in known:
        by_last.setdefault(each.rpartition(".")[2], []).append(each)
    spelt = by_last | {each: [each] for each in known}
    close = get_close_matches(name, spelt, n=1)
    return by_last.get(name.rpartition(".")[2]) or [each for key in close for each in spelt[key]]


def plain(value: Any) -> Any:
    """Convert the value of a setting into a type of YAML."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def to_dict(settings: Any) -> dict[str, Any]:
    """Convert settings into plain YAML values, nested as in a settings file; settings that are None are left out."""
    found: dict[str, Any] = {}
    kinds = get_type_hints(type(settings), include_extras=True)
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if is_dataclass(value):
            found |= to_dict(value) if is_flat(kinds[setting.name]) else {setting.name: to_dict(value)}
        elif value is not None:
            found[setting.name] = plain(value)
    return found


def to_yaml(settings: Any) -> str:
    """Write settings as YAML."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False)
