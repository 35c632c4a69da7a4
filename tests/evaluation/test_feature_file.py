"""Rows of features that are appended survive what may happen to a machine, or their loss is noticed."""

import json
import os
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from dmjd.errors import CheckpointError, ConfigError, DataError
from dmjd.evaluation import feature_file
from dmjd.evaluation.feature_file import FeatureWriter, read_features


def append_twice(out: Path) -> None:
    """Write two batches of three rows, and leave the rest to another run."""
    with closing(FeatureWriter(out, {}, columns=["path"], dtype="float32")) as writer:
        writer.begin(resume=False)
        for start in (0, 3):
            rows = np.full((3, 4), start + 1, np.float32)
            writer.append(rows, [[f"{start + number}.png"] for number in range(3)], 0, (0, start + 3))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("name", ["f.npy.partial", "f.csv.partial"])
@pytest.mark.parametrize("lose", [cut, Path.unlink])
def test_begin__rows_that_got_lost_are_one_line(name: str, lose: Callable[[Path], None], tmp_path: Path) -> None:
    append_twice(tmp_path / "f.npy")
    lose(tmp_path / name)
    with (
        closing(FeatureWriter(tmp_path / "f.npy", {}, columns=["path"], dtype="float32")) as writer,
        pytest.raises(CheckpointError, match=f"rows are missing or truncated; .*{name}; leave out --resume"),
    ):
        writer.begin(resume=True)


def test_begin__a_second_process_is_refused_until_the_first_has_finished(tmp_path: Path) -> None:
    def writer() -> FeatureWriter:
        return FeatureWriter(tmp_path / "f.npy", {}, columns=["path"], dtype="float32")

    with closing(writer()) as first, closing(writer()) as second:
        first.begin(resume=False)
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"another process is writing these features; .*f\.npy; wait for it"):
                second.begin(resume=resume)
        first.append(np.ones((2, 3), np.float32), [["a.png"], ["b.png"]], 0, (0, 2))
        first.finish()
    assert np.load(tmp_path / "f.npy").tolist() == [[1.0] * 3] * 2
    with closing(writer()) as third:
        assert third.begin(resume=True) == (0, 0)


def test_append__the_disk_has_the_rows_before_the_state_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe: dict[str, int] = {}  # bytes of each file that the disk has for certain
    states: list[list[int]] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if ".json." in path.name:
            states.append(json.loads(path.read_text())["bytes"])
            assert [safe.get(name) for name in ("f.npy.partial", "f.csv.partial")] == states[-1]
        fsync(descriptor)
        safe[path.name] = path.stat().st_size

    monkeypatch.setattr(os, "fsync", noting)
    append_twice(tmp_path / "f.npy")
    assert len(states) == 2


def test_finish__memory_does_not_grow_with_the_rows_of_a_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_file, "ROW_GROUP", 2**10)
    feature_file.pyarrow()[0].array(["what it imports by and by is not counted"]).cast("large_string")
    count = 20_000
    with closing(FeatureWriter(tmp_path / "f.parquet", {}, columns=["path", "label"], dtype="float32")) as writer:
        writer.begin(resume=False)
        names = [[f"{number:05d}.png", *(["odd"] if number % 2 else [])] for number in range(count)]
        writer.append(np.arange(count, dtype=np.float32)[:, None], names, 0, (0, count))
        tracemalloc.start()
        writer.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50 * count  # bytes; a list of two texts takes about 200
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == [name for name, *_ in names]
    assert table["label"].to_pylist() == [None, "odd"] * (count // 2)
    assert table["feature"].to_pylist() == [[float(number)] for number in range(count)]


def test_read_features__an_empty_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "f.npy").write_bytes(b"")
    with pytest.raises(DataError, match="no features"):
        read_features(tmp_path / "f.npy")
