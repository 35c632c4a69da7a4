"""What `--precision auto` came to is kept by a run, wherever it goes on."""

import json

from dmjd.cli import main

SMALL = [
    "--model.embed_dim=8",
    "--model.depth=1",
    "--model.num_heads=2",
    "--model.image_size=16",
    "--model.patch_size=4",
]
HEADS = ["--decoder.embed_dim=8", "--decoder.depth=1", "--decoder.num_heads=2", "--monitor.max_images=4"]


def test_auto__a_resumed_run_keeps_the_precision_it_had(paint, tmp_path):
    images, out = paint(tmp_path / "images", {"red": 8, "blue": 8}), tmp_path / "run"
    run = ["pretrain", "--preset=quick", f"--data={images}", f"--out={out}", "--batch_size=4", "--workers=0"]
    run += [*SMALL, *HEADS, "--monitor.evals=0", "--device=cpu"]

    def kept(steps):
        return json.loads((out / "checkpoints" / f"step-{steps:08d}" / "state.json").read_text())["precision"]

    assert main([*run, "--steps=2", "--precision=bf16"]) == 0
    assert kept(2) == "bf16"
    assert main([*run, "--steps=3", "--resume", "--allow_change=precision"]) == 0  # auto is float32 for such a network
    assert kept(3) == "bf16"
