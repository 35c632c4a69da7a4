"""`dmjd report`: the page of a run, written anew from what it has recorded, or that of several runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from dmjd.errors import ConfigError
from dmjd.reports.comparison import write_comparison
from dmjd.reports.pretraining import write_report


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run or of several, and print where it is.

    Args:
        runs: Directories written by `dmjd pretrain`.
        out: The page; if None, RUN/report.html of one run and comparison.html, here, of several.

    Raises:
        ConfigError: If one is no run's directory, or that of another verb, which writes its own page; or if `out` is
            a folder.
        CheckpointError: If the pictures of the run are broken.
    """
    (first, *others) = runs
    if out and out.is_dir():
        raise ConfigError(f"a folder; --out {out}; give the page a name, such as {out / 'comparison.html'}")
    page = write_comparison(runs, out or Path("comparison.html")) if others else write_report(first, out)
    print(page)
    return page
