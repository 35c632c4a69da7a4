"""Every verb on two ranks: what it writes is what one rank writes, and rank 0 alone speaks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from prefork import start_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "equality"))
import runs

from dmjd.cli import main

pytestmark = pytest.mark.long
SHORT = ["--steps", "4", "--device", "cpu", "--workers", "0", "--precision", "fp32"]
VERBS = ("knn", "embed", "linear", "finetune", "segment", "detect", "pretrain")


def spread_out(trained, root):
    """The verbs that train with labels again, their networks shared out; fine-tuning judges a running mean."""
    for name, line in trained.items():
        mean = ["--ema", "0.9"] if name == "finetune" else []
        yield [*line[:-1], f"{root}/{name}-fsdp", "--parallel", "fsdp", *mean]


def commands(data, root):
    """Short command lines of all verbs, which write below `root`."""
    start = ["--backbone", runs.VIT, "--device", "cpu", "--precision", "fp32", "--workers", "0"]
    classes = ["--data", f"{data}/classes"]
    trained = {
        name: [word.replace("{}", str(data)) for word in runs.COMMANDS[name]] + [*SHORT, "--out", f"{root}/{name}"]
        for name in ("linear", "finetune", "segment", "detect")
    }
    return [
        ["knn", *classes, *start, "--out", f"{root}/knn", "--batch_size", "5"],
        ["embed", *classes, *start, "--out", f"{root}/features.npy", "--batch_size", "5"],
        *trained.values(),
        [
            "predict",
            *classes,
            *start[2:],
            "--backbone",
            f"{root}/linear/linear.safetensors",
            "--out",
            f"{root}/seen.csv",
        ],
        ["search", "--features", f"{root}/features.npy", "--query", f"{data}/classes/val", "--out", f"{root}/near"],
        *spread_out(trained, root),
        [
            *(
                "pretrain",
                "--preset",
                "quick",
                *classes,
                "--batch_size",
                "8",
                "--optim.clip_grad",
                "1.0",
                "--parallel",
                "fsdp",
            ),
            *("--monitor.log_every", "1", "--out", f"{root}/pretrain", *SHORT),
        ],
    ]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folders of what one rank and of what two ranks wrote, and what two ranks said."""
    root = tmp_path_factory.mktemp("verbs")
    runs.paint(root / "data")
    lines = root / "lines.json"
    lines.write_text(json.dumps(commands(root / "data", root / "two")))
    ranks = start_ranks([lines], Path(__file__).with_name("verbs.py"))
    for line in commands(root / "data", root / "one"):
        assert main(line) == 0
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    return root / "one", root / "two", "".join(out for out, _ in said)


def test_ranks__features_are_those_of_one_in_the_same_order(outputs):
    one, two, _ = outputs
    np.testing.assert_allclose(np.load(one / "features.npy"), np.load(two / "features.npy"), rtol=1e-5, atol=1e-6)
    assert (one / "features.csv").read_text() == (two / "features.csv").read_text()


def test_ranks__predictions_and_neighbours_are_of_the_same_images_in_the_same_order(outputs):
    one, two = (
        [
            [line.split(",")[0] for line in (folder / name).read_text().splitlines()]
            for name in ("seen.csv", "near/neighbours.csv")
        ]
        for folder in outputs[:2]
    )
    assert one == two
    assert all(len(lines) > 8 for lines in one)


def test_ranks__knn_is_that_of_one(outputs):
    results = [json.loads((folder / "knn" / "result.json").read_text()) for folder in outputs[:2]]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


@pytest.mark.parametrize("verb", ["finetune", "segment", "detect", "linear"])
def test_ranks__training_with_labels_writes_what_one_writes(outputs, verb):
    one, two = (folder / verb for folder in outputs[:2])
    files, others = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, two))
    assert files == others
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)
    )
    assert [line.keys() for line in first] == [line.keys() for line in second]
    result = json.loads((two / "result.json").read_text())
    assert result.keys() == json.loads((one / "result.json").read_text()).keys()


@pytest.mark.parametrize("verb", ["finetune", "segment", "detect", "linear"])
def test_ranks__a_network_that_is_shared_out_has_the_losses_of_copies(outputs, verb):
    one, two = (
        [json.loads(line) for line in (outputs[1] / name / "metrics.jsonl").read_text().splitlines()]
        for name in (verb, f"{verb}-fsdp")
    )
    for key in ("loss", "grad_norm"):
        values = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert len(values[0]) == 4
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    names = [{path.name for path in (outputs[1] / name).iterdir()} for name in (verb, f"{verb}-fsdp")]
    assert names[0] == names[1]


def test_ranks__pretraining_by_the_command_line_gives_the_losses_of_one(outputs):
    one, two = (
        [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        for folder in outputs[:2]
    )
    for key in ("loss", "loss_masked", "loss_visible", "grad_norm", "knn_top1", "linear_top1"):
        values = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert values[0]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_ranks__only_the_first_speaks(outputs):
    lines = outputs[2].splitlines()
    assert sum(line.startswith("{") for line in lines) == 12, (
        "one line of JSON for each verb that judges, embeds or looks"
    )
    assert sum(line.startswith("done in") for line in lines) == 1
