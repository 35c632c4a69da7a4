"""Targets of a frozen teacher that are kept on disk."""

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from prefork import start_ranks

from dmjd.backbones.feature_maps import FeatureMaps
from dmjd.cli import main
from dmjd.engine.target_cache import TargetCache, cache_targets
from dmjd.errors import StorageError
from dmjd.targets import HOG, Teacher

TINY = """--model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2
--decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --workers 0 --device cpu
--optim.warmup_epochs 0 --monitor.log_every 1 --steps 9"""


def teacher(seed: int = 0, layers: tuple[int, ...] = (-1,)) -> Teacher:
    torch.manual_seed(seed)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    network = timm.create_model("vit_tiny_patch16_224", **shape, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    return Teacher(FeatureMaps(network, layers=layers), (4, 4))


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def open_files() -> set[str]:
    return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


def rows(cache: TargetCache) -> int:
    return int(sqlite3.connect(cache.path).execute("SELECT count(*) FROM targets").fetchone()[0])


def test_cache__targets_are_the_teachers_and_crops_seen_before_are_not_computed_again(tmp_path):
    own = teacher()
    expected = own(images())
    with cache_targets(torch.nn.Sequential(HOG(8, cell_size=4), own), tmp_path) as (cache,):
        assert own.cache is cache
        first = own(images()[:2])
        torch.testing.assert_close(first, expected[:2], atol=2e-3, rtol=2e-3)  # float16
        assert rows(cache) == 2
        with torch.no_grad():
            for weight in own.maps.network.parameters():
                weight.zero_()  # whatever is computed from now on is wrong
        again = own(images()[[1, 0]])
        assert torch.equal(again, first[[1, 0]])
        mixed = own(images()[[0, 2]])
        assert torch.equal(mixed[0], first[0])
        assert not torch.allclose(mixed[1], expected[2], atol=1e-2)
        assert rows(cache) == 3


def test_cache__targets_are_those_of_the_precision_in_which_they_are_asked_for(tmp_path):
    own = teacher()
    expected = own(images())
    with cache_targets(own, tmp_path) as (cache,):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = own(images())
        found = own(images())
        assert rows(cache) == 2 * 3
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)  # float16
    assert not torch.allclose(rounded, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="lists open files as Linux does")
def test_cache__afterwards_no_file_is_open_also_on_errors(tmp_path):
    with pytest.raises(KeyError), cache_targets(teacher(), tmp_path) as (cache,):  # noqa: PT012
        assert str(cache.path) in open_files()
        raise KeyError
    assert str(cache.path) not in open_files()
    assert [path.suffix for path in tmp_path.iterdir()] == [".sqlite"]  # without a log beside it


def test_cache__another_teacher_has_another_file(tmp_path):
    given = [teacher(), teacher(1), teacher(layers=(0, 1))]
    assert len({TargetCache(each, tmp_path).path for each in given}) == 3
    assert TargetCache(teacher(), tmp_path).path in tmp_path.iterdir()


@pytest.mark.parametrize("grid", [(4, 4), (12, 20)], ids=["small", "large"])
def test_cache__the_estimate_is_the_size_of_the_file(grid, tmp_path):
    own = Teacher(teacher().maps, grid)
    cache = TargetCache(own, tmp_path)
    for start in range(0, 2000, 500):
        crops = torch.randint(0, 256, (500, 3, 32, 32), generator=torch.Generator().manual_seed(start))
        cache(crops.byte(), own)
    cache.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert 0.8 < cache.path.stat().st_size / cache.bytes_for(2000) <= 1


def test_cache__a_disk_too_small_and_a_file_that_is_no_cache_are_one_line(tmp_path):
    cache = TargetCache(teacher(), tmp_path)
    with pytest.raises(StorageError, match=r"needs .* GB, .* GB are free; .*; choose another --teacher.cache"):
        cache.reserve(10**13)
    cache.database.close()
    cache.path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match=r"no usable cache of targets .*; remove it"):
        TargetCache(teacher(), tmp_path)


def with_a_cache(folder: Path) -> list[str]:
    """Write images and a teacher, and return the flags of a run that caches its targets in `kept`."""
    for number in range(24):
        path = folder / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    timm.models.save_for_hf(teacher().maps.network, folder / "teacher")
    target = f"hog+timm:local-dir:{folder}/teacher"
    words = [*TINY.split(), "--data", str(folder / "photos"), "--masked.target", target]
    return [*words, "--crop.variants", "2", "--teacher.cache", str(folder / "kept")]


def test_pretrain__with_kept_targets_a_second_run_loses_the_same_and_computes_none(tmp_path, capsys):
    words = with_a_cache(tmp_path)
    losses, files = [], []
    for name in ("first", "second"):
        assert main(["pretrain", "--preset", "quick", *words, "--out", str(tmp_path / name)]) == 0
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
        (file,) = (tmp_path / "kept").glob("*.sqlite")
        files.append(sqlite3.connect(file).execute("SELECT crop FROM targets ORDER BY crop").fetchall())
    assert losses[0] == losses[1]
    trained_on = 24 - 1  # one is held out
    assert files[0] == files[1]
    assert 2 * trained_on <= len(files[0]) <= 3 * trained_on + 1  # evaluations look at the middle of all images
    assert "targets of 46 crops are kept in" in capsys.readouterr().err


@pytest.mark.long
def test_pretrain__a_network_that_is_shared_out_caches_targets_too(tmp_path):
    ranks = start_ranks(
        ["pretrain", "--preset=quick", *with_a_cache(tmp_path), f"--out={tmp_path}/run", "--parallel=fsdp"]
    )
    said = [process.communicate(timeout=240) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    (file,) = (tmp_path / "kept").glob("*.sqlite")
    (count,) = sqlite3.connect(file).execute("SELECT count(*) FROM targets").fetchone()
    assert count > 23  # two crops of each image, a few of them alike


def test_pretrain__a_cache_without_a_frozen_teacher_is_refused(tmp_path, capsys):
    words = [*TINY.split(), "--data", "shapes", "--crop.variants", "2", "--teacher.cache", str(tmp_path / "kept")]
    assert main(["pretrain", "--preset", "quick", *words, "--out", str(tmp_path / "run")]) == 2
    assert "no frozen teacher among the targets; --teacher.cache; leave it out" in capsys.readouterr().err
