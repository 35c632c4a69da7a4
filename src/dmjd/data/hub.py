"""Hugging Face data sets: `hf:NAME` from the hub, `hf:FOLDER`, and Parquet files that contain their images.

After the name come options as in a URL: `hf:NAME?config=...&image=...&label=...&revision=...`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from jaxtyping import Num
from torch import Tensor

from dmjd.data.decode import BadImage, Reduce, Wanted, decode
from dmjd.data.packed import PackedNumbers, PackedStrings
from dmjd.data.source import Opener, Source, register_source
from dmjd.data.stored import Classes, StoredImages, classes_of, refuse_frames
from dmjd.errors import DataError, extra, one_line

OPTIONS = ("config", "image", "label", "revision")
LABELS = ("label", "labels", "fine_label")  # usual names of a column of classes, the most usual first


@dataclass(frozen=True)
class HubReader:
    """Reads images from a column.

    Attributes:
        rows: The library's data set with this column only, not decoded.
        column: Name of the column.
        address: Name of the set, for messages.
        folders: Where files may lie that the column names instead of containing them.
        wanted: How to read the images.
    """

    rows: Any
    column: str
    address: str
    folders: tuple[Path, ...]
    wanted: Wanted

    def __call__(self, index: int, reduce: Reduce | None) -> Num[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        cell = self.rows[index][self.column]
        file = cell and (cell["bytes"] or cell["path"])
        if not file:
            raise BadImage("an empty cell")
        if not isinstance(file, bytes) and not any(map(Path(file).resolve().is_relative_to, self.folders)):
            raise BadImage("no image, but the path of a file outside of the set")
        return decode(file, self.wanted, name=f"row {index} of {self.address}", reduce=reduce)


def open_hub(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open a set by its name on the hub (it is downloaded once), or from a folder of Parquet files or a saved set.

    Raises:
        DataError: If there is no such set, it has no images, or an option or a column is unknown.
    """
    name, _, query = data.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise DataError(f"no option {', '.join(unknown)}; {data}; the options are {', '.join(OPTIONS)}")
    refuse_frames(data, wanted)
    loaded = _load(data, name, **{key: options[key] for key in ("config", "revision") if key in options})
    found: dict[str, Source] = {}
    for part, rows in loaded.items():
        column = _image_column(data, rows.features, options.get("image"))
        classes, labels = _classes(data, rows, options.get("label"))
        found[part] = StoredImages(
            address=data,
            names=PackedStrings.pack(f"{number:07d}" for number in range(len(rows))),
            classes=classes,
            labels=labels,
            reader=HubReader(_undecoded(data, rows, column), column, data, _folders(name), wanted),
        )
    return found


def has_embedded_images(path: Path) -> bool:
    """Tell whether a Parquet file contains the images, as structs with bytes, rather than their paths."""
    try:
        import pyarrow
        from pyarrow.parquet import read_schema

        schema = read_schema(path)
    except (ImportError, OSError, ValueError):  # reading it as a list says why
        return False
    return "path" not in schema.names and any(
        pyarrow.types.is_struct(each.type) and each.type.get_field_index("bytes") >= 0 for each in schema
    )


def _load(data: str, name: str, config: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Load a set with the library; returns its parts by name, or one with an empty name if it has none."""
    with extra("tables", data, DataError):
        import datasets
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 it would ask whether to run a set's script
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        elif name.lower().endswith(".parquet"):
            loaded = datasets.load_dataset("parquet", data_files=name, split="train")
        else:
            loaded = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # network, hub and files all raise errors of their own
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise DataError(f"no set could be opened ({reason}); {data}; check its name and its options") from None
    return loaded if isinstance(loaded, dict) else {"": loaded}


def _folders(name: str) -> tuple[Path, ...]:
    """List where the files of a set may lie: in its folder, and where the library keeps what it downloads."""
    import datasets
    from huggingface_hub import constants

    kept = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, constants.HF_HUB_CACHE)
    return tuple(Path(folder).expanduser().resolve() for folder in (*kept, *([name] if Path(name).is_dir() else [])))


def _undecoded(data: str, rows: Any, column: str) -> Any:
    """Make the library return the files of one column undecoded."""
    import datasets

    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of pyarrow, by what the column is instead
        raise DataError(f"column {column} has no images ({one_line(error, 200)}); {data}; say ?image=COLUMN") from None


def _image_column(data: str, features: Any, given: str | None) -> str:
    """Find the column of images: the given one, else the only one."""
    import datasets

    if given is not None:
        return _known(data, features, given)
    columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    columns = columns or [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    if len(columns) == 1:
        return columns[0]
    reason = f"several columns of images: {', '.join(columns)}" if columns else "no column of images"
    raise DataError(f"{reason}; {data}; say ?image=COLUMN, one of {', '.join(features)}")


def _classes(data: str, rows: Any, given: str | None) -> Classes:
    """Find the classes: in the given column, else in one with a usual name, or in the only column of classes."""
    import datasets

    if given is not None:
        column = _known(data, rows.features, given)
    else:
        columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        usual = [name for name in LABELS if isinstance(rows.features.get(name), datasets.ClassLabel | datasets.Value)]
        if not usual and len(columns) != 1:
            return (), None
        column = (usual or columns)[0]
    values, kind = list(rows.select_columns([column])[:][column]), rows.features[column]
    of_classes = isinstance(kind, datasets.ClassLabel)
    if None in values or (of_classes and -1 in values):  # a part whose labels are withheld
        return (), None
    if of_classes:
        return tuple(kind.names), PackedNumbers(torch.tensor(values))
    return classes_of([str(value) for value in values])


def _known(data: str, features: Any, column: str) -> str:
    """Return the name of a column if it exists."""
    if column in features:
        return column
    raise DataError(f"no column {column}; {data}; its columns are {', '.join(features)}")


register_source("hf")(Opener(lambda data: data.startswith("hf:"), open_hub))
