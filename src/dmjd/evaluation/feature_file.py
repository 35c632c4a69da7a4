"""Features in files: rows are appended as they are computed, so that a kill loses at most a batch; searches read them.

`F.npy` holds features, row by row; `F.csv` beside it the name of each row's image, and its label if it has one;
`F.json` what they were made from. `F.parquet` holds names, labels and features in one table. Until all rows are
written, they go to `F.npy.partial` and `F.csv.partial`, and the number of valid bytes to `F.json.partial`.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
from jaxtyping import Float
from numpy.lib import format as npy

from dmjd.data.cells import plain_cell
from dmjd.engine.checkpoint import flush, write_atomically
from dmjd.engine.claim import lock
from dmjd.errors import CheckpointError, ConfigError, DataError, extra, one_line

PARQUET = ".parquet"
ROW_GROUP = 2**26  # approximate bytes of features in one row group of a Parquet file


class FeatureBank(NamedTuple):
    """Features read from a file.

    Attributes:
        rows: Features, memory-mapped.
        names: The name of each row's image in the table beside it, as written by `plain_cell`.
        record: What the features were made from; empty if there is no such file.
    """

    rows: Float[np.ndarray, "n D"]
    names: Sequence[str]
    record: Mapping[str, Any]


def feature_files(out: Path) -> tuple[Path, ...]:
    """Name the files written for `--out`: first the features (`.npy` is appended if needed), then those beside them."""
    if out.suffix == PARQUET:
        return out, out.with_suffix(".json")
    features = out if out.suffix == ".npy" else out.with_name(f"{out.name}.npy")
    return features, features.with_suffix(".csv"), features.with_suffix(".json")


class FeatureWriter:
    """Writes features and names, row by row.

    Args:
        out: F.npy or F.parquet; `.npy` is appended to any other name.
        made_of: All that determines the rows: a run can only resume one with the same values.
        columns: Columns of the table: path, and label if images have labels.
        dtype: Type of the numbers: float32 or float16.

    Attributes:
        out: File of the features.
        place: Index of the part of a set, and of the image in it, to continue with.
        rows: Number of rows written.
        skipped: Number of images left out.

    Raises:
        ConfigError: If pyarrow is missing for a Parquet file.
    """

    def __init__(self, out: Path, made_of: Mapping[str, Any], *, columns: Sequence[str], dtype: str):
        self.out = feature_files(out)[0]
        self.cell: Callable[[str], str] = str if self.out.suffix == PARQUET else plain_cell
        self.made_of, self.columns, self.dtype = dict(made_of), list(columns), np.dtype(dtype)
        self.shape: tuple[int, ...] = ()  # of a row
        self.place, self.rows, self.skipped = (0, 0), 0, 0
        self.files = ExitStack()
        if self.out.suffix == PARQUET:
            pyarrow()

    @property
    def partial(self) -> tuple[Path, Path, Path]:
        """Files of rows, table and state while rows are being written."""
        names = (".npy", ".csv", ".json")
        rows, table, state = (self.out.with_suffix(f"{name}.partial") for name in names)
        return rows, table, state

    def begin(self, *, resume: bool) -> tuple[int, int]:
        """Open the files, new or those of an interrupted run, and return the place to continue from.

        Raises:
            CheckpointError: If the files are those of a different run, or incomplete.
            ConfigError: If another process is writing them.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        rows, table, state = self.partial
        rows.touch()
        self.matrix: BinaryIO = self.files.enter_context(rows.open("r+b"))
        try:
            lock(self.matrix, self.out)
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing these features; {self.out}; wait for it, or choose another --out"
            ) from None
        if resume and state.exists():
            self.restore(json.loads(state.read_text("utf-8")))
        else:
            self.matrix.truncate()
            table.write_text(",".join(self.columns) + "\r\n", "utf-8")
            state.unlink(missing_ok=True)
        self.matrix.seek(0, io.SEEK_END)
        text = table.open("a", newline="", encoding="utf-8", errors="backslashreplace")
        self.table: TextIO = self.files.enter_context(text)
        return self.place

    def restore(self, left: Mapping[str, Any]) -> None:
        """Truncate the files to the last complete rows."""
        rows, table, state = self.partial
        if changed := sorted(name for name, value in self.made_of.items() if left["made_of"].get(name) != value):
            what = f"another {' and another '.join(changed)} than for the existing rows"
            raise CheckpointError(f"{what}; {state}; leave out --resume to write all rows again")
        self.place, self.rows, self.skipped = (left["place"][0], left["place"][1]), left["rows"], left["skipped"]
        self.shape = tuple(left["shape"])
        for path, size in zip((rows, table), left["bytes"], strict=True):
            if not path.is_file() or path.stat().st_size < size:
                raise CheckpointError(
                    f"rows are missing or truncated; {path}; leave out --resume to write all rows again"
                )
            with path.open("r+b") as file:
                file.truncate(size)

    def append(
        self,
        values: Float[np.ndarray, "n ..."] | None,
        cells: Sequence[Sequence[str]],
        skipped: int,
        place: tuple[int, int],
    ) -> None:
        """Append the rows of images up to `place`, of which `skipped` were left out."""
        if values is not None:
            if not self.matrix.tell():
                self.shape = values.shape[1:]
                self.write_header()
            self.matrix.write(values.astype(self.dtype).tobytes())
            csv.writer(self.table).writerows([self.cell(cell) for cell in row] for row in cells)
        self.rows, self.skipped, self.place = self.rows + len(cells), self.skipped + skipped, place
        rows, table, state = self.partial
        for file in (self.matrix, self.table):
            file.flush()
            os.fsync(file.fileno())  # the state must not reach the disk before the rows that it counts
        reached = {"place": place, "rows": self.rows, "skipped": self.skipped, "shape": self.shape}
        sizes = {"bytes": [rows.stat().st_size, table.stat().st_size]}
        write_atomically(state, json.dumps({"made_of": self.made_of, **reached, **sizes}))

    def write_header(self) -> None:
        """Write the header of the .npy file; NumPy leaves room in it for a larger number of rows."""
        described = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False}
        npy.write_array_header_1_0(self.matrix, {**described, "shape": (self.rows, *self.shape)})

    def finish(self) -> None:
        """Complete the files and rename them."""
        rows, table, state = self.partial
        self.matrix.seek(0)
        self.write_header()
        for path, file in ((rows, self.matrix), (table, self.table)):
            file.flush()
            flush(path)
        record = {name: value for name, value in self.made_of.items() if value is not None}
        write_atomically(self.out.with_suffix(".json"), json.dumps({**record, "images": self.rows}, indent=1))
        if self.out.suffix == PARQUET:
            write_parquet(self.out, rows, table)
            rows.unlink()
            table.unlink()
        else:
            rows.replace(self.out)
            table.replace(self.out.with_suffix(".csv"))
        state.unlink()
        self.close()  # not before: the lock ends with it

    def close(self) -> None:
        """Close the files and keep them for a later run."""
        self.files.close()

    def discard(self) -> None:
        """Delete the partial files."""
        self.close()
        for path in self.partial:
            path.unlink(missing_ok=True)


def write_parquet(out: Path, rows: Path, table: Path) -> None:
    """Write one table of names, labels and features, of shape (D) or (L, D), group by group."""
    arrow, parquet = pyarrow()
    values = np.load(rows, mmap_mode="r")
    kind = arrow.from_numpy_dtype(values.dtype)
    for length in reversed(values.shape[1:]):
        kind = arrow.list_(kind, length)
    at_once = max(ROW_GROUP // max(values[:1].nbytes, 1), 1)
    partial = out.with_name(f".{out.name}.partial")
    with ExitStack() as files:
        lines = csv.reader(files.enter_context(table.open(newline="", encoding="utf-8")))
        columns = next(lines)
        schema = arrow.schema([*((name, arrow.string()) for name in columns), ("feature", kind)])
        writer = files.enter_context(parquet.ParquetWriter(partial, schema))
        for start in range(0, len(values), at_once):
            feature = arrow.array(values[start : start + at_once].reshape(-1))
            for length in reversed(values.shape[1:]):
                feature = arrow.FixedSizeListArray.from_arrays(feature, length)
            cells = list(islice(lines, at_once))
            named = [[row[place] if place < len(row) else None for row in cells] for place in range(len(columns))]
            writer.write_table(arrow.table([*map(arrow.array, named), feature], schema=schema))
    flush(partial)
    partial.replace(out)


def pyarrow() -> tuple[Any, Any]:
    """Import pyarrow and its Parquet module.

    Raises:
        ConfigError: If it is missing.
    """
    with extra("tables", "--out F.parquet"):
        import pyarrow
        from pyarrow import parquet
    return pyarrow, parquet


def read_features(path: Path) -> FeatureBank:
    """Open features of images written by `dmjd embed`.

    Raises:
        DataError: If there are none, or no table with a name for each row.
    """
    if path.suffix != ".npy":
        raise DataError(f"not an .npy file; {path}; give the F.npy that dmjd embed --out F.npy has written")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # EOFError for an empty file
        reason = one_line(error, 200)
        raise DataError(f"no features ({reason}); {path}; give the F.npy that dmjd embed has written") from None
    if rows.ndim != 2 or rows.dtype.kind != "f":
        said = f"{rows.dtype} of shape {rows.shape} instead of a row of numbers for each image"
        raise DataError(f"{said}; {path}; give what dmjd embed writes without --tokens")
    table, record = path.with_suffix(".csv"), path.with_suffix(".json")
    try:
        with table.open(newline="", encoding="utf-8") as file:
            names = [row[0] for row in csv.reader(file)][1:]
        known = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"no names of the rows ({error}); {table}; it comes with the features of dmjd embed") from None
    if len(names) != len(rows):
        raise DataError(f"{len(names):,} names of {len(rows):,} rows; {table}; write both again by dmjd embed")
    return FeatureBank(rows, names, known)
