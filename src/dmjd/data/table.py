"""A list of images: a file of comma- or tab-separated values, a Parquet file, or a text file with one path per line.

The column `path` has the paths of the images, relative to the list's folder or absolute, or their URLs. The optional
columns `label` and `split` give classes and parts; if a row lacks its label, no labels are used.
"""

import csv
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Num
from torch import Tensor

from dmjd.data.decode import MAX_BYTES, BadImage, Reduce, Wanted, decode
from dmjd.data.folder import FolderImages, page_names
from dmjd.data.hub import has_embedded_images, open_hub
from dmjd.data.packed import PackedStrings, Packer
from dmjd.data.source import Opener, Source, is_file_name, register_source
from dmjd.data.stored import classes_of, parts_by_column
from dmjd.errors import DataError, extra, one_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*DELIMITERS, ".parquet", ".txt")
# Protocols of URLs that only read a file. Others of fsspec's unpack, cache or interpret it.
PROTOCOLS = frozenset(("abfs", "az", "file", "ftp", "gcs", "gs", "hf", "http", "https", "oci", "oss", "s3", "sftp"))

Columns = dict[str, PackedStrings]


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedImages(FolderImages):
    """Images named by a list; `root` is its folder, but absolute paths and URLs may lead elsewhere.

    Attributes:
        listed_in: The list.
    """

    listed_in: str

    @property
    def address(self) -> str:
        """The list."""
        return self.listed_in

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        name = self.names[index]
        if "://" not in name:
            return self.image(index, reduce)
        if name.startswith("file://"):  # checked like any other file: no pipe, no device
            return decode(name.removeprefix("file://"), self.wanted, name=name, reduce=reduce)
        return decode(_fetch(name), self.wanted, name=name, reduce=reduce)


def open_list(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open a list by its extension; a Parquet file that contains the images is opened as a Hugging Face set.

    Raises:
        DataError: If there is no such list, it is broken or empty, or it names an image twice or a missing one.
    """
    path = Path(data)
    if path.suffix.lower() == ".parquet" and has_embedded_images(path):
        return open_hub(data, wanted)
    columns = read_columns(path, needed=("path",), optional=("label", "split"))
    _check_paths(path, columns["path"])
    if wanted.pages == "frames":
        columns = _frames(path.parent, columns)
    classes, labels = classes_of(columns["label"]) if "label" in columns else ((), None)
    images = ListedImages(
        listed_in=data,
        root=path.parent,
        names=columns["path"],
        wanted=wanted,
        classes=classes,
        labels=labels,
    )
    return parts_by_column(images, columns["split"], path) if "split" in columns else {"": images}


# -- columns -----------------------------------------------------------------------------------------------------------


def read_columns(path: Path, *, needed: Sequence[str], optional: Sequence[str] = ()) -> Columns:
    """Read some columns of a list as text.

    Args:
        path: The list.
        needed: Columns of which at least one must exist.
        optional: Other columns to read.

    Returns:
        The columns that exist, except a column `label` with an empty cell: such a set counts as one without labels.

    Raises:
        DataError: If the list cannot be read, has no row or none of the needed columns, or a column other than `label`
            has an empty cell.
    """
    read = _parquet if path.suffix.lower() == ".parquet" else _text
    try:
        header, columns = read(path, (*needed, *optional))
    except FileNotFoundError:
        raise DataError(f"no such list; {path}; check --data") from None
    except OSError as error:
        raise DataError(f"{error.strerror or error}; {path}; check its permissions") from None
    except UnicodeDecodeError:
        raise DataError(f"not UTF-8; {path}; save it in that encoding") from None
    if not columns.keys() & set(needed):
        there = ", ".join(header) or "none"
        raise DataError(f"no column {' or '.join(needed)}; {path}; name one so, its columns are: {there}")
    for name, cells in columns.items():
        if not len(cells):
            raise DataError(f"an empty list; {path}; write one image per row")
        if not cells.content.all():
            raise DataError(f"it holds NUL bytes, as UTF-16 does; {path}; save it as UTF-8")
        if name != "label" and len(empty := _empty(cells)):
            raise DataError(f"row {empty[0] + 1} has no {name}; {path}; give every row one, or leave the row out")
    if "label" in columns and len(empty := _empty(columns["label"])):
        rows = len(columns.pop("label"))
        said = f"labels: {len(empty)} of {rows} rows have none, row {empty[0] + 1} first, so none are used"
        print(f"{said}; {path}", file=sys.stderr)
    return columns


def _empty(cells: PackedStrings) -> Int[np.ndarray, " n"]:
    """Find the empty cells of a column."""
    return np.flatnonzero(np.diff(cells.ends.numpy(), prepend=0) == 0)


def _text(path: Path, names: Sequence[str]) -> tuple[list[str], Columns]:
    """Read the header of a text file, and the named columns."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".txt":
            return ["path"], {"path": PackedStrings.pack(line.rstrip("\r\n") for line in file if line.strip())}
        rows = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()])
        try:
            header = [name.strip() for name in next(rows, [])]
            places = {name: header.index(name) for name in names if name in header}
            return header, _pack(places, _cells(rows, len(header), list(places.values()), path))
        except csv.Error as error:
            raise DataError(f"{error} in line {rows.line_num}; {path}; write it anew") from None


def _pack(names: Iterable[str], rows: Iterable[Sequence[str]]) -> Columns:
    """Pack rows into columns of these names; white space around cells is stripped, except in paths."""
    packers = {name: Packer() for name in names}
    for row in rows:
        for (name, packer), cell in zip(packers.items(), row, strict=True):
            packer.append(cell if name == "path" else cell.strip())
    return {name: packer.packed() for name, packer in packers.items()}


def _cells(rows: Iterable[list[str]], width: int, places: list[int], path: Path) -> Iterator[list[str]]:
    """Pick cells from rows, all of which must have `width` cells; empty lines are skipped."""
    for number, row in enumerate(filter(None, rows), start=1):
        if len(row) != width:
            raise DataError(
                f"row {number} has {len(row)} columns, not {width}; {path}; complete it, or quote what has a delimiter"
            )
        yield [row[place] for place in places]


def _parquet(path: Path, names: Sequence[str]) -> tuple[list[str], Columns]:
    """Read the names of all columns of a Parquet file, and the named columns."""
    with extra("tables", str(path), DataError):
        import pyarrow
        from pyarrow import parquet
    try:
        header = parquet.read_schema(path).names
        there = [name for name in names if name in header]
        with parquet.ParquetFile(path) as file:
            return header, _pack(there, _parquet_cells(file, there))
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, KeyError) as error:  # KeyError for two columns of one name
        raise DataError(f"no whole Parquet file ({one_line(error, 200)}); {path}; write it anew") from None


def _parquet_cells(file: Any, names: list[str]) -> Iterator[list[str]]:
    """Read the rows of some columns of a Parquet file, batch by batch."""
    for batch in file.iter_batches(1024, columns=names):
        for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            yield ["" if cell is None else str(cell) for cell in row]


# -- paths -------------------------------------------------------------------------------------------------------------


def _check_paths(path: Path, names: PackedStrings) -> None:
    """Refuse a list that names an image twice, or a missing file; URLs are not followed."""
    hashes = _hashes(names)
    ordered = np.sort(hashes)
    if alike := {*ordered[1:][ordered[1:] == ordered[:-1]].tolist()}:
        most, times = Counter(name for name in names if hash(name) in alike).most_common(1)[0]
        if times > 1:
            raise DataError(f"{most} is listed {times} times; {path}; list it once")
    remote, chained, folders = set[str](), "", set[str]()
    for name in names:
        protocol, address, _ = name.partition("://")
        if address:
            remote.add(protocol)
            chained = chained or (name if "::" in name else "")
        else:
            folders.add(name[: name.rfind("/") + 1])
    if remote:
        _check_protocols(remote, path)
    if chained:
        raise DataError(f"a URL within a URL, {chained}; {path}; download what it leads to")
    there = np.sort(_hashes(_files(path.parent, folders)))
    absent = np.searchsorted(there, hashes) == np.searchsorted(there, hashes, side="right")
    unseen = (names[int(row)] for row in np.flatnonzero(absent))
    # The file system may ignore case.
    missing = [name for name in unseen if "://" not in name and not (path.parent / name).exists()]
    if missing:
        raise DataError(
            f"no file {missing[0]}, and {len(missing)} of {len(names)} missing in all; {path}; "
            f"relative paths begin at {path.parent}"
        )


def _hashes(names: Iterable[str]) -> Int[np.ndarray, " n"]:
    """Compute a 64-bit hash of each name, to compare millions at 8 bytes each."""
    return np.fromiter(map(hash, names), dtype=np.int64)


def _files(root: Path, folders: Iterable[str]) -> Iterator[str]:
    """List folders, each once for all its files: checking a million files one by one takes minutes on a network."""
    for folder in folders:
        with suppress(OSError), os.scandir(root / folder) as entries:
            yield from (folder + entry.name for entry in entries)


def _check_protocols(protocols: Iterable[str], path: Path) -> None:
    """Check that these protocols are supported and what reads them is installed."""
    with extra("remote", f"URLs in {path}", DataError):
        import fsspec
    for protocol in sorted(protocols):
        if protocol not in PROTOCOLS:
            known = ", ".join(sorted(PROTOCOLS))
            raise DataError(f"{protocol}:// cannot be read; {path}; the kinds of URLs are {known}")
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise DataError(f"{protocol}:// cannot be read ({error}); {path}; install what fsspec asks for") from None


def _fetch(url: str) -> bytes:
    """Download the file of a URL; raises `BadImage` if that fails."""
    import fsspec

    try:
        with fsspec.open(url) as file:
            content: bytes = file.read(MAX_BYTES + 1)
    except Exception as error:  # every file system raises errors of its own
        raise BadImage(f"{type(error).__name__}: {one_line(error)}"[:200]) from None
    if len(content) > MAX_BYTES:
        raise BadImage("a file of more than 512 MiB")
    return content


def _frames(root: Path, columns: Columns) -> Columns:
    """Give every page of a file its own row, as FILE#PAGE where there are several."""

    def rows() -> Iterator[list[str]]:
        for name, *rest in zip(*columns.values(), strict=True):  # the paths come first
            yield from ([page, *rest] for page in ([name] if "://" in name else page_names(root, name)))

    return _pack(columns, rows())


register_source("list")(Opener(lambda data: is_file_name(data, ENDINGS), open_list, names_tell_part=True))
