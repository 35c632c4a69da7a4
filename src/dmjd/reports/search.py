"""Neighbours and near-duplicates as a table and as a page of pictures."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from dmjd.data.cells import cell_text, plain_cell
from dmjd.data.decode import BadImage
from dmjd.data.source import Source
from dmjd.engine.checkpoint import write_atomically
from dmjd.reports.overlays import rgb
from dmjd.reports.page import jpeg, write_page

SHOWN = 20  # queries, or groups of duplicates, on the page
BESIDE = 12  # pictures for each of them
WIDTH = 240  # of a picture, in pixels

Picture = dict[str, str]  # its caption, and the image as a data URI if it could be read


class Album:
    """The images of a table of features, by the rows of the table.

    Args:
        names: Their names in the table.
        parts: The set that contains them; empty if its location is unknown.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[Source]):
        self.names, self.parts = names, parts

    def pictures(self, rows: Iterable[int]) -> dict[int, str]:
        """Read the images of some rows as data URIs, leaving out those that no longer exist."""
        wanted = {self.names[row]: row for row in rows}
        found = {}
        for images in self.parts:
            for index in range(len(images)):
                name = images.name(index).encode(errors="backslashreplace").decode()  # as it was written to the file
                if (row := wanted.get(plain_cell(name))) is not None and (picture := picture_of(images, index)):
                    found[row] = picture
        return found


def picture_of(images: Source, index: int) -> str:
    """Make a thumbnail of an image; an empty string if it does not decode."""
    try:
        return jpeg(rgb(images.read(index)), WIDTH)
    except BadImage:
        return ""


def write_neighbours(
    out: Path,
    queries: Sequence[tuple[Source, int]],
    rows: Int[Tensor, "q k"],
    similar: Float[Tensor, "q k"],
    album: Album,
) -> None:
    """Write neighbours.csv and search.html.

    Args:
        out: Folder, created if needed.
        queries: Queries, each as a set and an index in it.
        rows: Neighbours of each query, nearest first.
        similar: Their cosine similarities.
        album: Names and pictures of the neighbours.
    """
    found = [
        list(zip(numbers, likeness, strict=True))
        for numbers, likeness in zip(rows.tolist(), similar.tolist(), strict=True)
    ]
    lines = (
        (plain_cell(images.name(index)), rank, album.names[row], f"{likeness:.6f}")
        for (images, index), neighbours in zip(queries, found, strict=True)
        for rank, (row, likeness) in enumerate(neighbours, 1)
    )
    write_table(out / "neighbours.csv", ("query", "rank", "path", "similarity"), lines)
    pictures = album.pictures(row for neighbours in found[:SHOWN] for row, _ in neighbours[:BESIDE])
    groups = [
        {
            "title": images.name(index),
            "query": picture_of(images, index),
            "pictures": [shot(album, pictures, row, f"{likeness:.3f}") for row, likeness in neighbours[:BESIDE]],
        }
        for (images, index), neighbours in zip(queries[:SHOWN], found, strict=False)
    ]
    lead = f"The nearest of {len(album.names):,} images to {counted(len(queries), 'query', 'queries')}."
    show(out, lead, groups, len(queries), "neighbours.csv")


def write_duplicates(
    out: Path,
    groups: Sequence[Sequence[int]],
    pairs: Int[Tensor, "p 2"],
    similar: Float[Tensor, " p"],
    album: Album,
) -> None:
    """Write duplicates.csv and search.html.

    Args:
        out: Folder, created if needed.
        groups: Groups of rows that are connected by pairs.
        pairs: Pairs of rows that are almost the same.
        similar: Their cosine similarities.
        album: Names and pictures of the rows.
    """
    group_of = {row: number for number, group in enumerate(groups, 1) for row in group}
    numbered = sorted(
        (group_of[first], first, second, likeness)
        for (first, second), likeness in zip(pairs.tolist(), similar.tolist(), strict=True)
    )
    lines = ((group, album.names[one], album.names[two], f"{likeness:.6f}") for group, one, two, likeness in numbered)
    write_table(out / "duplicates.csv", ("group", "path", "other_path", "similarity"), lines)
    pictures = album.pictures(row for group in groups[:SHOWN] for row in group[:BESIDE])
    shown = [
        {
            "title": f"{len(group):,} images",
            "pictures": [shot(album, pictures, row) for row in group[:BESIDE]],
            "more": len(group) - BESIDE,
        }
        for group in groups[:SHOWN]
    ]
    lead = (
        f"{counted(len(groups), 'group', 'groups')} of images that are almost the same, "
        f"among {len(album.names):,} images."
    )
    show(out, lead, shown, len(groups), "duplicates.csv")


def counted(count: int, one: str, several: str) -> str:
    """Format a count with its noun."""
    return f"{count:,} {one if count == 1 else several}"


def shot(album: Album, pictures: dict[int, str], row: int, said: str = "") -> Picture:
    """Describe a picture for the page."""
    return {"name": cell_text(album.names[row]), "src": pictures.get(row, ""), "said": said}


def write_table(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(header)
    writer.writerows(lines)
    write_atomically(path, table.getvalue())


def show(out: Path, lead: str, groups: Sequence[dict[str, Any]], count: int, table: str) -> None:
    """Write the page."""
    page = {"name": out.resolve().name, "lead": lead, "groups": groups, "count": count, "table": table}
    write_page(out / "search.html", "search.html", page)
