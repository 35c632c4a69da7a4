"""Sets of Hugging Face open by their columns, or one line says what there is."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from dmjd.data.decode import BadImage, Wanted
from dmjd.data.source import Source, open_all, open_source
from dmjd.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def cell(folder: Path, value: int) -> dict[str, bytes | None]:
    Image.fromarray(np.full((4, 5, 3), value, dtype=np.uint8)).save(folder / "cell.png")
    return {"bytes": (folder / "cell.png").read_bytes(), "path": None}


def saved(root: Path, columns: dict[str, list], **kinds: object) -> str:
    features = datasets.Features({name: kinds.get(name, datasets.Image()) for name in columns})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root)
    return f"hf:{root}"


def only(data: str) -> Source:
    (source,) = open_all(data)
    return source


def labels(source: Source) -> list[int | None]:
    return [source.label(index) for index in range(len(source))]


NAMES = datasets.ClassLabel(names=["zebra", "ape"])


def test_hub__a_set_without_parts_has_the_classes_of_its_own_order(tmp_path):
    cells = [cell(tmp_path, value) for value in range(3)]
    source = only(saved(tmp_path / "set", {"picture": cells, "label": [1, 0, 1]}, label=NAMES))
    assert (source.classes, labels(source)) == (("zebra", "ape"), [1, 0, 1])
    assert [source.name(index) for index in range(3)] == ["0000000", "0000001", "0000002"]
    assert (source.read(2) == 2).all()


def test_hub__columns_and_labels_are_chosen(tmp_path):
    cells = [cell(tmp_path, value) for value in range(3)]
    columns = {"a": cells, "b": cells[::-1], "coarse": [0, 0, 1], "fine_label": [1, 0, 1], "size": [10, 9, 10]}
    data = saved(*(tmp_path / "set", columns), coarse=NAMES, fine_label=NAMES, size=datasets.Value("int64"))
    with pytest.raises(DataError, match=r"several columns of images: a, b; .*; say \?image=COLUMN"):
        open_all(data)
    assert (only(f"{data}?image=b").read(2) == 0).all()
    assert labels(only(f"{data}?image=b")) == [1, 0, 1]
    assert labels(only(f"{data}?image=b&label=coarse")) == [0, 0, 1]
    assert (only(f"{data}?image=b&label=size").classes, labels(only(f"{data}?image=b&label=size"))) == (
        *(("9", "10"), [1, 0, 1]),
    )


def test_hub__labels_that_are_kept_secret_are_none_and_numbers_of_any_sign_are_labels(tmp_path):
    cells = [cell(tmp_path, value) for value in range(2)]
    data = saved(
        tmp_path / "set", {"image": cells, "label": [-1, -1], "sign": [1, -1]}, label=NAMES, sign=datasets.Value("int8")
    )
    assert only(data).classes == ()
    assert (only(f"{data}?label=sign").classes, labels(only(f"{data}?label=sign"))) == (("-1", "1"), [1, 0])


@pytest.mark.parametrize(
    ("column", "kind", "classes"), [([10, 9, 10], "int64", ("9", "10")), ([*"bab"], "string", ("a", "b"))]
)
def test_hub__a_plain_column_of_a_usual_name_has_the_labels(column, kind, classes, tmp_path):
    cells = [cell(tmp_path, value) for value in (10, 20, 30)]
    source = only(saved(tmp_path / "set", {"image": cells, "label": column}, label=datasets.Value(kind)))
    assert (source.classes, labels(source)) == (classes, [1, 0, 1])


def test_hub__an_empty_cell_is_a_bad_image(tmp_path):
    source = only(saved(tmp_path / "set", {"image": [None, cell(tmp_path, 3)]}))
    with pytest.raises(BadImage, match="an empty cell"):
        source.read(0)
    assert (source.read(1) == 3).all()


def test_hub__a_column_of_bare_bytes_opens_when_it_is_named(tmp_path):
    pq.write_table(pa.table({"jpg": [cell(tmp_path, 5)["bytes"]], "n": [1]}), tmp_path / "x.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "set" / "x.parquet")
    with pytest.raises(DataError, match="no column of images"):
        open_all(f"hf:{tmp_path / 'set'}")
    assert (only(f"hf:{tmp_path / 'set'}?image=jpg").read(0) == 5).all()


def test_hub__a_folder_of_images_opens_through_the_library(tmp_path, write):
    write(tmp_path / "set" / "train", "cat/a.png", "dog/b.png")
    write(tmp_path / "set" / "test", "cat/c.png", "dog/d.png")
    train, held_out = open_source(f"hf:{tmp_path / 'set'}")
    assert (train.classes, labels(train), len(held_out)) == (("cat", "dog"), [0, 1], 2)
    assert train.read(0).shape == (3, 4, 6)


def test_hub__files_may_lie_wherever_the_hub_keeps_its_own_and_nowhere_else(tmp_path, monkeypatch):
    for folder in ("hub", "elsewhere"):
        (tmp_path / folder).mkdir()
        cell(tmp_path / folder, 7)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cells = [{"bytes": None, "path": str(tmp_path / folder / "cell.png")} for folder in ("hub", "elsewhere")]
    pq.write_table(pa.table({"image": cells}), tmp_path / "set.parquet")
    source = only(f"hf:{tmp_path / 'set.parquet'}")
    assert (source.read(0) == 7).all()
    with pytest.raises(BadImage, match="outside of the set"):
        source.read(1)


def test_hub__what_is_wrong_is_said_in_one_line(tmp_path):
    data = saved(tmp_path / "set", {"image": [cell(tmp_path, 0)], "n": [3]}, n=datasets.Value("int64"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"PAR1")
    for wrong, reason in (
        (f"{data}?image=picture", "no column picture; .*; its columns are image, n"),
        (f"{data}?label=kind", "no column kind; .*; its columns are image, n"),
        (f"{data}?image=n", "column n has no images"),
        (f"{data}?size=3", "no option size; .*; the options are config, image, label, revision"),
        (f"hf:{tmp_path / 'gone'}", "no set could be opened"),
        (f"hf:{tmp_path / 'broken'}", "no set could be opened"),
        ("hf:nobody/nothing", "no set could be opened .*ConnectionError.*hf:nobody/nothing"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_all(wrong)
        assert raised.value.exit_code == 3
        assert "\n" not in str(raised.value)
        assert wrong in str(raised.value)
    with pytest.raises(DataError, match="pages as frames"):
        open_all(data, Wanted(pages="frames"))


def test_hub__without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:some/set; pip install 'dmjd\[tables\]'"):
        open_all("hf:some/set")
