"""The report of a pre-training run: one HTML file that needs nothing else, to look at and to pass on."""

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool, Float, Integer, UInt8
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open

from dmjd.errors import CheckpointError

# Figures are drawn in these stand-in colours; `svg` turns each into the CSS variable of its name, so that one figure
# follows the reader's light or dark theme.
INK, MUTED, LINE, WARN = "#010101", "#020202", "#030303", "#040404"
HUES = ("#050505", "#060606", "#070707")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", WARN: "warn"} | {hue: f"hue{i}" for i, hue in enumerate(HUES)}

HOG_BINS = 9
PICTURE_BUDGET = 1_500_000  # characters of inline pictures: keeps the file below 2 MB
MEASURES = {
    "knn_top1": "k-NN top-1",
    "linear_top1": "Linear probe top-1",
    "rankme": "RankMe",
    "feature_std": "Feature deviation",
}
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
    "RankMe": {"RankMe": "rankme"},
    "Feature deviation": {"feature deviation": "feature_std"},
    "Images per second": {"images per second": "images_per_second"},
}
SHARES = frozenset(["top1", "knn_top1", "miou", "map", "mask_map"])  # shown in percent
Line = dict[str, Any]


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what the run directory holds; parts whose files are missing are left out.

    Args:
        run: directory written by `dmjd pretrain`: `config.yaml`, `metrics.jsonl`, and, as far as the run got,
            `summary.json` and `samples.safetensors`.

    Raises:
        FileNotFoundError: `run` holds neither settings nor metrics.
        CheckpointError: `samples.safetensors` is broken.
    """
    config, summary, samples = (run / name for name in ("config.yaml", "summary.json", "samples.safetensors"))
    lines = read_metrics(run / "metrics.jsonl")
    if not lines and not config.is_file():
        raise FileNotFoundError(f"not a run directory; {run}; give the directory that `dmjd pretrain --out` wrote")
    facts: Line = json.loads(summary.read_text("utf-8")) if summary.is_file() else {}
    settings: Line = yaml.safe_load(config.read_text("utf-8")) or {} if config.is_file() else {}
    training = [line for line in lines if "loss" in line]
    now = (training[-1] if training else {}) | facts
    steps, losses = series(training, "loss")
    page: Line = {
        "name": run.resolve().name,
        "finished": summary.is_file(),
        "now": {key: value for key in now if (value := number(now, key)) is not None},
        "data": str(facts.get("data") or settings.get("data") or ""),
        "labels": bool(facts.get("labels", True)),
        "command": str(facts.get("command") or ""),
        "run": run,
        "settings": config.read_text("utf-8") if config.is_file() else "",
        "broken": [int(step) for step in steps[~np.isfinite(losses)]],
        "numbers": key_numbers(facts, lines),
        "curves": [figure for title, keys in CURVES.items() if (figure := curve(title, keys, lines))],
        "samples": [],
    }
    if samples.is_file():
        try:
            with safe_open(samples, "numpy") as file:
                layout = Layout.from_metadata(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CheckpointError(
                f"broken pictures ({error}); {samples}; remove the file for a report without"
            ) from None
        page |= {"samples": sample_rows(tensors, layout), "target": layout.target}
        page["small"] = tensors["images"].shape[-1] < 128
        page["coverage"] = coverage(tensors["times_hidden"], layout.grid, tensors["masked"].shape[1])
    path = run / "report.html"
    path.write_text(render("pretrain.html", page), "utf-8")
    return path


def render(template: str, page: Mapping[str, Any]) -> str:
    """Fill in one of the templates beside this file."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    templates.filters |= {"duration": duration, "compact": compact, "quote": lambda text: shlex.quote(str(text))}
    return templates.get_template(template).render(page)


# -- numbers -----------------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[Line]:
    """The logged lines in order of step, without lines cut off by a killed writer; none where there is no file.

    A resumed run repeats the steps after its checkpoint: the later line of a step and kind counts.
    """
    found: dict[tuple[int, bool], Line] = {}
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            found[line["step"], "loss" in line] = line
    return [found[key] for key in sorted(found)]


def series(lines: Sequence[Line], key: str, x: str = "step") -> Float[np.ndarray, "2 n"]:
    """Where a quantity was logged and its values there; `null` counts as not a number."""
    points = [(line[x], math.nan if line[key] is None else line[key]) for line in lines if key in line]
    return np.array(points, np.float64).reshape(-1, 2).T


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None where it is missing or not finite."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def duration(seconds: float) -> str:
    """Seconds in words of two units at most."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f}\u00a0s"
    hours, rest = divmod(minutes, 60)
    return "\u00a0".join(([f"{hours:,}\u00a0h"] if hours else []) + ([f"{rest}\u00a0min"] if hours < 100 else []))


def compact(value: float) -> str:
    """A number for reading: 86.6 M from a million up, one decimal only for small numbers that have any."""
    if value >= 1e6:
        return f"{value / 1e6:,.1f}\u00a0M"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def key_numbers(facts: Line, lines: Sequence[Line]) -> list[Line]:
    """One row a measure that is known: untrained, trained and difference, as text.

    Without a summary, the evaluation at step 0 counts as untrained and the latest one as trained.
    """
    first = {key: value for line in lines if line["step"] == 0 for key, value in line.items()}
    latest = {key: value for line in lines if line["step"] > 0 for key, value in line.items()}
    rows = []
    for key, name in MEASURES.items():
        before, after = number(facts.get("untrained") or first, key), number(facts.get("trained") or latest, key)
        if before is None and after is None:
            continue
        scale, unit, points = (1, "", "") if key == "rankme" else (100, "%", "\u00a0points")
        untrained, trained = ("\u2013" if value is None else f"{value * scale:.1f}{unit}" for value in (before, after))
        gain = math.nan if before is None or after is None else round((after - before) * scale, 1)
        sign = "+" if gain > 0 else "\u2212" if gain < 0 else "\u00b1"
        difference = "\u2013" if math.isnan(gain) else f"{sign}{abs(gain):.1f}{points}"
        row = {"key": key, "name": name, "untrained": untrained, "trained": trained, "difference": difference}
        rows.append(row | {"gain": gain, "known": after is not None})
    return rows


# -- curves ------------------------------------------------------------------------------------------------------------


def svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as inline SVG: real text, theme colours, ids of its own, and a label for those who cannot see it."""
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


def plain_axes(figure: Figure) -> Any:
    """Axes with a base line, faint horizontal rules and numbers, and no more."""
    axes: Any = figure.subplots()
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    return axes


def legend(axes: Any, **names: Any) -> None:
    """The names of the lines, in one row above the axes."""
    axes.legend(
        frameon=False, fontsize=8, labelcolor=MUTED, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1), **names
    )


def curve(title: str, keys: Mapping[str, str], lines: Sequence[Line]) -> dict[str, Any] | None:
    """A figure of logged quantities: a smooth line over the faint raw one; None where nothing was logged."""
    x = "epoch" if {"knn_top1", "rankme", "feature_std", *SHARES} & set(keys.values()) else "step"
    logged = {name: points for name, key in keys.items() if (points := series(lines, key, x)).size}
    if not logged:
        return None
    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes, spoken, values_all = plain_axes(figure), [], []
    for (name, (at, values)), colour in zip(logged.items(), HUES, strict=False):
        values = values * 100 if keys[name] in SHARES else values
        finite = np.isfinite(values)
        lost = at[~finite][:: 1 + at.size // 300]
        axes.plot(lost, 0 * lost, "|", color=WARN, transform=axes.get_xaxis_transform())
        at, values = at[finite], values[finite]
        if not values.size:
            spoken.append(f"{name} never finite")
            continue
        kept = thinned(values)
        smooth = smoothed(values, values.size // 40 if x == "step" and keys[name] != "lr" else 1)
        axes.plot(at[kept], values[kept], color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(at[kept], smooth[kept], "o-" if x == "epoch" else "-", color=colour, linewidth=1.6, ms=3, label=name)
        spoken.append(f"{name} from {smooth[0]:.3g} to {smooth[-1]:.3g}")
        values_all.append(values)
    if not values_all:
        axes.text(0.5, 0.5, "no finite value", color=MUTED, ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
    elif title == "Gradient norm" and 0 < 30 * np.min(values_all[0]) < np.max(values_all[0]):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    elif title == "Images per second":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(x, color=MUTED, fontsize=8)
    if len(values_all) > 1:
        legend(axes)
    name = re.sub(r"\W+", "-", title.lower())
    return {"title": title, "svg": svg(figure, name, f"{title} over {x}s: {'; '.join(spoken)}")}


def smoothed(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Centred moving average, over fewer values at the ends."""
    kernel = np.ones(max(1, window))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def thinned(values: Float[np.ndarray, " n"], parts: int = 250) -> Integer[np.ndarray, " m"]:
    """Where to draw a long curve: the ends, and the lowest and highest value of each part, so that no spike is lost."""
    pieces = np.array_split(np.arange(values.size), min(values.size, parts))
    extremes = [piece[pick(values[piece])] for piece in pieces for pick in (np.argmin, np.argmax)]
    return np.unique([0, values.size - 1, *extremes])


# -- pictures of tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tokens of `samples.safetensors` lie in an image and what their numbers mean."""

    target: str
    grid: tuple[int, int]
    patch_size: int
    cell_size: int = 8
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Layout":
        """Read the safetensors metadata; lists are separated by spaces."""
        rows, columns = map(int, metadata["grid"].split())
        return cls(
            target=metadata["target"],
            grid=(rows, columns),
            patch_size=int(metadata["patch_size"]),
            cell_size=int(metadata.get("cell_size", "8")),
            mean=tuple(map(float, metadata.get("mean", "0").split())),
            std=tuple(map(float, metadata.get("std", "1").split())),
        )


def patchify(image: Float[np.ndarray, "C H W"], patch_size: int) -> Float[np.ndarray, "L T"]:
    """Cut an image into tokens of (row, column, channel) order."""
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    patches = image.reshape(channels, rows, patch_size, columns, patch_size).transpose(1, 3, 2, 4, 0)
    return patches.reshape(rows * columns, -1)


def unpatchify(tokens: Float[np.ndarray, "L T"], grid: tuple[int, int], patch_size: int) -> Float[np.ndarray, "C H W"]:
    """Put tokens of (row, column, channel) order back together."""
    patches = tokens.reshape(*grid, patch_size, patch_size, -1).transpose(4, 0, 2, 1, 3)
    return patches.reshape(-1, grid[0] * patch_size, grid[1] * patch_size)


def pixel_picture(
    tokens: Float[np.ndarray, "L T"], image: UInt8[np.ndarray, "C H W"], layout: Layout
) -> UInt8[np.ndarray, "C H W"]:
    """Pixel tokens as a picture: undo what was done to the target.

    Tokens normalised per patch carry no brightness or contrast of their own; both are taken from the true patches of
    `image`, as in MAE's pictures.
    """
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (layout.mean, layout.std))
    if layout.target == "normalized_pixels":
        truth = patchify((image / 255 - mean) / std, layout.patch_size)
        tokens = tokens * np.sqrt(truth.var(-1, ddof=1, keepdims=True) + 1e-6) + truth.mean(-1, keepdims=True)
    values = unpatchify(tokens, layout.grid, layout.patch_size) * std + mean
    return np.rint(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)


def strokes(size: int = 11) -> Float[np.ndarray, "bins size size"]:
    """A line through the middle for each HOG bin, along the edge: at right angles to the bin's gradient direction."""
    angle = np.deg2rad((np.arange(HOG_BINS) + 0.5) * 180 / HOG_BINS)[:, None, None]
    row, column = np.mgrid[:size, :size] - size // 2
    across = np.abs(column * np.cos(angle) + row * np.sin(angle))
    return (1.2 - across).clip(0, 1) * (np.hypot(row, column) < size / 2)


def hog_picture(tokens: Float[np.ndarray, "L T"], layout: Layout) -> UInt8[np.ndarray, "1 height width"]:
    """A star of strokes for each cell, as bright as the positive part of its whitened histogram, mean over channels.

    White is a value of 2; whitened bins reach sqrt(8), where one is alone in its cell.
    """
    rows, columns = layout.grid
    cells = layout.patch_size // layout.cell_size
    bins = np.nan_to_num(tokens).reshape(rows, columns, cells, cells, HOG_BINS, -1).mean(-1).transpose(0, 2, 1, 3, 4)
    strength = (bins / 2).clip(0, 1)[..., None, None]
    stars = (strength * strokes()).max(4).reshape(rows * cells, columns * cells, *strokes().shape[1:])
    picture = stars.transpose(0, 2, 1, 3).reshape(rows * cells * stars.shape[2], -1)
    return (np.rint(picture * 15) * 17).astype(np.uint8)[None]  # 16 levels: a small file


def feature_picture(
    tokens: Float[np.ndarray, "L T"], truth: Float[np.ndarray, "N L T"], layout: Layout
) -> UInt8[np.ndarray, "3 H W"]:
    """A teacher's tokens in colour: their first three principal components over the tokens `truth` of all images."""
    known = np.nan_to_num(truth.reshape(-1, truth.shape[-1]))
    mean = known.mean(0)
    _, lengths, directions = np.linalg.svd(known - mean, full_matrices=False)
    deviations = lengths[:3] / math.sqrt(len(known)) + 1e-6
    colours = np.zeros((len(tokens), 3))
    colours[:, : len(deviations)] = (np.nan_to_num(tokens) - mean) @ directions[:3].T / deviations
    picture = (colours / 4 + 0.5).clip(0, 1) * 255  # two deviations to either side
    return np.rint(unpatchify(np.tile(picture, layout.patch_size**2), layout.grid, layout.patch_size)).astype(np.uint8)


def places(hidden: Bool[np.ndarray, " L"], grid: tuple[int, int], shape: tuple[int, ...]) -> Bool[np.ndarray, "H W"]:
    """Which pixels of a picture of `shape` (..., H, W) belong to hidden tokens."""
    return np.kron(hidden.reshape(grid), np.ones((shape[-2] // grid[0], shape[-1] // grid[1]), bool))


def data_uri(file: bytes, kind: str = "png") -> str:
    """A picture's file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def jpeg(picture: UInt8[np.ndarray, "H W 3"], width: int = 320) -> str:
    """A photograph as a data URI, made smaller if it is wide."""
    image = Image.fromarray(picture)
    image.thumbnail((width, width))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")


def png(picture: UInt8[np.ndarray, "C H W"]) -> str:
    """A picture as a data URI: the first three channels, or the first where there are fewer."""
    colour = len(picture) > 2
    image = Image.fromarray(picture[:3].transpose(1, 2, 0).copy() if colour else picture[0])
    image = image.quantize(256) if colour else image  # a palette: a third of the bytes
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return data_uri(buffer.getvalue())


def sample_rows(tensors: Mapping[str, np.ndarray], layout: Layout) -> list[list[dict[str, str]]]:
    """For each held-out image: itself, its target, then for each view what was seen and what was predicted.

    As many images as fit in the budget of inline pictures, at least one.
    """
    rows: list[list[dict[str, str]]] = []
    budget = PICTURE_BUDGET

    def show(tokens: np.ndarray, image: np.ndarray) -> np.ndarray:
        if layout.target == "hog":
            return hog_picture(tokens, layout)
        if layout.target.endswith("pixels"):
            return pixel_picture(tokens, image, layout)
        return feature_picture(tokens, tensors["target"], layout)

    columns = (tensors[name] for name in ("images", "masked", "target", "predicted"))
    for image, masked, target, predicted in zip(*columns, strict=True):
        truth = show(target, image)
        known = image if layout.target.endswith("pixels") else truth // 3
        shots = [("Image", "as it was given", image), ("Target", "the target at every token", truth)]
        for view, (hidden, guess) in enumerate(zip(masked.astype(bool), predicted, strict=True), 1):
            seen = np.where(places(hidden, layout.grid, image.shape), np.uint8(128), image)
            pasted = np.where(places(hidden, layout.grid, known.shape), show(guess, image), known)
            shots.append((f"View {view}: seen", f"view {view}, {hidden.mean():.0%} of its tokens hidden", seen))
            shots.append(("Predicted", f"view {view}, the prediction at its hidden tokens", pasted))
        name = f"PackedImages-out image {len(rows) + 1}"
        row = [{"caption": caption, "alt": f"{name}: {alt}", "src": png(shot)} for caption, alt, shot in shots]
        budget -= sum(len(shot["src"]) for shot in row)
        if rows and budget < 0:
            break
        rows.append(row)
    return rows


# -- how often each token was predicted --------------------------------------------------------------------------------


def coverage(times_hidden: Integer[np.ndarray, "N L"], grid: tuple[int, int], num_views: int) -> dict[str, Any]:
    """Measured prediction and corruption rate, with a map of the grid and the share of tokens hidden 0, 1, ... times.

    Independent masks of the same corruption rate would predict 1 - (1 - corruption)^views of the tokens.
    """
    times, corruption = np.arange(num_views + 1), float(times_hidden.mean()) / num_views
    shares = np.bincount(times_hidden.ravel().astype(np.int64), minlength=num_views + 1) / times_hidden.size
    chance = np.array([math.comb(num_views, k) * corruption**k * (1 - corruption) ** (num_views - k) for k in times])

    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes, mean = figure.subplots(), times_hidden.mean(0).reshape(grid)
    blues = LinearSegmentedColormap.from_list("blues", ["#f1f5f9", "#8fb6d6", "#2c6c9f", "#10314d"])
    shown = axes.imshow(mean, cmap=blues, vmin=0, vmax=num_views)
    axes.set_axis_off()
    axes.set_anchor("W")
    bar = figure.colorbar(shown, cax=axes.inset_axes((1.06, 0.04, 0.05, 0.92)), ticks=times)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    spread = f"{mean.min():.2f} to {mean.max():.2f}"
    heat = svg(figure, "heat", f"Mean times hidden at each place of the {grid[0]} by {grid[1]} grid: {spread}")

    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = plain_axes(figure)
    bars = axes.bar(times, shares * 100, 0.55, color=HUES[0], label="measured")
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], color=INK, fontsize=8, padding=3)
    marks = axes.hlines(chance * 100, times - 0.14, times + 0.14, color=HUES[1], lw=2, label="independent masks")
    axes.set(xticks=times, xlim=(-0.5, num_views + 0.5), ylim=(0, max(*shares, *chance) * 115))
    axes.set_xlabel("times hidden", color=MUTED, fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    legend(axes, handles=[bars, marks])
    spoken = ", ".join(f"{share:.1%} hidden {count} times" for count, share in enumerate(shares))
    return {
        "heat": heat,
        "bars": svg(figure, "shares", f"Share of tokens: {spoken}"),
        "predicted": f"{1 - shares[0]:.1%}",
        "corrupted": f"{corruption:.1%}",
        "independent": f"{1 - chance[0]:.1%}",
        "num_views": num_views,
        "num_images": len(times_hidden),
        "spread": spread,
    }
