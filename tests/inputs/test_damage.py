"""Files whose bits have changed: noticed and said in one line, skipped, or computed again; never wrong numbers."""

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmjd.backbones.feature_maps import FeatureMaps
from dmjd.backbones.files import load_around, load_backbone, read_task, save_backbone
from dmjd.backbones.vit import create_vit
from dmjd.cli import main
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.prepared import SET
from dmjd.data.source import open_parts
from dmjd.engine import checkpoint
from dmjd.engine.integrity import examine_backbone
from dmjd.engine.target_cache import TargetCache
from dmjd.errors import CheckpointError, DataError, StorageError
from dmjd.reference import read_weights
from dmjd.targets import Teacher

SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def zero_block(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content)) // 512 * 512
    content[start : start + 512] = bytes(len(content[start : start + 512]))


def damaged(path: Path, count: int) -> Iterator[str]:
    """Damage a file in so many ways, one after the other; every other one is a flipped bit. It is whole at the end."""
    good, rng = path.read_bytes(), random.Random(count)
    done = 0
    while done < count:
        content = bytearray(good)
        how = (flip, truncate, flip, zero_block)[done % 4]
        how(content, rng)
        if content != good:  # a block may have been zero before
            path.write_bytes(content)
            done += 1
            yield f"{how.__name__} {done}"
    path.write_bytes(good)


# -- backbones ---------------------------------------------------------------------------------------------------------


def said_of(model: nn.Module) -> dict[str, object]:
    default = {**model.pretrained_cfg, "value_range": model.value_range}
    return {name: default[name] for name in ("input_size", "mean", "std", "value_range", "num_classes")}


@pytest.mark.parametrize("count", [150, pytest.param(3_000, marks=pytest.mark.slow)])
def test_load_backbone__damage_is_an_error_or_changes_nothing(
    tmp_path: Path, backbones: dict[str, Path], count: int
) -> None:
    path = Path(shutil.copy(backbones["vit"], tmp_path / "backbone.safetensors"))
    whole, said = load_backbone(path), list[str]()
    for how in damaged(path, count):
        try:
            model = load_backbone(path)
        except CheckpointError as error:
            said.append(str(error))
            continue
        assert said_of(model) == said_of(whole), how
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items()), how
    assert len(said) > 0.98 * count
    assert "\n" not in "".join(said)
    assert examine_backbone(path)["tensors"] == len(whole.state_dict())


def network(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    encoder = create_vit("tiny", **SHAPE)
    return encoder, nn.Sequential(encoder.backbone, nn.Linear(16, 3))


@pytest.mark.parametrize("count", [50, pytest.param(1_000, marks=pytest.mark.slow)])
def test_load_around__damage_of_a_network_for_a_task_is_an_error_or_changes_nothing(tmp_path: Path, count: int) -> None:
    path = tmp_path / "last.safetensors"
    encoder, around = network()
    task = {"name": "segment", "classes": ["a", "b"]}
    statistics = ([0.4] * 3, [0.2] * 3)
    save_backbone(path, encoder.backbone, encoder.architecture, *statistics, around=around, task=task)
    said: list[str] = []
    for how in damaged(path, count):
        other = network(1)[1]
        try:
            described = read_task(path, "segment")
            load_around(path, other)
        except CheckpointError as error:
            said.append(str(error))
            continue
        assert described == task, how
        assert all(torch.equal(value, around.state_dict()[name]) for name, value in other.state_dict().items()), how
    assert len(said) > 0.98 * count
    assert "\n" not in "".join(said)
    load_around(path, network(1)[1])
    load_backbone(path)


def test_load_backbone__a_file_of_before_the_digest_loads(tmp_path: Path, backbones: dict[str, Path]) -> None:
    with safe_open(backbones["vit"], framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
    save_file(load_file(backbones["vit"]), tmp_path / "old.safetensors", metadata)
    old, new = load_backbone(tmp_path / "old.safetensors"), load_backbone(backbones["vit"])
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


def test_save_backbone__others_may_read_the_file_as_they_may_any_other(backbones: dict[str, Path]) -> None:
    (backbones["vit"].parent / "beside").write_text("")
    assert backbones["vit"].stat().st_mode == (backbones["vit"].parent / "beside").stat().st_mode


@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["given.pth", "legacy.pth", "given.safetensors"])
def test_read_weights__damage_of_a_file_of_others_is_an_error_or_tensors(tmp_path: Path, name: str, count: int) -> None:
    """Such files have no digest: what is in the tensors themselves cannot be noticed."""
    path, weights = tmp_path / name, {"a": torch.ones(20), "b": torch.zeros(3, 4)}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=name != "legacy.pth")
    said: list[str] = []
    for _ in damaged(path, count):
        try:
            found = read_weights(path)
        except CheckpointError as error:
            said.append(str(error))
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert len(said) > 0.1 * count
    assert "\n" not in "".join(said)


@pytest.mark.parametrize(
    "content", [{"model": torch.ones(2)}, {"model": {}}, {"model": {"a": 1}}, [torch.ones(1)], 1, {}]
)
def test_read_weights__what_is_no_dictionary_of_tensors_is_one_line(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "given.pth")
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        read_weights(tmp_path / "given.pth")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int) -> Path:
    torch.manual_seed(step)
    model = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 30)).square().sum().backward()
    optimizer.step()
    return checkpoint.save(folder, checkpoint.collect(model, model, optimizer), {"step": step})


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_latest__damage_of_a_checkpoint_makes_the_older_one_count(tmp_path: Path, name: str, count: int) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    found = 0
    for how in damaged(newer / name, count):
        taken = checkpoint.latest(tmp_path)
        assert taken in (older, newer), how
        found += taken == older
        assert taken == older or name == "MANIFEST.json"  # a flipped space may leave what that says
    assert found > 0.8 * count
    assert checkpoint.latest(tmp_path) == newer


# -- prepared sets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 2, 24, 3), dtype=np.uint8)
        path = root / "images" / ("a", "b")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    assert main(["prepare", "--data", str(root / "images"), "--out", str(root / "set"), "--size", "32"]) == 0
    return root / "set"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("all-00000.bin", 60), ("all.index.safetensors", 40), (SET, 30)),
        *(
            pytest.param(name, 1_000, marks=pytest.mark.slow)
            for name in ("all-00000.bin", "all.index.safetensors", SET)
        ),
    ],
)
def test_open_prepared__damage_is_an_error_or_a_skip_or_changes_nothing(
    prepared: Path, tmp_path: Path, name: str, count: int
) -> None:
    root = Path(shutil.copytree(prepared, tmp_path / "set"))
    (whole,) = open_parts(str(root), Wanted(3)).values()
    expected = [whole.read(index).clone() for index in range(len(whole))]
    names = [(whole.name(index), whole.label(index)) for index in range(len(whole))]
    said: list[str] = []
    for how in damaged(root / name, count):
        try:
            (images,) = open_parts(str(root), Wanted(3)).values()
        except DataError as error:
            said.append(str(error))
            continue
        assert [(images.name(index), images.label(index)) for index in range(len(images))] == names, how
        bad: list[str] = []
        for index, pixels in enumerate(expected):
            try:
                assert torch.equal(images.read(index), pixels), how
            except BadImage as reason:
                bad.append(str(reason))
        said += bad[:1]
        assert {*bad} <= {"changed since it was prepared"}
        assert len(bad) < 3 or name == SET, how
    assert len(said) > 0.5 * count if name == SET else len(said) == count
    assert "\n" not in "".join(said)


def test_open_prepared__a_set_of_before_the_checksums_opens(prepared: Path, tmp_path: Path) -> None:
    from dmjd.engine.checkpoint import sha256

    root = Path(shutil.copytree(prepared, tmp_path / "set"))
    index = load_file(root / "all.index.safetensors")
    save_file(index | {"places": index["places"][:, :5].contiguous()}, root / "all.index.safetensors")
    content = json.loads((root / SET).read_text()) | {"format": 1}
    path = root / "all.index.safetensors"
    content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (root / SET).write_text(json.dumps(content))
    (old,), (new,) = (open_parts(str(each), Wanted(3)).values() for each in (root, prepared))
    assert all(torch.equal(old.read(index), new.read(index)) for index in range(len(new)))


# -- targets of teachers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **shape, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    return Teacher(FeatureMaps(model, layers=(-1,)), (4, 4))


def crops() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def compute(teacher: Teacher) -> Callable[[torch.Tensor], torch.Tensor]:
    return super(Teacher, teacher).forward


def test_target_cache__an_entry_that_has_changed_is_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    cache = TargetCache(teacher, tmp_path)
    expected = cache(crops(), compute(teacher))
    rng = random.Random(0)
    for round in range(30):
        ((key, target),) = cache.database.execute("SELECT crop, target FROM targets LIMIT 1 OFFSET ?", (round % 4,))
        content = bytearray(target)
        (flip, truncate, zero_block)[round % 3](content, rng)
        cache.database.execute("UPDATE targets SET target = ? WHERE crop = ?", (bytes(content), key))
        computed: list[int] = []

        def counted(images: torch.Tensor, computed: list[int] = computed) -> torch.Tensor:
            computed.append(len(images))
            return compute(teacher)(images)

        assert torch.equal(cache(crops(), counted), expected)
        assert computed == [1]
        assert torch.equal(cache(crops(), counted), expected)
        assert computed == [1]  # and kept
    others = cache.database.execute("SELECT target FROM targets").fetchall()
    cache.database.execute("UPDATE targets SET target = ?", others[0])  # whole, but another crop's
    assert torch.equal(cache(crops(), compute(teacher)), expected)


@pytest.mark.parametrize("count", [40, pytest.param(1_000, marks=pytest.mark.slow)])
def test_target_cache__damage_of_its_file_is_an_error_or_changes_nothing(
    teacher: Teacher, tmp_path: Path, count: int
) -> None:
    cache = TargetCache(teacher, tmp_path)
    expected = cache(crops(), compute(teacher))
    cache.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cache.database.close()
    said: list[str] = []
    for how in damaged(cache.path, count):
        for left in tmp_path.glob("*.sqlite-*"):
            left.unlink()
        again = None
        try:
            again = TargetCache(teacher, tmp_path)
            assert torch.equal(again(crops(), compute(teacher)), expected), how
        except StorageError as error:
            said.append(str(error))
        finally:
            if again is not None:
                again.database.close()
    assert all("\n" not in each and ("remove it" in each or "free some space" in each) for each in said)


def test_target_cache__entries_of_before_the_hashes_are_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    cache = TargetCache(teacher, tmp_path)
    expected = cache(crops(), compute(teacher))
    database = sqlite3.connect(cache.path, isolation_level=None)
    database.execute("UPDATE targets SET target = substr(target, 9)")
    database.close()
    assert torch.equal(cache(crops(), compute(teacher)), expected)
