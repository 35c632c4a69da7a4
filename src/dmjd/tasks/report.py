"""`dmjd report`: the page of a run, written anew from what the run has recorded."""

from pathlib import Path

from dmjd.reports.pretraining import write_report


def report(run: Path) -> None:
    """Write `run`/report.html and print its path.

    Raises:
        ConfigError: If it is the directory of another verb, which writes its own page.
        CheckpointError: If the pictures of the run are broken.
        FileNotFoundError: If it is no run's directory.
    """
    print(write_report(run))
