"""Held-out images as a masked model sees them: what was hidden, the targets there, and the predictions.

The file of samples holds only pictures: targets draw themselves, so nothing here depends on their kind.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmjd.engine.checkpoint import save_tensors
from dmjd.errors import CheckpointError
from dmjd.reports.curves import HUES, INK, MUTED, add_legend, new_figure, plain_axes, svg
from dmjd.reports.page import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_BUDGET = 1_200_000  # characters of inline pictures, which keeps the page below 2 MB
ERROR_COLOURS = ("#10314d", "#2c6c9f", "#e8e4da", "#d9824a", "#8c1d18")  # from none to `WORST`
WORST = 2.0  # error with the last of these colours; the middle one is the error of the mean target
SMALL = 128  # width in pixels below which a browser should enlarge a picture without smoothing


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The held-out images of a report, and their predictions.

    Attributes:
        images: The images.
        masked: The tokens that each view hides.
        target: Pictures of their targets, with 1 or 3 channels.
        predicted: Pictures of the predictions of each view; only hidden tokens are shown.
        errors: Error of every token's prediction, where 1 is as good as the mean target; only hidden ones are shown.
        patch_colours: Colours that represent the features of all tokens.
        times_hidden: How often each token of N training images was hidden, over all views.
    """

    images: UInt8[Tensor, "n C H W"]
    masked: Bool[Tensor, "n V L"]
    target: UInt8[Tensor, "n c h w"]
    predicted: UInt8[Tensor, "n V c h w"]
    errors: Float[Tensor, "n V L"]
    patch_colours: UInt8[Tensor, "n 3 rows columns"]
    times_hidden: Int[Tensor, "N L"]


def write_samples(path: Path, samples: Samples, metadata: Mapping[str, str]) -> None:
    """Write the held-out images that the report shows.

    Args:
        path: File to write.
        samples: Its content.
        metadata: `grid` ("ROWS COLUMNS" of tokens), and `target`, `caption` and `backdrop` (see `dmjd.targets.Target`).
    """
    tensors = vars(samples) | {"masked": samples.masked.to(torch.uint8)}
    save_tensors({name: value.cpu().contiguous() for name, value in tensors.items()}, path, dict(metadata))


def read_samples(path: Path) -> dict[str, Any]:
    """Read such a file and arrange its pictures for the page.

    Raises:
        CheckpointError: If the file is broken, or of another version.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        rows, columns = map(int, metadata["grid"].split())
        about = {name: metadata[name] for name in ("target", "caption", "backdrop")}
        samples = sample_rows(tensors, (rows, columns), about["backdrop"])
        counted = coverage(tensors["times_hidden"], (rows, columns), tensors["masked"].shape[1])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"broken pictures ({error}); {path}; remove the file for a report without") from None
    return {
        **about,
        "samples": samples,
        "coverage": counted,
        "error_colours": ERROR_COLOURS if "errors" in tensors else (),
        "worst": f"{WORST:g}",
        "has_colours": "patch_colours" in tensors,
    }


def sample_rows(
    tensors: Mapping[str, np.ndarray], grid: tuple[int, int], backdrop: str
) -> list[list[list[dict[str, Any]]]]:
    """Arrange each image in groups: the image and its target, then the input and the prediction of each view.

    Features of the tokens and errors of the predictions are added if the file has them. As many images are shown as
    fit in the budget of inline pictures, but at least one.
    """
    rows: list[list[list[dict[str, Any]]]] = []
    budget = PICTURE_BUDGET
    columns = (tensors[name] for name in ("images", "masked", "target", "predicted"))
    for place, (image, masked, target, predicted) in enumerate(zip(*columns, strict=True)):
        image = image[: 3 if len(image) > 2 else 1]
        groups = [[("Image", "as it was given", image), ("Target", "the target at every token", target)]]
        if "patch_colours" in tensors:
            groups[0].append(("Features", "the features of its tokens as colours", tensors["patch_colours"][place]))
        for view, (hidden, seen, pasted) in enumerate(views_of(image, target, masked, predicted, grid, backdrop)):
            about = f"view {view + 1}"
            group = [(f"View {view + 1}: seen", f"{about}, {hidden.mean():.0%} of its tokens hidden", seen)]
            group.append(("Predicted", f"{about}, the prediction at its hidden tokens", pasted))
            if "errors" in tensors:
                errors = tensors["errors"][place, view]
                said = f"{about}, the error of its hidden tokens, {errors[hidden].mean():.2f} on average"
                group.append((f"Error {errors[hidden].mean():.2f}", said, error_picture(errors, hidden, grid)))
            groups.append(group)
        name = f"Held-out image {len(rows) + 1}"
        row = [[picture(caption, f"{name}: {alt}", shot) for caption, alt, shot in group] for group in groups]
        budget -= sum(len(shot["src"]) for group in row for shot in group)
        if rows and budget < 0:
            break
        rows.append(row)
    return rows


def views_of(
    image: UInt8[np.ndarray, "C H W"],
    target: UInt8[np.ndarray, "c h w"],
    masked: Integer[np.ndarray, "V L"],
    predicted: UInt8[np.ndarray, "V c h w"],
    grid: tuple[int, int],
    backdrop: str,
) -> Iterator[tuple[Bool[np.ndarray, " L"], np.ndarray, np.ndarray]]:
    """Draw each view of an image: its hidden tokens, its visible pixels, and the predictions at the hidden tokens.

    Elsewhere, the prediction shows the image, or with the backdrop `target` the target at a third of its brightness.
    """
    known = image if backdrop == "image" else target // 3
    for hidden, guess in zip(masked.astype(bool), predicted, strict=True):
        seen = np.where(places(hidden, grid, image.shape), np.uint8(128), image)
        yield hidden, seen, np.where(places(hidden, grid, known.shape), guess, known)


def picture(caption: str, alt: str, shot: UInt8[np.ndarray, "c h w"]) -> dict[str, Any]:
    """Describe a picture for the page; `small` ones are enlarged without smoothing."""
    return {"caption": caption, "alt": alt, "src": png(shot), "small": shot.shape[-1] < SMALL}


def error_picture(
    errors: Float[np.ndarray, " L"], hidden: Bool[np.ndarray, " L"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "3 h w"]:
    """Colour the errors of hidden tokens from 0 to `WORST`, one pixel per token; visible tokens are grey."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("errors", ERROR_COLOURS)
    colours = (shades(errors / WORST)[:, :3] * 255).round().astype(np.uint8)
    return np.where(hidden[:, None], colours, np.uint8(128)).reshape(*grid, 3).transpose(2, 0, 1)


def places(hidden: Bool[np.ndarray, " L"], grid: tuple[int, int], shape: tuple[int, ...]) -> Bool[np.ndarray, "H W"]:
    """Find the pixels of a picture of `shape` (..., H, W) that belong to hidden tokens."""
    return np.kron(hidden.reshape(grid), np.ones((shape[-2] // grid[0], shape[-1] // grid[1]), bool))


def coverage(times_hidden: Integer[np.ndarray, "N L"], grid: tuple[int, int], num_views: int) -> dict[str, Any]:
    """Measure prediction and corruption rate, and draw how often tokens were hidden, by place and as a histogram.

    Independent masks of the same corruption rate would predict 1 - (1 - corruption)^views of the tokens.
    """
    times, corruption = np.arange(num_views + 1), float(times_hidden.mean()) / num_views
    shares = np.bincount(times_hidden.ravel().astype(np.int64), minlength=num_views + 1) / times_hidden.size
    chance = np.array([math.comb(num_views, k) * corruption**k * (1 - corruption) ** (num_views - k) for k in times])
    mean = times_hidden.mean(0).reshape(grid)
    span = f"{mean.min():.2f} to {mean.max():.2f}"
    spoken = ", ".join(f"{share:.1%} hidden {count} times" for count, share in enumerate(shares))
    return {
        "heat": svg(
            draw_places(mean, num_views),
            "heat",
            f"Mean times hidden at each place of the {grid[0]} by {grid[1]} grid: {span}",
        ),
        "bars": svg(draw_shares(shares, chance), "shares", f"Share of tokens: {spoken}"),
        "predicted": f"{1 - shares[0]:.1%}",
        "corrupted": f"{corruption:.1%}",
        "independent": f"{1 - chance[0]:.1%}",
        "num_views": num_views,
        "num_images": len(times_hidden),
        "span": span,
    }


def draw_places(mean: Float[np.ndarray, "h w"], num_views: int) -> "Figure":
    """Draw the mean number of times that the token at each place was hidden, out of `num_views`."""
    from matplotlib.colors import LinearSegmentedColormap

    figure = new_figure(4.6, 2.9, layout="constrained")
    axes = figure.subplots()
    blues = LinearSegmentedColormap.from_list("blues", ["#f1f5f9", "#8fb6d6", "#2c6c9f", "#10314d"])
    shown = axes.imshow(mean, cmap=blues, vmin=0, vmax=num_views)
    axes.set_axis_off()
    axes.set_anchor("W")
    ticks = np.arange(num_views + 1)
    bar = figure.colorbar(shown, cax=axes.inset_axes((1.06, 0.04, 0.05, 0.92)), ticks=ticks)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    return figure


def draw_shares(shares: Float[np.ndarray, " n"], chance: Float[np.ndarray, " n"]) -> "Figure":
    """Draw the share of tokens that were hidden 0, 1, ... times, and the share expected of independent masks."""
    (figure, axes), times = plain_axes(height=2.9), np.arange(len(shares))
    bars = axes.bar(times, shares * 100, 0.55, color=HUES[0], label="measured")
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], color=INK, fontsize=8, padding=3)
    marks = axes.hlines(chance * 100, times - 0.14, times + 0.14, color=HUES[1], lw=2, label="independent masks")
    axes.set(xticks=times, xlim=(-0.5, len(shares) - 0.5), ylim=(0, max(*shares, *chance) * 115))
    axes.set_xlabel("times hidden", color=MUTED, fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    add_legend(axes, handles=[bars, marks])
    return figure
