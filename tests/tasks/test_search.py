"""Search finds what a comparison with everything finds, says it in a table, and shows it on a page."""

import csv
import json
import re
import shutil
from html import unescape

import numpy as np
import pytest
from PIL import Image

from dmjd.cli import main

QUICK = ["--device", "cpu", "--workers", "0"]


def run(*words, capsys=None):
    assert main([*map(str, words), *QUICK]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1]) if capsys else None


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def embedded(backbones, colours, tmp_path_factory):
    """Features of the colours."""
    out = tmp_path_factory.mktemp("embedded") / "f.npy"
    run("embed", "--backbone", backbones["vit"], "--data", colours, "--out", out)
    return out


def brute_force(embedded, names):
    """Similarities of some of the images to all, and all names."""
    features, rows = (
        np.load(embedded).astype(np.float64),
        [row["path"] for row in rows_of(embedded.with_suffix(".csv"))],
    )
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features[[rows.index(name) for name in names]] @ features.T, rows


def test_search__finds_the_nearest_in_order(embedded, colours, tmp_path, capsys):
    command = ["search", "--features", embedded, "--query", colours / "val" / "red", "--k", 5, "--out", tmp_path]
    said = run(*command, capsys=capsys)
    assert (said["queries"], said["images"], said["skipped"]) == (4, 36, 0)
    found = rows_of(tmp_path / "neighbours.csv")
    assert [*found[0]] == ["query", "rank", "path", "similarity"]
    names = [f"{number:02d}.png" for number in range(4)]
    similar, rows = brute_force(embedded, [f"val/red/{name}" for name in names])
    assert [(row["query"], row["rank"]) for row in found] == [
        (name, str(rank)) for name in names for rank in range(1, 6)
    ]
    for number in range(4):
        expected = np.argsort(-similar[number])[:5]
        mine = found[5 * number : 5 * number + 5]
        assert [row["path"] for row in mine] == [rows[place] for place in expected]
        np.testing.assert_allclose([float(row["similarity"]) for row in mine], similar[number][expected], atol=2e-6)
        assert mine[0]["path"] == f"val/red/{names[number]}"  # the image itself is in the set


def test_search__one_image_and_more_neighbours_than_images(embedded, colours, tmp_path, capsys):
    query = colours / "val" / "blue" / "02.png"
    said = run("search", "--features", embedded, "--query", query, "--k", 99, "--out", tmp_path, capsys=capsys)
    assert said["queries"] == 1
    assert len(rows_of(tmp_path / "neighbours.csv")) == 36


def test_search__duplicates_are_the_pairs_above_the_threshold(embedded, tmp_path, capsys):
    similar, rows = brute_force(embedded, [row["path"] for row in rows_of(embedded.with_suffix(".csv"))])
    threshold = float(np.sort(similar[np.triu_indices(36, 1)])[-20:-18].mean())
    command = ["search", "--features", embedded, "--duplicates", "--threshold", threshold, "--out", tmp_path]
    said = run(*command, capsys=capsys)
    expected = {(rows[i], rows[j]) for i in range(36) for j in range(i + 1, 36) if similar[i, j] >= threshold}
    found = rows_of(tmp_path / "duplicates.csv")
    assert {(row["path"], row["other_path"]) for row in found} == expected
    assert said["pairs"] == len(found) == 19
    group = {}
    for row in found:  # whoever is in a pair is in its group, and in no other
        for name in (row["path"], row["other_path"]):
            assert group.setdefault(name, row["group"]) == row["group"]
    assert said["groups"] == len({*group.values()})


def test_search__without_duplicates_it_says_so(embedded, tmp_path, capsys):
    said = run("search", "--features", embedded, "--duplicates", "--threshold", 1, "--out", tmp_path, capsys=capsys)
    assert (said["pairs"], said["groups"]) == (0, 0)
    assert "0 groups of images that are almost the same" in (tmp_path / "search.html").read_text()


def test_page__shows_pictures_of_nasty_names_and_needs_no_other_file(backbones, colours, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(colours / "val" / "red", images)
    nasty = ("=<script>alert(1)</script>".replace("/", "|"), "a & 'b'", "<img src=x>")
    for place, name in enumerate(nasty):
        (images / f"0{place}.png").rename(images / f"{name}.png")
    run("embed", "--backbone", backbones["vit"], "--data", images, "--out", tmp_path / "f.npy")
    run("search", "--features", tmp_path / "f.npy", "--query", images, "--k", 3, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "search.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 * (1 + 3)
    assert "no picture" not in page
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "://" not in page
    captions = {unescape(text.strip()) for text in re.findall(r"</b> (.*?)</figcaption>", page)}
    assert captions <= {*(f"{name}.png" for name in nasty), "03.png"}
    assert f"{nasty[0]}.png" in captions  # the name itself, without what keeps a spreadsheet from computing it


def test_page__says_which_pictures_are_gone(backbones, colours, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(colours / "val" / "red", images)
    run("embed", "--backbone", backbones["vit"], "--data", images, "--out", tmp_path / "f.npy")
    query = shutil.copy(images / "00.png", tmp_path / "query.png")
    (images / "00.png").unlink()
    (images / "01.png").write_text("no image any more")
    command = ["search", "--features", tmp_path / "f.npy", "--query", query, "--out", tmp_path / "out"]
    run(*command)
    page = (tmp_path / "out" / "search.html").read_text()
    assert page.count("no picture") == 2
    assert len(rows_of(tmp_path / "out" / "neighbours.csv")) == 4
    shutil.move(images, tmp_path / "moved")
    assert main([*map(str, command), *QUICK]) == 3
    run(*command, "--data", tmp_path / "moved")
    assert (tmp_path / "out" / "search.html").read_text() == page


def test_search__deep_images_are_seen_as_embed_saw_them(backbones, tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 4096 >> number, (36, 40), dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "deep" / f"{number}.png")
    run("embed", "--backbone", backbones["grey"], "--data", tmp_path / "deep", "--out", tmp_path / "f.npy")
    query = tmp_path / "deep" / "3.png"  # alone, it would be taken to range over 0..511
    run("search", "--features", tmp_path / "f.npy", "--query", query, "--k", 1, "--out", tmp_path)
    (best,) = rows_of(tmp_path / "neighbours.csv")
    assert best["path"] == "3.png"
    assert float(best["similarity"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("", 2, "one thing at a time"),
        ("--query Q --duplicates", 2, "one thing at a time"),
        ("--query nowhere.png", 3, "no such data"),
        ("--query Q --backbone other", 4, "another backbone computed the features"),
        ("--query Q --features lonely", 3, "no names of the rows"),
        ("--query Q --features short", 3, "35 names of 36 rows"),
        ("--query Q --features text", 3, "no features"),
        ("--query Q --features f.parquet", 3, "not an .npy file; f.parquet; give the F.npy that dmjd embed"),
        ("--query Q --features tokens", 3, "instead of a row of numbers for each image"),
        ("--query Q --features nan", 3, "values that are not finite; row 7"),
        ("--query Q --features bare", 2, "the backbone of the features is not known"),
    ],
)
def test_search__a_users_mistake_is_one_line(flags, code, said, embedded, backbones, colours, tmp_path, capsys):
    features, table, record = (embedded.with_suffix(ending) for ending in (".npy", ".csv", ".json"))
    for name in ("short", "text", "tokens", "nan", "lonely", "bare"):
        values = np.load(features)
        if name == "nan":
            values[7, 3] = np.nan
        np.save(tmp_path / f"{name}.npy", values[:, None] if name == "tokens" else values)
        if name != "lonely":
            lines = table.read_text().splitlines(keepends=True)
            (tmp_path / f"{name}.csv").write_text("".join(lines[:-1] if name == "short" else lines))
        if name != "bare":
            shutil.copy(record, tmp_path / f"{name}.json")
    (tmp_path / "text.npy").write_text("no array")
    words = (
        flags.replace("Q", str(colours / "val" / "red" / "00.png")).replace("other", str(backbones["blank"])).split()
    )
    words = [f"{tmp_path / word}.npy" if (tmp_path / f"{word}.npy").exists() else word for word in words]
    given = [] if "--features" in words else ["--features", str(features)]
    assert main(["search", *given, *words, "--out", str(tmp_path / "out"), *QUICK]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
