"""The programs for a GPU work before there is one: on a CPU, with networks of nothing."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dmjd
from dmjd.planning.work import StepParts, count

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_correct
import gpu_speed
import gpu_verbs

SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of six training and two test images."""
    for part, each in (("train", 6), ("test", 2)):
        for value, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = np.random.default_rng(number).integers(100, size=(16, 16, 3), dtype=np.uint8) + np.uint8(
                    150 * value
                )
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def make_kit(folder: Path, commit: str | None = None) -> Path:
    """Make a kit whose program is the one that is tested, of a commit, or of the one that is checked out here."""
    git = ["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "commit").write_text(commit or head)
    return folder


def gpu(root: Path, *words: object, **variables: object) -> None:
    """Run a part of gpu.sh below `root` on the CPU."""
    settings = {"DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    subprocess.run([str(root / "gpu.sh"), *map(str, words)], env=environment, check=True, stderr=subprocess.PIPE)


def test_pack__takes_the_first_training_images_of_each_class_and_all_test_images(images: Path, tmp_path: Path) -> None:
    gpu(BENCHMARKS, "pack", images, tmp_path / "images.zip", 3)
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        names = set(archive.namelist())
    assert names == {
        f"{part}/{name}/{number}.png"
        for part, each in (("train", 3), ("test", 2))
        for name in ("dark", "light")
        for number in range(each)
    }


def test_parts__refuse_a_kit_that_is_not_there_or_of_another_commit(tmp_path: Path) -> None:
    for kit, said in ((tmp_path / "none", "no kit"), (make_kit(tmp_path / "old", "0" * 40), "of commit 0000000")):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            gpu(BENCHMARKS, "correct", KIT=kit, OUT=tmp_path)
        assert refused.value.returncode == 2
        (line,) = refused.value.stderr.decode().splitlines()
        assert said in line
        assert str(kit) in line


@pytest.mark.long
def test_correct__finds_no_difference_between_a_cpu_and_itself(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    gpu(BENCHMARKS, "correct", "--toy", "--only", "masks", "crops", "step", KIT=kit, OUT=tmp_path)
    found = json.loads((tmp_path / "correct.json").read_text())
    checks = found["checks"]
    assert found["commit"] == (kit / "site" / "commit").read_text()
    assert found["versions"] == {name: version(name) for name in ("torch", "timm")}
    assert {check["check"] for check in checks} == {"masks", "crops", "step"}
    assert {check["of"] for check in checks if check["check"] == "step"} == set(gpu_correct.PRESETS)
    assert all(check["difference"] == 0 for check in checks)


@pytest.mark.slow
def test_correct__runs_are_equal_repeated_and_resumed_and_near_in_bf16(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    gpu(BENCHMARKS, "correct", "--toy", "--only", "curve", "repeat", "resume", "bf16", KIT=kit, OUT=tmp_path)
    checks = json.loads((tmp_path / "correct.json").read_text())["checks"]
    assert all(check["ok"] for check in checks)
    assert {check["of"] for check in checks} == set(gpu_correct.RUNS)
    assert all((check["difference"] > 0) == (check["check"] == "bf16") for check in checks)


def test_correct__goes_on_after_a_check_that_fails_and_fails_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"torn")
    flags = ["--device", "cpu", "--only", "masks", "golden", "--golden", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_correct.py", *flags, "--out", str(tmp_path / "correct.json")])
    assert gpu_correct.main() == 1
    checks = json.loads((tmp_path / "correct.json").read_text())["checks"]
    assert {check["of"]: check["ok"] for check in checks} == {"": True, "one": False, "two": False}
    assert all("error" in check for check in checks if not check["ok"])


@pytest.mark.slow
def test_verbs__say_and_write_the_same_twice(tmp_path: Path) -> None:
    verbs = gpu_verbs.Verbs(tmp_path, "cpu")
    for name in gpu_verbs.LINES:
        found = dict(verbs.compare(name))
        assert sum(int(part.split()[0]) for part in found) > 1, name
        assert set(found.values()) == {0}, (name, found)


def test_verbs__that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_verbs.LINES, "knn", "knn --data IMAGES --backbone RUN/none.safetensors")
    with pytest.raises(RuntimeError, match="exit 4: error: no such backbone"):
        list(gpu_verbs.Verbs(tmp_path, "cpu").compare("knn"))


def test_largest_difference__of_gradients_sees_one_weight_that_differs() -> None:
    model = dmjd.build("dmjd", "small", **SHAPE)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    masked = dmjd.block_masks(2, (4, 4), num_views=2, mask_ratio=0.6)
    other = copy.deepcopy(model)
    for each in (model, other):
        each(images, masked).total.backward()
    assert gpu_correct.largest_difference(other, model) == 0
    other.decoder.pred.weight.grad *= 1 + 2 * gpu_correct.GRADIENT
    assert gpu_correct.largest_difference(other, model) > gpu_correct.GRADIENT


def test_masks__that_differ_by_one_token_are_not_equal() -> None:
    masked = dmjd.block_masks(2, (4, 4), num_views=2, mask_ratio=0.6)
    other = masked.clone()
    other[0, 0, 0] ^= True
    assert gpu_correct.differing(masked, masked) == 0
    assert gpu_correct.differing(other, masked) == 1 / masked.numel()


def test_largest_batch__is_the_first_half_that_fits() -> None:
    tried = []

    def step(batch: int) -> None:
        tried.append(batch)
        if batch > 30:
            raise torch.OutOfMemoryError

    assert gpu_speed.largest_batch(step, 128) == 16
    assert tried == [128, 64, 32, 16]


def test_largest_batch__fails_where_one_image_does_not_fit() -> None:
    def step(batch: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        gpu_speed.largest_batch(step, 8)


def test_results__count_what_the_rounds_took() -> None:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    case = gpu_speed.Case("vit", "dm", gpu_speed.FOUR)
    contender = gpu_speed.Contender(case, "base", images, precision="fp32", toy=True)
    entry = gpu_speed.Entry(contender, 4, 1, None, {"aten::mm": 0.5}, [2.0, 1.0, 4.0])
    results = gpu_speed.results_of(entry, peak=contender.flops * 4 / 1e12)
    assert results["images_per_s"] == 2.0  # 4 images in the median of 2 s
    assert results["rows_per_s"] == 8.0  # of four views
    assert results["mfu"] == 0.5
    assert results["quartiles"] == [1.0, 4.0]
    assert results["operators"] == {"aten::mm": 0.5}


def test_operators__take_all_of_a_step() -> None:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    contender = gpu_speed.Contender(gpu_speed.Case("vit", "dm", {}), "base", images, precision="fp32", toy=True)
    profiles = [contender.operators(4) for _ in range(5)]  # an operator may be held up by another process
    for shares in profiles:
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert sum(shares.values()) <= 1
    assert max(sum(shares.values()) for shares in profiles) > 0.5
    assert any({"aten::mm", "aten::addmm"} & shares.keys() for shares in profiles)


@pytest.mark.slow
def test_speed__times_every_model_against_the_plain_forms(tmp_path: Path) -> None:
    flags = ["--toy", "--sizes", "base", "--precisions", "bf16", "--modes", "eager", "--batch", 4, "--rounds", 2]
    kit = make_kit(tmp_path / "kit")
    gpu(BENCHMARKS, "speed", *flags, KIT=kit, OUT=tmp_path)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["commit"] == (kit / "site" / "commit").read_text()
    assert found["errors"] == found["left_out"] == []
    timed = [(line["model"], line["preset"], line["form"], line["views"]) for line in found["results"]]
    assert len(timed) == len(set(timed)) == len(gpu_speed.CASES["base"])
    assert {("vit", "mae", "transformers", 1), ("convvit", "dmjd", "dense", 2), ("vit", "dm", "dmjd", 4)} <= set(timed)
    work = {case: line["gflop_per_image"] for case, line in zip(timed, found["results"], strict=True)}
    assert work["convvit", "dmjd", "dense", 2] > work["convvit", "dmjd", "dmjd", 2]


def test_speed__names_what_it_has_no_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--device", "cpu", "--toy", "--modes", "eager", "--precisions", "bf16", "--batch", "1", "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", *flags, "--out", str(tmp_path / "speed.json")])
    gpu_speed.main()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["results"] == found["errors"] == []
    assert len(found["left_out"]) == sum(map(len, gpu_speed.CASES.values()))


def test_speed__loses_nothing_else_where_one_model_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (gpu_speed.Case("vit", "mae", {}), gpu_speed.Case("vit", "dm", {}))
    monkeypatch.setattr(gpu_speed, "CASES", {"base": cases})
    go_round = gpu_speed.Entry.go_round

    def broken(entry: gpu_speed.Entry) -> None:
        if entry.contender.views == 2 and len(entry.seconds) == 1:
            raise RuntimeError("the kernel is broken")
        written.append(json.loads((tmp_path / "speed.json").read_text())["results"])
        go_round(entry)

    written: list[list[dict[str, object]]] = []
    monkeypatch.setattr(gpu_speed.Entry, "go_round", broken)
    flags = ["--device", "cpu", "--toy", "--sizes", "base", "--modes", "eager", "--precisions", "fp32", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", *flags, "--rounds", "3", "--out", str(tmp_path / "speed.json")])
    gpu_speed.main()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [(line["preset"], line["rounds"]) for line in found["results"]] == [("mae", 3)]
    assert [(line["preset"], line["error"]) for line in found["errors"]] == [
        ("dm", "RuntimeError: the kernel is broken")
    ]
    assert [line["rounds"] for line in written[-1]] == [2]  # what a program that is killed in the last round leaves


def test_contender__counts_attention_and_depthwise_convolutions_as_a_plan_does() -> None:
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    for case in (gpu_speed.Case("vit", "dm", {}), gpu_speed.Case("convvit", "dmjd", {})):
        contender = gpu_speed.Contender(case, "base", images, precision="fp32", toy=True)
        parts = StepParts(
            create=partial(gpu_speed.create, case, "base", toy=True),
            optimizer=lambda network: torch.optim.AdamW(network.parameters()),
            image=(3, 32, 32),
            masks=contender.masks,
            hidden=contender.num_hidden,
        )
        assert contender.flops == pytest.approx(count(parts, precision="fp32", on_gpu=False).flops)


TOY_STUDY = {
    "data": {"classes": 2, "train": 4, "tune": 2},
    "rows": 4,
    "rates": {"values": [1e-3], "budget": 1},
    "judges": ["linear"],
    "common": {
        "preset": "dm",
        "model": {"size": "tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "image_size": 16, "patch_size": 4},
        "masking": {"num_views": 1, "mask_ratio": 0.5, "predict_ratio": 0.5, "block": 1},
        "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
        "monitor": {"max_images": 8, "evals": 0, "saves": 0},
    },
    "arms": {"untrained": {}},
    "runs": [{"cells": ["untrained@0"], "seeds": 1}],
}


@pytest.mark.slow
def test_study__brings_results_home_from_images_that_travelled_in_a_zip_file(images: Path, tmp_path: Path) -> None:
    root, kit, out = tmp_path / "repository", tmp_path / "kit", tmp_path / "out"
    (root / "benchmarks" / "studies").mkdir(parents=True)  # a copy of the programs, whose results go beside them
    for name in ("gpu.sh", "study.py"):
        shutil.copy(BENCHMARKS / name, root / "benchmarks")
    for name in ("toy", "other"):
        (root / "benchmarks" / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(TOY_STUDY))
    make_kit(kit, "0" * 40)
    gpu(root / "benchmarks", "pack", images, kit / "images.zip")
    gpu(root / "benchmarks", "study", "toy other", 5, 1, KIT=kit, OUT=out)
    with tarfile.open(out / "study.tar") as archive:
        for name in ("toy", "other"):
            result = archive.extractfile(f"{name}/untrained@0-0.json")
            assert result
            found = json.load(result)
            assert found["measures"]["linear"]["images"] == 4
            assert found["commit"] == "0" * 40
