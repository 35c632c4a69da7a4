"""What a trained network says of images is what it said when it was judged, by the names of its classes."""

import csv
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dmjd
from dmjd.backbones.files import task_of
from dmjd.cli import main
from dmjd.config.predict import PredictRun, PredictSettings, TrainedSettings
from dmjd.reports.predictions import PredictionTable

QUICK = ["--device", "cpu", "--workers", "0"]
NAMES = ["blue", "green", "red"]


def run(*words, capsys=None):
    assert main([*map(str, words), *QUICK]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1]) if capsys else None


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(backbones, colours, tmp_path_factory):
    """Files of classifiers: fine-tuned, and linear by either recipe."""
    root = tmp_path_factory.mktemp("trained")
    data = ["--backbone", backbones["vit"], "--data", colours]
    short = ["--steps", 30, "--batch_size", 8, "--log.evals", 0]
    tuned = ["--optim.blr", 0.1, "--layer_decay", 1, "--optim.warmup_epochs", 1]
    run("finetune", *data, "--out", root / "finetune", *short, *tuned)
    run("linear", *data, "--out", root / "features")
    run("linear", *data, "--out", root / "paper", *short, "--recipe", "paper", "--blr", 1, "--warmup_epochs", 0)
    return {
        "finetune": root / "finetune" / "last.safetensors",
        "features": root / "features" / "linear.safetensors",
        "paper": root / "paper" / "linear.safetensors",
    }


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finetune", "features", "paper"])
def test_classifier__its_file_names_the_classes_and_plain_timm_opens_it(kind, trained):
    assert task_of(trained[kind]) == {"name": "classify", "classes": NAMES}
    with safe_open(trained[kind], "pt") as file:
        recipe = file.metadata()
    plain = timm.create_model(
        recipe["architecture"],
        **json.loads(recipe["model_args"]),
        pretrained_cfg_overlay=json.loads(recipe["pretrained_cfg"]),
        checkpoint_path=str(trained[kind]),
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images), dmjd.load_backbone(trained[kind])(images))


def test_linear__its_file_has_the_probabilities_of_scikit_learn(backbones, colours, trained, tmp_path, capsys):
    run("embed", "--backbone", backbones["vit"], "--data", colours, "--out", tmp_path / "f.npy")
    features, rows = np.load(tmp_path / "f.npy").astype(np.float64), rows_of(tmp_path / "f.csv")
    train = np.array([row["path"].startswith("train/") for row in rows])
    labels = np.array([row["label"] for row in rows])
    penalty = json.loads((trained["features"].parent / "result.json").read_text())["penalty"]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000, tol=1e-3))
    expected = probe.fit(features[train], labels[train]).predict_proba(features)
    run("predict", "--backbone", trained["features"], "--data", colours, "--out", tmp_path / "p.csv")
    found = [[float(row[name]) for name in probe.classes_] for row in rows_of(tmp_path / "p.csv")]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_linear__of_two_classes_and_of_one_that_has_no_images_its_file_is_right(tmp_path):
    from dmjd.evaluation.linear import class_probabilities, fit_logistic, logistic_head

    bank = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    labels = (bank[:, 0] > 7).long() * 2  # of three classes, the second is not there
    probe = fit_logistic(bank, labels)
    with torch.no_grad():
        found = logistic_head(probe, 3)(bank).softmax(dim=1)
    torch.testing.assert_close(found, class_probabilities(probe, bank, 3), atol=1e-5, rtol=0)
    assert not found[:, 1].any()


def test_linear__of_several_layers_there_is_no_file_and_it_says_so(backbones, colours, tmp_path, capsys):
    run("linear", "--backbone", backbones["vit"], "--data", colours, "--out", tmp_path, "--layers", -1, "--layers", 0)
    assert "no linear.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "linear.safetensors").exists()


# -- classifiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finetune", "features", "paper"])
def test_predict__has_the_accuracy_that_the_run_was_judged_by(kind, trained, colours, tmp_path, capsys):
    said = run("predict", "--backbone", trained[kind], "--data", colours / "val", "--out", tmp_path, capsys=capsys)
    judged = json.loads((trained[kind].parent / "result.json").read_text())
    assert said["top1"] == judged["top1"]
    assert (said["images"], said["skipped"], said["out"]) == (12, 0, str(tmp_path / "predictions.csv"))
    rows = rows_of(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == [f"{name}/{number:02d}.png" for name in NAMES for number in range(4)]
    for row in rows:
        shares = {name: float(row[name]) for name in NAMES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert max(shares, key=shares.get) == row["class"]
        assert float(row["probability"]) == shares[row["class"]]
    assert not (tmp_path / "skipped.tsv").exists()


def test_predict__top_writes_the_likeliest_and_json_an_object_a_line(trained, colours, tmp_path):
    command = ["predict", "--backbone", trained["finetune"], "--data", colours / "val", "--batch_size", 5, "--out"]
    run(*command, tmp_path / "all.csv")
    run(*command, tmp_path / "two.csv", "--top", 2)
    run(*command, tmp_path / "all.jsonl")
    run(*command, tmp_path, "--format", "json", "--top", 2)
    every, two = rows_of(tmp_path / "all.csv"), rows_of(tmp_path / "two.csv")
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    short = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [*two[0]] == ["path", "class", "probability", "class_2", "probability_2"]
    for whole, best, line, brief in zip(every, two, lines, short, strict=True):
        order = sorted(NAMES, key=lambda name: -float(whole[name]))
        assert [best["class"], best["class_2"]] == order[:2]
        assert best["probability_2"] == whole[order[1]]
        assert line["probabilities"] == {name: float(whole[name]) for name in NAMES}
        assert (line["path"], line["class"]) == (brief["path"], brief["class"]) == (whole["path"], whole["class"])
        assert [*brief["probabilities"]] == order[:2]


def test_predict__is_right_as_often_as_finetune_says_where_bf16_makes_classes_equal(backbones, paint, tmp_path, capsys):
    """The weights of the backbone are zero: what it learns in two steps is how frequent a class is, and a from b."""
    counts = {"train/a": 5, "train/b": 6, "train/c": 1, "val/a": 1, "val/b": 3}
    data, out = paint(tmp_path / "data", counts), tmp_path / "run"
    size = ["--steps", 2, "--batch_size", 12, "--log.evals", 0, "--precision", "bf16"]
    tuned = ["--optim.blr", 0.02, "--optim.warmup_epochs", 0, "--layer_decay", 1]
    told = run("finetune", "--backbone", backbones["blank"], "--data", data, "--out", out, *size, *tuned, capsys=capsys)
    command = ["predict", "--backbone", out / "last.safetensors", "--data", data / "val", "--precision", "bf16"]
    assert run(*command, "--out", tmp_path / "seen", capsys=capsys)["top1"] == told["top1"] == 0.75


@pytest.mark.slow
def test_predict__takes_a_network_with_several_maps_before_its_head(colours, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--data", colours, "--untrained", "--steps", 1, "--batch_size", 2, "--log.evals", 0]
    run("finetune", "--backbone", "timm:crossvit_9_240", *words, "--out", out)
    command = ["predict", "--backbone", out / "last.safetensors", "--data", colours / "val" / "red"]
    assert run(*command, "--out", tmp_path / "seen", capsys=capsys)["images"] == 4


def test_predict__leaves_out_what_does_not_decode_and_names_it(trained, colours, tmp_path, capsys):
    shutil.copytree(colours / "val" / "red", tmp_path / "images")
    (tmp_path / "images" / "01.png").write_text("no image")
    out = tmp_path / "out"
    command = ["predict", "--backbone", trained["finetune"], "--data", tmp_path / "images", "--batch_size", 1]
    said = run(*command, "--out", out, capsys=capsys)
    assert (said["images"], said["skipped"]) == (3, 1)
    assert "top1" not in said
    assert [row["path"] for row in rows_of(out / "predictions.csv")] == ["00.png", "02.png", "03.png"]
    name, reason = (out / "skipped.tsv").read_text().rstrip().split("\t")
    assert name == "01.png"
    assert reason
    (tmp_path / "images" / "01.png").unlink()
    assert run(*command, "--out", out, capsys=capsys)["skipped"] == 0
    assert not (out / "skipped.tsv").exists()


def test_predict__interrupted_it_says_so_and_leaves_an_earlier_table_as_it_was(trained, colours, tmp_path, capsys):
    def interrupt(*rest, **options):
        raise KeyboardInterrupt

    words = [*map(str, ["predict", "--backbone", trained["features"], "--data", colours, "--out", tmp_path]), *QUICK]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PredictionTable, "add", interrupt)
        assert main(words) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_predict__leaves_the_directory_of_a_run_alone(trained, colours, capsys):
    folder = trained["finetune"].parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for out in (folder, folder / "seen.csv"):
        words = ["predict", "--backbone", trained["finetune"], "--data", colours, "--out", out, *QUICK]
        assert main([*map(str, words)]) == 2
        assert capsys.readouterr().err.startswith("error: it holds a run; ")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("address", ["array", "list", "image"])
def test_predict__takes_every_kind_of_set_and_a_single_image(address, trained, colours, tmp_path, capsys):
    files = sorted((colours / "val" / "red").glob("*.png"))
    data = {"array": tmp_path / "images.npy", "list": tmp_path / "images.csv", "image": files[0]}[address]
    np.save(tmp_path / "images.npy", np.stack([np.array(Image.open(file)) for file in files]))
    if address == "list":
        data.write_text("path\n" + "".join(f"{file}\n" for file in files))
    run("predict", "--backbone", trained["finetune"], "--data", colours / "val" / "red", "--out", tmp_path / "folder")
    run("predict", "--backbone", trained["finetune"], "--data", data, "--out", tmp_path / "other")
    folder, other = (rows_of(tmp_path / name / "predictions.csv") for name in ("folder", "other"))
    assert [row["probability"] for row in other] == [row["probability"] for row in folder][: len(other)]
    assert len(other) == (1 if address == "image" else 4)


def test_predict__a_file_without_names_gives_the_numbers_of_classes(trained, colours, tmp_path, capsys):
    with safe_open(trained["finetune"], "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("task", "sha256")}
    older = tmp_path / "older.safetensors"
    save_file(load_file(trained["finetune"]), older, metadata)
    said = run("predict", "--backbone", older, "--data", colours / "val", "--out", tmp_path / "out", capsys=capsys)
    assert "top1" not in said
    assert [*rows_of(tmp_path / "out" / "predictions.csv")[0]] == ["path", "class", "probability", "0", "1", "2"]


def test_predictions__a_class_that_is_called_as_a_column_has_one_of_its_own(tmp_path):
    with closing(PredictionTable(tmp_path / "seen.csv", ["path", "class", "bird"])) as table:
        table.write("a.png", [0.1, 0.7, 0.2], [1])
        table.images = 1
        table.finish()
    (row,) = rows_of(tmp_path / "seen.csv")
    assert (row["path"], row["class"], row["probability"]) == ("a.png", "class", "0.700000")
    others = [row[name] for name in ("probability of path", "probability of class", "bird")]
    assert others == ["0.100000", "0.700000", "0.200000"]


@pytest.mark.parametrize("nasty", ["=1+1", '<b>,\n"quoted"'])
def test_predict__names_stay_in_their_cells(nasty, trained, colours, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(colours / "val" / "red" / "00.png", tmp_path / "images" / f"{nasty}.png".replace("/", ""))
    run("predict", "--backbone", trained["finetune"], "--data", tmp_path / "images", "--out", tmp_path)
    (row,) = rows_of(tmp_path / "predictions.csv")
    assert row["path"] == (f"'{nasty}.png" if nasty.startswith("=") else f"{nasty}.png")


@pytest.mark.parametrize(
    ("file", "data", "code", "said"),
    [
        ("vit", "val", 4, "a backbone without a classifier"),
        ("timm:resnet10t", "val", 4, "a backbone without a classifier; timm:resnet10t; run dmjd finetune"),
        ("nowhere", "val", 4, "no such backbone"),
        ("finetune", "nowhere", 3, "no such data"),
        ("finetune", "broken", 3, "none of 1 images decodes"),
    ],
)
def test_predict__a_users_mistake_is_one_line(file, data, code, said, backbones, trained, colours, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    network = {**backbones, **trained, "timm:resnet10t": "timm:resnet10t"}.get(file, Path("nowhere.safetensors"))
    images = colours / data if data == "val" else tmp_path / data
    words = ["predict", "--backbone", network, "--data", images, "--out", tmp_path / "out", *QUICK]
    assert main([*map(str, words)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not [*tmp_path.glob("out/*"), *tmp_path.glob("out/.*")]


def test_predict__a_file_of_a_format_that_it_does_not_write_is_refused_before_anything_is_read(tmp_path, capsys):
    out = tmp_path / "seen.json"
    assert main(["predict", "--backbone", "nowhere", "--data", "nowhere", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --out {out}: there are no .json files of predictions; take .csv or .jsonl"
    assert not out.exists()


@pytest.mark.parametrize(("name", "format"), [("p.csv", "json"), ("p.jsonl", "csv"), ("P.CSV", "json")])
def test_predict__a_format_other_than_the_file_ends_in_is_refused_before_anything_is_read(
    name, format, tmp_path, capsys
):
    out = tmp_path / name
    words = ["predict", "--backbone", "nowhere", "--data", "nowhere", "--out", str(out), "--format", format]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = f"--format {format} does not match the file extension; --out {out}; leave it out, or give"
    assert line.startswith(f"error: {said}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "format", "table"),
    [
        ("seen", None, "seen/predictions.csv"),
        ("seen", "json", "seen/predictions.jsonl"),
        ("seen.jsonl", None, "seen.jsonl"),
        ("SEEN.CSV", "csv", "SEEN.CSV"),
    ],
)
def test_predict__writes_to_the_file_that_out_names_or_to_one_in_this_folder(out, format, table):
    start, data = TrainedSettings(backbone="nowhere"), PredictRun(data="nowhere")
    assert PredictSettings(run=data, start=start, out=Path(out), format=format).table == Path(table)


# -- segmenters and detectors ------------------------------------------------------------------------------------------


def test_predict__of_a_segmenter_writes_what_segment_predict_writes(backbones, colours, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    for part in ("train", "val"):
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), dtype=np.uint8)
            for folder, array in (("images", pixels), ("annotations", pixels[..., 0] // 128)):
                (scenes / folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(scenes / folder / part / f"{number}.png")
    size = ["--crop_size", 32, "--decoder_channels", 8, "--steps", 1, "--batch_size", 4, "--log.evals", 0]
    run("segment", "--backbone", backbones["vit"], "--data", scenes, "--out", tmp_path / "run", *size)
    trained, images = tmp_path / "run" / "last.safetensors", scenes / "images" / "val"
    run("segment", "--backbone", trained, "--predict", images, "--out", tmp_path / "old")
    said = run("predict", "--backbone", trained, "--data", images, "--out", tmp_path / "new", capsys=capsys)
    assert said["images"] == 4
    old, new = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "old", tmp_path / "new")
    )
    assert old == new
    assert len(new) == 9

    # Nothing is written outside of --out, where images may lie, and the table of classes is never there in part.
    before = {path: path.read_bytes() for path in images.iterdir()}
    earlier, out, table = tmp_path / "earlier.txt", tmp_path / "listed", tmp_path / "images.txt"
    earlier.write_text("earlier")
    out.mkdir()
    os.link(earlier, out / "classes.txt")
    table.write_text("".join(f"{path}\n" for path in before))
    run("predict", "--backbone", trained, "--data", table, "--out", out)
    assert before == {path: path.read_bytes() for path in images.iterdir()}
    assert {*out.glob("masks/**/*.png")} == {out / "masks" / path.relative_to("/") for path in before}
    assert earlier.read_text() == "earlier"

    words = ["predict", "--backbone", trained, "--data", images, "--out", tmp_path / "new", "--top", 2]
    assert main([*map(str, words)]) == 2
    assert "--top and --format are for classifiers" in capsys.readouterr().err


def test_predict__of_a_detector_writes_what_detect_predict_writes(backbones, tmp_path, capsys, write_coco):
    data = write_coco(tmp_path / "data", {name: [(0, [5.0, 5.0, 20.0, 20.0], False)] for name in "ab"})
    size = ["--crop_size", 64, "--fpn_channels", 8, "--head_channels", 8, "--steps", 1, "--batch_size", 2]
    run("detect", "--backbone", backbones["vit"], "--data", data, "--out", tmp_path / "run", *size, "--log.evals", 0)
    trained, image = tmp_path / "run" / "last.safetensors", data / "images" / "a.png"
    run("detect", "--backbone", trained, "--predict", image, "--out", tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "earlier.json").write_text("earlier")
    os.link(tmp_path / "earlier.json", tmp_path / "new" / "detections.json")
    run("predict", "--backbone", trained, "--data", image, "--out", tmp_path / "new")
    assert (tmp_path / "earlier.json").read_text() == "earlier"  # replaced in one go
    old, new = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("old", "new"))
    assert old == new
    assert len(new["images"]) == 1
