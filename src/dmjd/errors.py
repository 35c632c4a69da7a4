"""What can go wrong through no fault of this program, and the exit code that says so.

Every message is one line: what happened; where; what to do. The command line prints it and exits with `exit_code`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program has to change before it can go on."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """Usage or configuration."""

    exit_code = 2


class DataError(UserError):
    """Images or labels."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or a backbone file."""

    exit_code = 4


class NonFiniteError(UserError):
    """A loss or a gradient that is no number."""

    exit_code = 5


class StorageError(UserError):
    """Disk full, or no permission."""

    exit_code = 6


class Stopped(SystemExit):
    """A signal ended a run. Not an error: nothing that catches errors catches it.

    Attributes:
        said: The line for the user.
        received: Name of the signal, if it came to this process.
    """

    def __init__(self, said: str, received: str | None = None):
        super().__init__(143)
        self.said, self.received = said, received


def one_line(error: Exception, most: int | None = None) -> str:
    """Bring what an error says, perhaps in many lines, to one of at most so many characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def extra(name: str, where: str, kind: type[UserError] = ConfigError) -> Iterator[None]:
    """Import what an extra of this distribution brings in here; `where` says what needs it.

    Raises:
        UserError: Of this kind, if something is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise kind(f"{error.name} is not installed; {where}; pip install 'dmjd[{name}]'") from None


@contextmanager
def refusing_settings() -> Iterator[None]:
    """Make networks of a user's settings in here: what cannot be made of them is the user's mistake.

    Raises:
        ConfigError: If there is a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None
