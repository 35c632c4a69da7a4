"""Killed and resumed, a run has the losses of an undisturbed one on the folder, whatever the images are packed in."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import resume

from dmjd.cli import main
from dmjd.data import memory
from dmjd.engine import checkpoint

KINDS = (
    *("folder", "list, csv", "list, tsv", "list, parquet", "list, txt", "zip, stored", "zip, deflated", "tar"),
    *("4 shards", "npy", "hf, saved", "parquet of images", "prepared", resume.DEEP),
)
Curve = list[tuple[float, ...]]


def train(flags: list[str], out: Path, kept: str, *more: str) -> Curve:
    """Train in this process, holding images in memory or reading them again and again; return the curve."""
    with pytest.MonkeyPatch.context() as patch:
        if kept == "read":
            patch.setattr(memory, "MEMORY_LIMIT", 0)
        assert main([*resume.RUN, *flags, "--workers", "0", "--out", str(out), *more]) == 0
    return resume.curve(out)


def logged(out: Path) -> list[str]:
    """Lines of the log: an evaluation, and one for every step."""
    return (out / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory):
    """Folder of what is remembered of sets, here and in other processes."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("DMJD_DATA", str(folder))
        yield folder


@pytest.fixture(scope="module")
def kinds(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of every kind of source, all of the same hundred images of noise."""
    root = tmp_path_factory.mktemp("kinds")
    names = [f"{'ab'[number // 50]}/{number:03d}.png" for number in range(100)]
    for number, name in enumerate(names):
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "folder" / name)
    return resume.pack(root / "folder", names, root)


@pytest.fixture(scope="module")
def unbroken(kinds: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Curve]:
    """Curves of undisturbed runs; images of other channels than those of the folder have one of their own."""

    @cache
    def trained(kind: str, kept: str) -> Curve:
        return train(kinds[kind], tmp_path_factory.mktemp("unbroken") / "run", kept)

    return lambda kind, kept: trained(kind if kind == resume.DEEP else "folder", kept)


def test_every_source__is_tried(kinds):
    assert tuple(kinds) == KINDS


@pytest.mark.slow
def test_pretrain__killed_on_a_folder_goes_on_in_its_zip(kinds, unbroken, caches, tmp_path):
    resume.kill([*resume.RUN, *kinds["folder"], "--out", str(tmp_path)], caches, "held")
    assert train(kinds["zip, stored"], tmp_path, "held", "--resume") == unbroken("folder", "held")


def check_resumption(kind: str, kept: str, kinds, unbroken, caches: Path, out: Path) -> None:
    """Kill a run, where a worker reads images if they are not held, and resume it in this process without workers."""
    resume.kill([*resume.RUN, *kinds[kind], "--out", str(out)], caches, kept)
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert resume.KILLED_AFTER <= checkpoint.read_state(newest)["step"] < resume.STEPS
    before = logged(out)[: resume.KILLED_AFTER + 1]
    curve = train(kinds[kind], out, kept, "--resume")
    assert logged(out)[: resume.KILLED_AFTER + 1] == before  # with the times of then: it did not begin again
    assert len(curve) == resume.STEPS
    assert curve == unbroken(kind, kept)


@pytest.mark.slow
def test_shards__killed_while_a_worker_reads_them_end_as_the_folder_unbroken(kinds, unbroken, caches, tmp_path):
    check_resumption("4 shards", "read", kinds, unbroken, caches, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["held", "read"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source__killed_and_resumed_ends_as_the_folder_unbroken(kind, kept, kinds, unbroken, caches, tmp_path):
    check_resumption(kind, kept, kinds, unbroken, caches, tmp_path)
