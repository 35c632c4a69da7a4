"""The rules of `--preset auto`: sizes and lengths that follow from the images, the machine and the time there is.

The method itself is that of presets/auto.yaml, chosen by trials (docs/results.md, Preset auto). The numbers here are
judgement, but for the shape of the smallest network and its learning rate, which are those of the trials.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Chosen = dict[str, Any]  # settings, as a preset has them

SIDES = {"cpu": (32, 48, 64, 96), "gpu": (32, 64, 96, 128, 160, 224)}  # of a crop, in pixels
TOKENS = {"cpu": 8, "gpu": 14}  # along a side, at most; on two cores, more tokens would be fewer epochs
SMALLEST_PATCH = 4  # pixels; smaller ones have no gradients to speak of
# Networks from small to large: what `model` and `decoder` say of them.
SMALL = {"size": "tiny", "embed_dim": 128, "depth": 6, "num_heads": 4}
NETWORKS: tuple[tuple[Chosen, Chosen], ...] = (
    (SMALL, {"embed_dim": 96, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0}),
    ({"size": "tiny"}, {"embed_dim": 128, "depth": 2, "num_heads": 4, "mlp_ratio": 4.0}),
    ({"size": "small"}, {"embed_dim": 256, "depth": 4, "num_heads": 8, "mlp_ratio": 4.0}),
    ({"size": "base"}, {"embed_dim": 512, "depth": 8, "num_heads": 16, "mlp_ratio": 4.0}),
)
OFTEN = 100  # times that a larger network than the smallest has to see every image; judgement
MOST = 1600  # times that any network sees an image: what the longest published recipes have
STEPS = 2000  # that a run should have, before its steps get larger
ROWS = {"cpu": (32, 128), "gpu": (64, 4096)}  # views in a step
RATE, HIGHEST_RATE = 5e-4, 2.4e-3  # peak learning rate at 64 rows, and of any step
WARM_UP = 0.05  # share of the run


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on.

    Attributes:
        num_images: To train on.
        side: Shorter side of the middle image of a sample, in pixels.
        in_chans: Channels.
        kind: Of the device: cpu or gpu.
        minutes: That the run shall take.
    """

    num_images: int
    side: int
    in_chans: int
    kind: str
    minutes: float


def networks(facts: Facts) -> list[Chosen]:
    """List the networks that come into question, from the smallest to the largest, each with its size of images."""
    side = max((each for each in SIDES[facts.kind] if each <= facts.side), default=SIDES[facts.kind][0])
    fewest = -(-side // TOKENS[facts.kind])  # pixels of a patch
    patch = next(each for each in range(max(fewest, SMALLEST_PATCH), side + 1) if side % each == 0)
    image = {"image_size": str(side), "patch_size": patch, "in_chans": facts.in_chans}
    return [{"model": {"backbone": "vit", **network, **image}, "decoder": decoder} for network, decoder in NETWORKS]


def epochs(facts: Facts, seconds: float, views: int) -> float:
    """Count the epochs that the minutes have room for.

    Args:
        facts: Of the set.
        seconds: That training on an image takes, all its views together.
        views: Of an image.
    """
    fit = 60 * facts.minutes / (seconds * facts.num_images)
    return float(f"{min(fit, MOST / views):.3g}")


def schedule(facts: Facts, count: float, masking: Mapping[str, Any]) -> Chosen:
    """Choose batch, learning rate and warm-up of a run of `count` epochs."""
    views = masking["num_views"]
    rows = views * count * facts.num_images
    fewest, most = ROWS[facts.kind]
    in_a_step = fewest
    while 2 * in_a_step <= most and rows / (2 * in_a_step) >= STEPS:
        in_a_step *= 2
    batch_size = max(min(in_a_step // views, facts.num_images), 1)
    # The square root is the rule for Adam (Malladi et al. 2022).
    rate = min(RATE * (in_a_step / 64) ** 0.5, HIGHEST_RATE)
    blr = rate * 256 / batch_size * masking["mask_ratio"] / masking["predict_ratio"]
    optim = {"blr": float(f"{blr:.3g}"), "warmup_epochs": float(f"{WARM_UP * count:.3g}")}
    return {"epochs": count, "batch_size": batch_size, "optim": optim}
