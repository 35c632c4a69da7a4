"""`dmjd report`: rewrite the page of a run from its records, or compare several runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from dmjd.errors import ConfigError
from dmjd.reports.comparison import write_comparison
from dmjd.reports.pretraining import write_report


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run or of several, and print its path.

    Args:
        runs: Directories written by `dmjd pretrain`.
        out: The page. Default: RUN/report.html for one run, comparison.html in the working directory for several.

    Raises:
        ConfigError: If one is not the directory of a run, or of another verb, which writes its own page; or if `out` is
            a folder.
        CheckpointError: If the settings or the pictures of a run are broken.
    """
    (first, *others) = runs
    if out and out.is_dir():
        raise ConfigError(f"a folder; --out {out}; give the page a name, such as {out / 'comparison.html'}")
    page = write_comparison(runs, out or Path("comparison.html")) if others else write_report(first, out)
    print(page)
    return page
