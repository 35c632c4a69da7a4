"""Registries of implementations by name: one new file, in the package or in another distribution, adds one."""

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dmjd.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations by name, registered by decorators.

    The first look-up imports every module of a package, and then everything that other distributions offer as entry
    points of the group with the package's name, so that their decorators run::

        register_target: Registry[Builder] = Registry("target", "dmjd.targets")

        @register_target("hog")
        def build_hog(request): ...

        register_target.get("hog")

    Args:
        noun: What an entry is called in messages, in the singular.
        package: Package whose modules register entries; also the group of the entry points.
        others: What users may give instead of a name, for messages.
    """

    def __init__(self, noun: str, package: str, others: str = ""):
        self.noun, self.package, self.others = noun, package, others
        self._entries: dict[str, T] = {}
        self._loaded = False

    def __call__(self, *names: str) -> Callable[[T], T]:
        """Make a decorator that registers an entry under one or more names.

        A function or class may be defined again, as when a notebook's cell is run once more: the last one counts.

        Raises:
            ValueError: If something else already has the name.
        """

        def register(entry: T) -> T:
            for name in names:
                if origin(self._entries.get(name, entry)) != origin(entry):
                    raise ValueError(f"there are two kinds of {self.noun} of the name {name!r}")
                self._entries[name] = entry
            return entry

        return register

    def names(self) -> list[str]:
        """List the names, in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Look up an entry by name.

        Raises:
            ConfigError: If there is no such name; the message has the nearest one, or all of them, and how to add one.
        """
        self._load()
        if name in self._entries:
            return self._entries[name]
        nearest = get_close_matches(name, self._entries, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(self.names())}"
        others = f", or give {self.others}" if self.others else ""
        own = f"one of your own: import its module first, or install it with an entry point of {self.package}"
        raise ConfigError(f"no {self.noun} of this name; {name}; {advice}{others}; {own}")

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports: a module may look up names while it is being imported
        try:
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            for entry_point in entry_points(group=self.package):
                entry_point.load()
        except BaseException:
            self._loaded = False
            raise


def origin(entry: object) -> tuple[str, str | int]:
    """Tell where a function or class is defined; of anything else, which object it is."""
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", id(entry))
