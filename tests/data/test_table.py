"""A list of images is what it says, or one line about what is wrong with it."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch

from dmjd.cli import main
from dmjd.data.decode import BadImage, Wanted, decode
from dmjd.data.source import Source, open_all, open_source
from dmjd.errors import DataError

WANTED = Wanted()


def listed(path: Path, content: str, encoding: str = "utf-8") -> str:
    path.write_text(content, encoding=encoding)
    return str(path)


def only(data: str, wanted: Wanted = WANTED) -> Source:
    (source,) = open_all(data, wanted)
    return source


def labels(source: Source) -> list[str | None]:
    found = [source.label(index) for index in range(len(source))]
    return [None if label is None else source.classes[label] for label in found]


def test_list__names_are_the_paths_as_written_in_the_order_of_the_rows(tmp_path, write):
    write(tmp_path, "b.png", "deep/a.png")
    source = only(listed(tmp_path / "list.csv", f"path\n{tmp_path / 'b.png'}\n\ndeep/../deep/a.png\n"))
    assert [source.name(index) for index in range(2)] == [str(tmp_path / "b.png"), "deep/../deep/a.png"]
    assert torch.equal(source.read(1), decode(tmp_path / "deep" / "a.png", Wanted()))
    assert (source.address, source.classes, source.in_memory) == (str(tmp_path / "list.csv"), (), False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_list__a_byte_order_mark_and_quotes_are_no_part_of_a_path(tmp_path, write, encoding):
    write(tmp_path, "größe, 1.png", "b.png")
    source = only(listed(tmp_path / "list.csv", 'path ,label\r\n"größe, 1.png",x\r\nb.png,y\r\n', encoding))
    assert (source.name(0), labels(source)) == ("größe, 1.png", ["x", "y"])


def test_list__labels_that_are_numbers_are_sorted_as_such(tmp_path, write):
    write(tmp_path, *(f"{number}.png" for number in range(3)))
    assert only(listed(tmp_path / "a.csv", "path,label\n0.png,10\n1.png,9\n2.png,9\n")).classes == ("9", "10")
    assert only(listed(tmp_path / "b.csv", "path,label\n0.png,10\n1.png,9\n2.png,x\n")).classes == ("10", "9", "x")
    assert only(listed(tmp_path / "c.csv", "path,label\n0.png,9\n1.png,9\n2.png,9\n")).classes == ()
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": [10, 9]}), tmp_path / "d.parquet")
    assert only(str(tmp_path / "d.parquet")).classes == ("9", "10")


def test_list__white_space_around_a_label_or_a_part_is_no_part_of_it(tmp_path, write):
    write(tmp_path, "a.png", "b.png", "c .png")
    data = listed(tmp_path / "a.csv", "path,label,split\na.png,bird,train\nb.png, bird ,val \nc .png,cat, train\n")
    train, held_out = open_source(data)
    assert (labels(train), labels(held_out)) == (["bird", "cat"], ["bird"])
    pq.write_table(pa.table({"path": ["a.png", "c .png"], "label": ["bird ", "cat"]}), tmp_path / "b.parquet")
    assert only(str(tmp_path / "b.parquet")).classes == ("bird", "cat")


def test_list__with_a_row_that_lacks_its_label_it_is_one_without_labels(tmp_path, write, capsys):
    write(tmp_path, "a.png", "b.png", "c.png")
    listed(tmp_path / "a.csv", "path,label\na.png,x\nb.png, \nc.png,y\n")
    pq.write_table(pa.table({"path": ["a.png", "b.png", "c.png"], "label": ["x", None, "y"]}), tmp_path / "b.parquet")
    for data in (tmp_path / "a.csv", tmp_path / "b.parquet"):
        assert only(str(data)).classes == ()
        assert capsys.readouterr().err == f"labels: 1 of 3 rows have none, row 2 first, so none are used; {data}\n"


def test_list__the_column_split_makes_parts_with_the_same_classes(tmp_path, write):
    write(tmp_path, *(f"{number}.png" for number in range(3)))
    rows = "path,split,label\n0.png,validation,b\n1.png,train,a\n2.png,validation,c\n"
    train, held_out = open_source(listed(tmp_path / "list.csv", rows))
    assert (labels(train), labels(held_out)) == (["a"], ["b", "c"])
    assert train.classes == held_out.classes == ("a", "b", "c")


def test_list__pages_as_frames_are_images_with_the_label_of_their_file(tmp_path, write):
    write(tmp_path, "b.png")
    pages = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    data = listed(tmp_path / "list.csv", "path,label\na.tif,x\nb.png,y\n")
    source = only(data, Wanted(in_chans=1, pages="frames"))
    assert [source.name(index) for index in range(3)] == ["a.tif#0", "a.tif#1", "b.png"]
    assert labels(source) == ["x", "x", "y"]
    assert torch.equal(source.read(1)[0], torch.from_numpy(pages[1]))


def test_list__a_url_that_leads_nowhere_is_a_bad_image(tmp_path, write):
    write(tmp_path, "a.png")
    source = only(listed(tmp_path / "list.txt", f"a.png\nfile://{tmp_path}/gone.png\n"))
    assert source.read(0).shape == (3, 4, 6)
    with pytest.raises(BadImage, match="FileNotFoundError"):
        source.read(1)


def test_list__a_folder_of_such_a_name_is_a_folder(tmp_path, write):
    assert only(str(write(tmp_path / "album.csv", "a.png"))).name(0) == "a.png"


BROKEN = {
    "no column path; .*its columns are: file, label": "file,label\na.png,x\n",
    "no column path; .*its columns are: none": "",
    "no file gone.png, and 2 of 3 missing in all; .*relative paths begin at": "path\na.png\ngone.png\nno/b.png\n",
    "a.png is listed 2 times": "path\na.png\nb.png\na.png\n",
    "b.png is listed 3 times": "path\na.png\nb.png\na.png\nb.png\nb.png\n",
    "b.png is listed 2 times": "path\nb.png\na.png\na.png\nb.png\n",
    "an empty list": "path,label\n",
    "row 2 has 1 columns, not 2": "path,label\na.png,x\nb.png\n",
    "row 2 has 3 columns, not 2; .*quote": "path,label\na.png,x\nb,c.png,x\n",
    "row 2 has no path": "path,label\na.png,x\n,x\n",
    "row 2 has no split": "path,split\na.png,train\nb.png, \n",
    "unknown split dev, trian; .*; write train, val, valid, validation or test": "path,split\na.png,trian\nb.png,dev\n",
    "field larger than field limit": f"path\n{'a' * 200_000}\n",
    "ftq:// cannot be read": "path\nftq://host/a.png\n",
}


@pytest.mark.parametrize("reason", BROKEN)
def test_list__what_is_wrong_is_said_in_one_line(tmp_path, write, reason):
    write(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=reason) as raised:
        open_all(listed(tmp_path / "list.csv", BROKEN[reason]))
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "list.csv") in str(raised.value)


def test_list__a_file_that_is_missing_or_no_table_is_named(tmp_path):
    (tmp_path / "latin.csv").write_bytes("path\ncaf\xe9.png\n".encode("latin-1"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"path": ["a.png", None]}), tmp_path / "null.parquet")
    content = (tmp_path / "null.parquet").read_bytes()
    (tmp_path / "holed.parquet").write_bytes(content[:4] + bytes(60) + content[64:])
    pq.write_table(pa.table([["a.png"], ["b.png"]], names=["path", "path"]), tmp_path / "twice.parquet")
    (tmp_path / "wide.txt").write_bytes("a.png\nb.png\n".encode("utf-16-le"))
    for name, reason in (
        ("wide.txt", "NUL bytes"),
        ("latin.csv", "not UTF-8"),
        ("broken.parquet", "no whole Parquet file"),
        ("holed.parquet", "no whole Parquet file"),
        ("twice.parquet", "no whole Parquet file"),
        ("null.parquet", "row 2 has no path"),
        *((f"gone{ending}", "no such list") for ending in (".csv", ".tsv", ".txt", ".parquet")),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_all(str(tmp_path / name))
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_list__reading_takes_little_memory_a_row(tmp_path, peak):
    def written(count: int) -> str:
        rows = "".join(f"file:///x/{row:06d}.png,{'ab'[row % 2]}\n" for row in range(count))
        return listed(tmp_path / f"{count}.csv", f"path,label\n{rows}")

    few, many = written(1200), written(3600)
    only(few)  # imports
    assert peak(lambda: only(many)) - peak(lambda: only(few)) < 2400 * 150


def test_list__without_the_library_the_extra_is_named(tmp_path, write, monkeypatch):
    write(tmp_path, "a.png")
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "list.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"pip install 'dmjd\[tables\]'"):
        open_all(str(tmp_path / "list.parquet"))
    with pytest.raises(DataError, match=r"pip install 'dmjd\[remote\]'"):
        open_all(listed(tmp_path / "list.csv", "path\ns3://bucket/a.png\n"))


def test_list__on_the_command_line_a_broken_one_is_exit_code_3(tmp_path, capsys):
    data = listed(tmp_path / "list.csv", "file\na.png\n")
    assert main(["pretrain", "--data", data, "--out", str(tmp_path / "run")]) == 3
    assert capsys.readouterr().err.count("\n") == 1
