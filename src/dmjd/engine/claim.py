"""One process, or one group of ranks, works in the directory of a run at a time."""

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dmjd.engine.distributed import Ranks, losing_others
from dmjd.engine.signals import stop_signals
from dmjd.errors import ConfigError, Stopped

LOCK = ".lock"


@contextmanager
def claim(out: Path, *, resume: bool, ranks: Ranks) -> Iterator[None]:
    """Lock the directory of a run, and handle the signals that stop one, until the verb ends.

    Raises:
        ConfigError: If another process has locked it; if it holds a run and `resume` is False; or if it does not exist
            and `resume` is True.
        Stopped: When a signal comes, or another rank has ended; the message says whether the run can resume from a
            checkpoint.
    """

    def advice() -> str:
        return f"{out}; " + ("go on with --resume" if has_checkpoints(out) else "there was nothing to save yet")

    locks: list[IO[str]] = []
    missing = [folder for folder in (out, *out.parents) if ranks.is_main and not folder.exists()]
    ranks.on_main(lambda: locks.extend(_take(out, resume=resume)))
    try:
        if ranks.on_main(lambda: holds_run(out)) and not resume:
            raise ConfigError(f"there is a run already; {out}; add --resume to go on with it or choose another --out")
        with stop_signals(advice), losing_others():
            yield
    except Stopped as stop:
        stop.said += f"; {advice()}"
        raise
    finally:
        for lock in locks:
            (out / LOCK).unlink(missing_ok=True)
            lock.close()
        with suppress(OSError):  # a refused run leaves no empty folders behind
            for folder in missing:
                folder.rmdir()


def has_checkpoints(out: Path) -> bool:
    """Tell whether a directory has checkpoints of a run, intact or not."""
    return any((out / "checkpoints").glob("step-*"))


def holds_run(out: Path) -> bool:
    """Tell whether a directory holds a run, even one whose settings were lost."""
    return (out / "config.yaml").exists() or has_checkpoints(out)


def refuse_run(out: Path) -> None:
    """Keep a verb that writes its results at once from writing into the directory of a run.

    Raises:
        ConfigError: If `out` holds a run.
    """
    if holds_run(out):
        raise ConfigError(f"it holds a run; {out}; choose another --out")


def refuse_input(data: str, written: Iterable[Path], *, folders: Iterable[Path] = ()) -> None:
    """Keep a verb from overwriting its input.

    Args:
        data: The input, as `--data` takes it; for an array, also the list of labels beside it.
        written: Files that the verb is about to write, and the folder that it writes into.
        folders: Folders in which it writes files named after images; no input may lie below them.

    Raises:
        ConfigError: If one of these is the input.
    """
    given = Path(data).resolve()
    labels = [given.with_suffix(".csv")] if given.suffix.lower() == ".npy" else []
    read = [path for path in written if path.resolve() in (given, *labels)]
    read += [path for path in folders if path.resolve() in (given, *given.parents)]
    if read:
        raise ConfigError(f"this is the input, or its folder; {read[0]}; choose another --out")


def _take(out: Path, *, resume: bool) -> list[IO[str]]:
    """Lock the directory, and record the owner; warn on stderr where the file system cannot lock."""
    if resume and not out.exists():
        raise ConfigError(f"there is no run to resume; {out}; leave --resume out, or check --out")
    out.mkdir(parents=True, exist_ok=True)
    while True:
        file = (out / LOCK).open("a+")
        try:
            locked = lock(file, out)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ConfigError(f"{owner} works in it; {out}; wait for it, or choose another --out") from None
        if not locked:
            file.close()
            (out / LOCK).unlink(missing_ok=True)
            return []
        # The previous owner may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == (out / LOCK).stat().st_ino:
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return [file]


def lock(file: IO[Any], out: Path) -> bool:
    """Lock an open file of a directory until it is closed; where that is impossible, warn on stderr and return False.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows; Lustre and NFS where locking is not set up
        print(f"warning: files cannot be locked here; {out}; start no second process in it", file=sys.stderr)
        return False
    return True
