"""The page of a set of images: its problems and what to do about them, then its contents."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup

from dmjd.data.checkup import BINS, Copies, Look, Values
from dmjd.data.levels import BYTES, Levels
from dmjd.data.source import Source
from dmjd.reports.curves import HUES, MUTED, add_legend, plain_axes, svg
from dmjd.reports.overlays import rgb
from dmjd.reports.page import jpeg, write_page

SHOWN_FAULTS = 20
SHOWN_PAIRS = 8
MOST_KINDS = 8  # in a list
CROWDED = 4  # if nearly all values lie in at most so many steps of the range, most of it is empty
UNEVEN = 10  # ratio of the largest class to the smallest from which the page mentions it

Problem = tuple[str, str]  # what is wrong, and what to do


def write_checkup(
    out: Path,
    found: Mapping[str, Any],
    parts: Mapping[str, Source],
    looks: Sequence[Look],
    copies: Copies,
    values: Values | None,
) -> Path:
    """Write report.html.

    Args:
        out: Folder of the page.
        found: The numbers, as in summary.json.
        parts: The set, from which pictures of copies are read.
        looks: The images that were examined.
        copies: Copies among them.
        values: Distribution of their pixel values; None if all are the same.

    Returns:
        Its path.
    """
    good = [each for each in looks if not each.fault]
    levels = values.statistics.levels if values else BYTES
    several = [*copies.leaked, *((group[0], group[1]) for group in copies.exact), *copies.near]
    pairs = list(dict.fromkeys((min(pair), max(pair)) for pair in several))  # leaks are copies, too
    page = {
        "found": found,
        "problems": problems(found),
        "notes": notes(found),
        "faults": [each for each in looks if each.fault][:SHOWN_FAULTS],
        "figures": figures(good, values),
        "pairs": [picture_pair(parts, good[one], good[two], levels) for one, two in pairs[:SHOWN_PAIRS]],
        "num_pairs": len(pairs),
    }
    path = out / "report.html"
    write_page(path, "doctor.html", page)
    return path


# -- words -------------------------------------------------------------------------------------------------------------


def problems(found: Mapping[str, Any]) -> list[Problem]:
    """List what has to be put right, the worst first."""
    checks: tuple[Callable[[Mapping[str, Any]], Problem | None], ...] = (
        leakage,
        pages,
        broken,
        refused,
        classes,
        depths,
        empty_range,
    )
    return [problem for check in checks if (problem := check(found))]


def leakage(found: Mapping[str, Any]) -> Problem | None:
    """Report held-out images that are also in the training part."""
    count = found["leaked"]
    if not count:
        return None
    what = (
        f"Leakage: {count:,} of {found['held_out']:,} held-out images {are(count)} also in the training part, exactly "
        "or almost. Every number measured on them is too good."
    )
    return what, "Remove them from one of the two parts; duplicates.tsv names them."


def pages(found: Mapping[str, Any]) -> Problem | None:
    """Report files of several pages, which may be channels or images: the files do not say."""
    if not found["pages_unsaid"]:
        return None
    what = (
        f"Files have several pages ({pages_listed(found)}), which may be channels of one image or separate images. "
        "Here they were treated as separate images; training stops at the first of them."
    )
    return what, "Give --data_pages bands or --data_pages frames, to doctor again and then to the other verbs."


def broken(found: Mapping[str, Any]) -> Problem | None:
    """Report files that do not decode."""
    count, share = found["broken"], found["broken"] / found["looked_at"]
    if not count:
        return None
    stops = "Pre-training stops above 1%." if share > 0.01 else "Training leaves them out, and names them."
    what = f"{count:,} of {found['looked_at']:,} files {do(count)} not decode ({share:.2%}). {stops}"
    return what, "Replace or remove them; broken.tsv lists them with the reasons."


def refused(found: Mapping[str, Any]) -> Problem | None:
    """Report files that decode, but differ from most others in kind."""
    count, chans = found["refused"], found["in_chans"]
    if not count:
        return None
    what = (
        f"{count:,} of {found['looked_at']:,} files {do(count)} not fit the others, which are read as images of "
        f"{chans} channel{'s' if chans > 1 else ''}. Training stops at the first of them."
    )
    return what, "Move them out of the folder, or convert them; broken.tsv lists them with the reasons."


def classes(found: Mapping[str, Any]) -> Problem | None:
    """Report held-out classes without training images."""
    labels = found["labels"]
    missing = sorted({name for part in labels.values() for name in part} - set(labels.get("train", ())))
    if "train" not in labels or not missing:
        return None
    verb, names = "es have" if len(missing) > 1 else " has", ", ".join(missing[:5])
    what = f"{len(missing)} held-out class{verb} no training images: {names}{' ...' if len(missing) > 5 else ''}."
    return what, "Check the names of the folders: a class must have the same name in every part."


def depths(found: Mapping[str, Any]) -> Problem | None:
    """Report values of several types in one set."""
    types = found["types"]
    if len(types) < 2:
        return None
    what = (
        f"Values are of different types: {listed(types)}. Those of 8 bits are taken to range from 0 to 255, all deeper "
        "ones over one common range."
    )
    return what, "If they come from different instruments, convert them to one type first."


def empty_range(found: Mapping[str, Any]) -> Problem | None:
    """Report a range of values that a few outliers stretch."""
    low, high = found.get("value_range", (0, 255))
    if (low, high) == (0, 255) or found["filled"] > CROWDED:
        return None
    what = (
        f"Nearly all values lie in {found['filled']} of {BINS} steps of their range, {low:g} to {high:g}: a value that "
        "stands for missing pixels, or a few bright pixels, stretches it. Training then sees hardly any contrast."
    )
    return what, "Fill in missing pixels, or give --data_range LOW HIGH."


def notes(found: Mapping[str, Any]) -> list[Problem]:
    """List what is worth knowing, but does not have to be put right."""
    low, high = found.get("value_range", (0, 0))
    smallest, largest = ([pick(part.values()) for part in found["labels"].values()] or [1] for pick in (min, max))
    said: list[tuple[bool, str, str]] = [
        (found["equal"] > 0, f"Images that are exact copies of others: {found['equal']:,}.",
         "Training sees them more often than the rest; duplicates.tsv names them."),
        (found["near_pairs"] > 0, f"Pairs of images that are almost equal: {found['near_pairs']:,}.",
         "Look at a few below: they may be copies at another size or quality, or frames of one video."),
        (bool(found["pages"]) and not found["pages_unsaid"], f"Files have several pages ({pages_listed(found)}); they "
         f"were {'treated as ' + found['data_pages'] if found['data_pages'] else 'refused'}.",
         "Give --data_pages bands if the pages are channels of one image, --data_pages frames if each is an image."),
        ("mean" not in found, "All values are the same.", "Nothing can be learned from them; check the files."),
        (found["flat"] > 0, f"Images that are almost uniform: {found['flat']:,}.", "Check whether they are empty."),
        (found["long"] > 0, f"Images more than five times as long as wide: {found['long']:,}.",
         "A square crop shows little of them: cut them into tiles."),
        (max(largest) > UNEVEN * min(smallest), f"The largest class has {max(largest):,} images, the smallest "
         f"{min(smallest):,}.", "This does not matter for pre-training; judge classifiers by their mean over classes."),
        (bool(found["passed_over"]), f"Other files were ignored: {listed(found['passed_over'])}.",
         "If some are images, give them a usual ending; replace links to folders with the images themselves."),
        (found["turned"] > 0, f"Photographs stored rotated (EXIF): {found['turned']:,}.", "They are read upright."),
        ((low, high) not in ((0, 0), (0, 255)), f"Values range from {low:g} to {high:g}, which becomes 0 to 1.",
         "Give --data_range if you know a better range."),
    ]  # fmt: skip
    return [(what, advice) for holds, what, advice in said if holds]


def pages_listed(found: Mapping[str, Any]) -> str:
    """Format the numbers of files by their number of pages."""
    return listed({f"of {pages} pages": count for pages, count in found["pages"].items()})


def listed(counts: Mapping[str, int]) -> str:
    """Format counts by name, as a list."""
    text = ", ".join(f"{count:,} {name or 'without an ending'}" for name, count in list(counts.items())[:MOST_KINDS])
    return f"{text} and {len(counts) - MOST_KINDS} more kinds" if len(counts) > MOST_KINDS else text


def are(count: int) -> str:
    """Choose between singular and plural."""
    return "is" if count == 1 else "are"


def do(count: int) -> str:
    """Choose between singular and plural."""
    return "does" if count == 1 else "do"


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture_pair(parts: Mapping[str, Source], one: Look, two: Look, levels: Levels) -> dict[str, Any]:
    """Prepare two images that are copies of each other for the page."""
    shots = []
    for each in (one, two):
        image = levels.scale(parts[each.part].read(each.index)).byte()
        place = f"{each.part}/{each.name}" if each.part else each.name
        shots.append({"src": jpeg(rgb(image), 240), "name": place})
    parts_named = {one.part, two.part}
    leaked = len(parts_named) > 1 and "train" in parts_named
    return {"kind": "equal" if one.digest == two.digest else "almost equal", "leaked": leaked, "shots": shots}


def figures(good: Sequence[Look], values: Values | None) -> list[dict[str, Any]]:
    """Draw the distributions of image sizes and of pixel values."""
    sides = {"heights": [each.shape[1] for each in good], "widths": [each.shape[2] for each in good]}
    figure, axes = plain_axes()
    steps = np.histogram_bin_edges([*sides["heights"], *sides["widths"]], bins=40)
    for (name, numbers), colour in zip(sides.items(), HUES, strict=False):
        axes.stairs(np.histogram(numbers, steps)[0], steps, color=colour, linewidth=1.4, label=name)
    axes.set_xlabel("pixels", color=MUTED, fontsize=8)
    add_legend(axes)
    spoken = "; ".join(f"{name} from {min(numbers)} to {max(numbers)}" for name, numbers in sides.items())
    drawn = [{"title": "Images by height and width", "svg": svg(figure, "sides", f"Images by size: {spoken}")}]
    if values:
        drawn.append({"title": "Values by channel, percent", "svg": draw_values(values.histograms, values)})
    return drawn


def draw_values(shares: Float64[np.ndarray, "C bins"], values: Values) -> Markup:
    """Draw the distribution of values of every channel, in one colour if there are more channels than hues."""
    figure, axes = plain_axes()
    levels, few = values.statistics.levels, len(shares) <= len(HUES)
    steps = np.linspace(levels.low, levels.high, shares.shape[1] + 1)
    for number, share in enumerate(shares):
        colour, name = (HUES[number], f"channel {number}") if few else (HUES[0], None)
        axes.stairs(100 * share, steps, color=colour, linewidth=1.4 if few else 0.7, label=name)
    axes.set_xlabel("value", color=MUTED, fontsize=8)
    if len(shares) > 1 and few:
        add_legend(axes)
    means = ", ".join(f"{mean:.2f}" for mean in values.statistics.mean)
    return svg(figure, "values", f"Share of values by channel; means of the range: {means}")
