"""The rules of `--preset auto`: sizes and lengths that follow from the images, the machine and the available time.

The method itself is in presets/auto.yaml and was chosen by trials (docs/results.md, Preset auto). The numbers here are
judgement, except the shape of the smallest network and its learning rate, which come from the trials.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmjd.config.rules import height_width

Chosen = dict[str, Any]  # settings, nested as in a preset
# Flags that constrain the choice of sizes.
OWN = ("model.backbone", "model.size", "model.image_size", "model.patch_size")

SIDES = {"cpu": (32, 48, 64, 96), "gpu": (32, 64, 96, 128, 160, 224)}  # of a crop, in pixels
TOKENS = {"cpu": 8, "gpu": 14}  # along a side, at most; on two cores, more tokens would mean fewer epochs
SMALLEST_PATCH = 4  # pixels; smaller patches have hardly any gradients to predict
LARGEST_PATCH = 1024  # pixels, as of any model
CONVVIT_PATCHES = (4, 8, 16)
# Networks from small to large: their `model` and `decoder` sections.
SMALL = {"size": "tiny", "embed_dim": 128, "depth": 6, "num_heads": 4}
NETWORKS: tuple[tuple[Chosen, Chosen], ...] = (
    (SMALL, {"embed_dim": 96, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0}),
    ({"size": "tiny"}, {"embed_dim": 128, "depth": 2, "num_heads": 4, "mlp_ratio": 4.0}),
    ({"size": "small"}, {"embed_dim": 256, "depth": 4, "num_heads": 8, "mlp_ratio": 4.0}),
    ({"size": "base"}, {"embed_dim": 512, "depth": 8, "num_heads": 16, "mlp_ratio": 4.0}),
)
WIDTHS = (128, 192, 384, 768)  # of these networks
FEW = 100  # images below which only the smallest network is considered; judgement
OFTEN = 100  # views of every image that any network but the smallest must get; judgement
MOST = 1600  # views of an image, for any network: as in the longest published recipes
STEPS = 2000  # steps that a run should still have after its batch is doubled
ROWS = {"cpu": (32, 128), "gpu": (64, 4096)}  # views in a step
TRIED = {"cpu": 32, "gpu": 256}  # images in a timed step; fewer would leave a GPU idle
RATE, HIGHEST_RATE = 5e-4, 2.4e-3  # peak learning rate at 64 rows, and of any step
WARM_UP = 0.05  # share of the run


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on.

    Attributes:
        num_images: Number of training images.
        side: Median of the shorter sides of a sample, in pixels.
        in_chans: Channels of an image.
        kind: Kind of device: cpu or gpu.
        minutes: Time that the run should take.
    """

    num_images: int
    side: int
    in_chans: int
    kind: str
    minutes: float


class Given(NamedTuple):
    """A network that a user names, by `--model.backbone` or by the weights of `--init`.

    Attributes:
        model: Settings of the `model` section that it dictates.
        width: Width of its tokens.
    """

    model: Chosen
    width: int


def image(own: Mapping[str, Any], side: int, kind: str) -> Chosen:
    """Choose image size and patch size, as settings of `model`; a size that the user gives is kept.

    Args:
        own: The user's values of `OWN`, as written; a malformed one is left for the parser to report.
        side: Shorter side of the images, in pixels.
        kind: Kind of device: cpu or gpu.

    Raises:
        ConfigError: If the user's image size is malformed.
    """
    written, size = str(own.get("model.patch_size")), own.get("model.image_size")
    patch = int(written) if re.fullmatch("[1-9][0-9]{0,3}", written) else None
    if size is None:
        size = max((each for each in SIDES[kind] if each <= side), default=SIDES[kind][0])
        size = max(size // patch, 1) * patch if patch else size
    if patch is None:
        height, width = height_width("model.image_size", str(size))
        fewest = -(-max(height, width) // TOKENS[kind])  # pixels of a patch
        hybrid = own.get("model.backbone") == "convvit"
        largest = min(max(height, width), LARGEST_PATCH)
        sizes = CONVVIT_PATCHES if hybrid else range(min(SMALLEST_PATCH, height, width), largest + 1)
        fit = [each for each in sizes if height % each == width % each == 0]
        patch = next((each for each in fit if each >= fewest), fit[-1] if fit else sizes[-1])
    return {"image_size": str(size), "patch_size": patch}


def networks(facts: Facts, own: Mapping[str, Any], given: Given | None = None) -> list[Chosen]:
    """List the candidate networks, from the smallest to the largest, each with its image size.

    Args:
        facts: What the recipe depends on.
        own: As in `image`; a size of the network that the user gives is the only one, with its decoder.
        given: The only candidate, where the user names a network; it gets the decoder of the first network of ours that
            is at least as wide.
    """
    fixed = {f"model.{name}": value for name, value in given.model.items()} if given else {}
    model = {**image({**own, **fixed}, facts.side, facts.kind), "in_chans": facts.in_chans}
    if given:
        place = next((place for place, width in enumerate(WIDTHS) if given.width <= width), -1)
        return [{"model": model | given.model, "decoder": NETWORKS[place][1]}]
    if size := own.get("model.size"):
        place = next((place for place, (shape, _) in enumerate(NETWORKS) if shape == {"size": size}), -1)
        return [{"model": {"backbone": "vit", "size": size, **model}, "decoder": NETWORKS[place][1]}]
    sizes = NETWORKS if facts.num_images >= FEW else NETWORKS[:1]
    return [{"model": {"backbone": "vit", **network, **model}, "decoder": decoder} for network, decoder in sizes]


def epochs(facts: Facts, seconds: float, views: int) -> float:
    """Compute how many epochs fit into the minutes.

    Args:
        facts: What the recipe depends on.
        seconds: Time to train on one image, all its views together.
        views: Views of an image.
    """
    fit = 60 * facts.minutes / (seconds * facts.num_images)
    return float(f"{min(fit, MOST / views):.3g}")


def schedule(
    facts: Facts, count: float, masking: Mapping[str, Any], *, world_size: int = 1, accumulation: int = 1
) -> Chosen:
    """Choose batch size, micro-batches, learning rate and warm-up for `count` epochs on so many ranks.

    On a GPU, `accumulation` is multiplied until a micro-batch has no more images than fitted into memory when timed.
    """
    views = masking["num_views"]
    rows = views * count * facts.num_images
    fewest, most = ROWS[facts.kind]
    in_a_step = fewest
    while 2 * in_a_step <= most and rows / (2 * in_a_step) >= STEPS:
        in_a_step *= 2
    batch_size = min(in_a_step // views, facts.num_images)
    if facts.kind == "gpu":
        accumulation *= math.ceil(batch_size / (world_size * accumulation * TRIED["gpu"]))
    parts = world_size * accumulation
    batch_size = max(batch_size // parts, 1) * parts
    # The square root is the rule for Adam (Malladi et al. 2022).
    rate = min(RATE * (in_a_step / 64) ** 0.5, HIGHEST_RATE)
    blr = rate * 256 / batch_size * masking["mask_ratio"] / masking["predict_ratio"]
    optim = {"blr": float(f"{blr:.3g}"), "warmup_epochs": float(f"{WARM_UP * count:.3g}"), "accumulation": accumulation}
    return {"epochs": count, "batch_size": batch_size, "optim": optim}
