"""Errors that are not bugs of this program, each with its exit code.

Every message is one line: what happened; where; what to do. The command line prints it and exits with `exit_code`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that only a change outside the program can resolve."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(UserError):
    """A problem with images or labels."""

    exit_code = 3


class CheckpointError(UserError):
    """A problem with a checkpoint or a backbone file."""

    exit_code = 4


class NonFiniteError(UserError):
    """A loss or a gradient that is not finite."""

    exit_code = 5


class StorageError(UserError):
    """A full disk, or missing permissions."""

    exit_code = 6


class Stopped(SystemExit):
    """A signal stopped a run. Not an error: `except Exception` does not catch it.

    Attributes:
        said: The line for the user.
        received: Name of the signal, if this process received it.
    """

    def __init__(self, said: str, received: str | None = None):
        super().__init__(143)
        self.said, self.received = said, received


def one_line(error: Exception, most: int | None = None) -> str:
    """Bring what an error says, perhaps in many lines, to one of at most so many characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def extra(name: str, where: str, kind: type[UserError] = ConfigError) -> Iterator[None]:
    """Context for imports of packages that come with an extra of this distribution; `where` names what needs them.

    Raises:
        UserError: Of the given kind, if a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise kind(f"{error.name} is not installed; {where}; pip install 'dmjd[{name}]'") from None


@contextmanager
def refusing_settings() -> Iterator[None]:
    """Context for building networks from a user's settings, where a ValueError is the user's mistake.

    Raises:
        ConfigError: In place of a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None
