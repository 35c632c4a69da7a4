"""`--compile` changes nothing but the speed."""

import json

import pytest

from dmjd.cli import main


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler, about itself
def test_compile__gives_the_losses_of_the_plain_run(tmp_path, colours):
    losses = []
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        line = [
            "pretrain",
            "--preset",
            "quick",
            "--data",
            str(colours),
            "--steps",
            "3",
            "--batch_size",
            "8",
            "--out",
            str(tmp_path / name),
        ]
        assert main([*line, *flags, "--device", "cpu", "--monitor.log_every", "1", "--model.depth", "1"]) == 0
        lines = [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert (tmp_path / name / "backbone.safetensors").is_file()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
