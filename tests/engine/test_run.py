"""What a run writes while it trains."""

import json
from pathlib import Path

import numpy as np
import pytest

from dmjd.config.pretrain import PretrainSettings
from dmjd.config.rules import flags_of
from dmjd.data.source import open_source
from dmjd.engine.distributed import join_ranks
from dmjd.engine.run import Run, read_metrics
from dmjd.errors import CheckpointError


def test_skipped__only_what_is_new_is_written_and_a_resumed_run_has_the_lines_that_its_checkpoint_knew(
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8, 3), np.uint8))
    images, out = open_source(str(tmp_path / "images.npy")).train, tmp_path / "run"
    settings = {"out": str(out), "batch_size": 4, "max_bad": 1.0}
    with join_ranks("cpu") as ranks:
        run = Run(settings, images, ranks=ranks, held_out=0, defaults={})
        run.begin()
        run.skip({"b": "cut", "a": "empty"})
        state = json.loads(json.dumps({**run.state(), "step": 1, "seconds": 1000.0}))
        run.skip({"a": "empty", "9": "no image", "b": "cut"})
        assert (out / "skipped.tsv").read_text() == "a\tempty\nb\tcut\n9\tno image\n"
        again = Run(settings, images, ranks=ranks, held_out=0, defaults={})
        again.restore(state)
        assert (out / "skipped.tsv").read_text() == "a\tempty\nb\tcut\n"
        assert again.seconds > 1000  # of both processes


LOSSES = ("model", "masking", "masked", "visible", "hog", "teacher", "decoder", "crop", "optim")  # sections
SINGLE = ("seed", "batch_size", "epochs", "precision", "deterministic", "init", "data_range", "data_statistics")


def test_restore__no_setting_that_changes_losses_may_differ(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8, 3), np.uint8))
    images, defaults = open_source(str(tmp_path / "images.npy")).train, flags_of(PretrainSettings)
    flags = [flag for flag in defaults if flag.partition(".")[0] in LOSSES + SINGLE]
    assert {flag.partition(".")[0] for flag in flags} == {*LOSSES, *SINGLE}
    settings = defaults | {"out": str(tmp_path / "run"), "log_to": [], "allow_change": []}
    with join_ranks("cpu") as ranks:
        run = Run(settings, images, ranks=ranks, held_out=0, defaults={})
        run.begin()
        state = {**run.state(), "step": 1}
        for flag in flags:
            with pytest.raises(CheckpointError, match=f"other settings: {flag} another -> "):
                run.restore(state | {"settings": settings | {flag: "another"}})
        run.restore(state | {"settings": settings | {"workers": "another"}})


def test_read_metrics__lines_that_are_not_whole_are_left_out_and_a_run_without_any_has_none(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert read_metrics(metrics) == []
    metrics.write_text('{"step": 1, "loss": 2.0}\n\0\0\n{"step": 2, "loss": 1.0}\n{"step": 3')
    assert [line["step"] for line in read_metrics(metrics)] == [1, 2]
