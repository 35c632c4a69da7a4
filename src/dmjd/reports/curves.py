"""Plots of the logged metrics of a run, inside a page, in the colours of the reader's light or dark theme."""

import io
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer
from markupsafe import Markup, escape

if TYPE_CHECKING:
    # At run time where a figure is drawn: matplotlib takes half a second, and a run draws at its end.
    from matplotlib.figure import Figure

# Figures are drawn in these placeholder colours; `svg` replaces each with its CSS variable.
INK, MUTED, LINE, WARN = "#010101", "#020202", "#030303", "#040404"
HUES = ("#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c")
SOLID = 4  # hues with solid lines; the others are dashed
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", WARN: "warn"} | {hue: f"hue{i}" for i, hue in enumerate(HUES)}

CURVES: dict[str, dict[str, str]] = {
    "Loss": {
        "total": "loss",
        "hidden tokens": "loss_masked",
        "visible tokens": "loss_visible",
        "auxiliary head": "loss_auxiliary",
    },
    "Learning rate": {"learning rate": "lr"},
    "Gradient norm": {"gradient norm": "grad_norm"},
    "Top-1, percent": {"top-1": "top1"},
    "mIoU, percent": {"mIoU": "miou"},
    "AP, percent": {"boxes": "map", "masks": "mask_map"},
    "k-NN top-1, percent": {"k-NN top-1": "knn_top1"},
    "Tokens explained, percent": {
        "hidden, held out": "explained",
        "hidden, training": "explained_train",
        "visible, held out": "explained_visible",
    },
    "RankMe": {"RankMe": "rankme"},
    "Standard deviation of features, percent": {"standard deviation": "feature_std"},
    "Images per second": {"images per second": "images_per_second"},
}
EXPLAINED = ("explained", "explained_train", "explained_visible")
SHARES = frozenset(["top1", "knn_top1", "miou", "map", "mask_map", "feature_std", *EXPLAINED])  # shown in percent
EVALUATED = frozenset(["rankme", *SHARES])  # drawn over epochs, the others over steps
PIECES = 250  # parts of a long curve, each drawn by its minimum and maximum

Line = dict[str, Any]  # of metrics.jsonl


def series(lines: Sequence[Line], key: str, x: str = "step") -> Float[np.ndarray, "2 n"]:
    """Return the places where a quantity was logged and its values there; `null` becomes NaN."""
    points = [(line[x], math.nan if line[key] is None else line[key]) for line in lines if key in line]
    return np.array(points, np.float64).reshape(-1, 2).T


def draw_curves(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Draw every figure of `CURVES` that has data, with its title."""
    return [figure for title, keys in CURVES.items() if (figure := curve(title, keys, lines))]


def curve(title: str, keys: Mapping[str, str], lines: Sequence[Line]) -> dict[str, Any] | None:
    """Draw logged quantities: a smooth line over the faint raw one; None if nothing was logged.

    Args:
        title: Title of the figure.
        keys: Quantities by the names of their lines.
        lines: Lines of metrics.jsonl.
    """
    x = "epoch" if EVALUATED & set(keys.values()) else "step"
    logged = {name: points for name, key in keys.items() if (points := series(lines, key, x)).size}
    if not logged:
        return None
    (figure, axes), spoken, drawn = plain_axes(), [], []
    for place, (name, (at, values)) in enumerate(logged.items()):
        key = keys[name]
        said, finite = draw_line(axes, at, values * (100 if key in SHARES else 1), key=key, place=place, name=name)
        spoken.append(said)
        drawn += [finite] if finite.size else []
    set_scale(axes, title, drawn)
    if len(drawn) > 1:
        add_legend(axes)
    axes.set_xlabel(x, color=MUTED, fontsize=8)
    return {"title": title, "svg": svg(figure, name_of(title), f"{title} over {x}s: {'; '.join(spoken)}")}


def overlay(
    title: str, key: str, runs: Mapping[str, Sequence[Line]], x: str = "images", *, shown: Container[str] | None = None
) -> dict[str, Any] | None:
    """Draw a quantity of several runs in one figure; None if fewer than two have logged it.

    Args:
        title: Title of the figure.
        key: The quantity.
        runs: Lines of metrics.jsonl by the name of the run, in the order of their colours.
        x: The x-axis: `images` seen, or `seconds`, shown as minutes.
        shown: Names of the runs to draw; all if None.
    """
    logged = {
        (place, name): points
        for place, (name, lines) in enumerate(runs.items())
        if (shown is None or name in shown) and (points := series(lines, key, x)).size
    }
    if len(logged) < 2:
        return None
    (figure, axes), spoken, drawn = plain_axes(), [], []
    for (place, name), (at, values) in logged.items():
        at, values = at / (60 if x == "seconds" else 1), values * (100 if key in SHARES else 1)
        said, finite = draw_line(axes, at, values, key=key, place=place, name=name)
        spoken.append(said)
        drawn += [finite] if finite.size else []
    set_scale(axes, title, drawn)
    over = "minutes" if x == "seconds" else "images seen"
    axes.set_xlabel(over, color=MUTED, fontsize=8)
    label = f"{title} over {over}: {'; '.join(spoken)}"
    return {"title": title, "svg": svg(figure, f"{name_of(title)}-{x}", label)}


def draw_line(
    axes: Any, at: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], *, key: str, place: int, name: str
) -> tuple[str, Float[np.ndarray, " _"]]:
    """Draw a quantity in the colour of its place: a smooth line over faint raw values, with dots at evaluations.

    Returns:
        A description of the line in words, and the finite values.
    """
    colour, style = HUES[place], "-" if place < SOLID else "--"
    finite = np.isfinite(values)
    lost = at[~finite][:: 1 + at.size // 300]
    axes.plot(lost, 0 * lost, "|", color=WARN, transform=axes.get_xaxis_transform())
    at, values = at[finite], values[finite]
    if not values.size:
        return f"{name} never finite", values
    kept = thinned(values)
    smooth = smoothed(values, 1 if key in EVALUATED or key == "lr" else values.size // 40)
    axes.plot(at[kept], values[kept], color=colour, linewidth=0.7, alpha=0.35)
    dots = "o" if key in EVALUATED or values.size == 1 else ""
    axes.plot(at[kept], smooth[kept], dots + style, color=colour, linewidth=1.6, ms=3, label=name)
    return f"{name} from {smooth[0]:.3g} to {smooth[-1]:.3g}", values


def name_of(title: str) -> str:
    """Turn a title into the prefix of the ids in its figure."""
    return re.sub(r"\W+", "-", title.lower())


def set_scale(axes: Any, title: str, drawn: Sequence[Float[np.ndarray, " _"]]) -> None:
    """Choose the scale and the ticks of a figure for the values drawn."""
    if not drawn:
        axes.text(0.5, 0.5, "no finite value", color=MUTED, ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
    elif title == "Gradient norm" and 0 < 30 * np.min(drawn[0]) < np.max(drawn[0]):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    elif title == "Images per second":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def new_figure(width: float, height: float, **how: Any) -> "Figure":
    """Make an empty figure of a size in inches; `how` is passed to matplotlib."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **how)


def plain_axes(height: float = 2.5) -> tuple["Figure", Any]:
    """Make a figure, `height` inches high, whose axes have only a base line, faint grid lines and tick labels.

    Margins are fixed: matplotlib's automatic layout would draw everything three times.
    """
    figure = new_figure(4.6, height)
    figure.subplots_adjust(left=0.125, right=0.985, bottom=0.44 / height, top=1 - 0.1 / height)
    axes: Any = figure.subplots()
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    return figure, axes


def add_legend(axes: Any, **names: Any) -> None:
    """Put a legend in rows of three above the axes; `names` is passed to matplotlib."""
    legend = axes.legend(
        frameon=False, fontsize=8, labelcolor=MUTED, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1), **names
    )
    rows = math.ceil(len(legend.get_texts()) / 3)
    axes.figure.subplots_adjust(top=1 - (0.12 + 0.17 * rows) / axes.figure.get_figheight())


def svg(figure: "Figure", name: str, label: str) -> Markup:
    """Write a figure as inline SVG with real text, theme colours, and unique ids that start with `name`.

    `label` describes the figure for screen readers.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.S)
    body = body.replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return Markup(f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">{body}')


def smoothed(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Compute a moving average over `window` values, and over fewer at the ends."""
    kernel = np.ones(max(1, window))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def thinned(values: Float[np.ndarray, " n"]) -> Integer[np.ndarray, " m"]:
    """Choose the points of a long curve to draw: both ends, and the extremes of each part, so that no spike is lost."""
    pieces = np.array_split(np.arange(values.size), min(values.size, PIECES))
    extremes = [piece[pick(values[piece])] for piece in pieces for pick in (np.argmin, np.argmax)]
    return np.unique([0, values.size - 1, *extremes])
