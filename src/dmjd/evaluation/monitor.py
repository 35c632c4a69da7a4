"""What a run shows of itself: how good its features are, and what its two branches see and say."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from dmjd.config import Pretrain
from dmjd.data.crops import center_crop
from dmjd.data.decode import BadImage
from dmjd.data.loader import Samples
from dmjd.data.random import mix
from dmjd.data.source import Images, Parts
from dmjd.evaluation.features import feature_std, features, knn_top1, linear_top1, rankme
from dmjd.masking import token_ids
from dmjd.method import DMJD

NUM_PICTURES = 8  # held-out images in the report
NUM_COUNTED = 1000  # training images whose masks are counted there


def evenly(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` numbers, evenly spread, so that sorted classes all appear."""
    return np.linspace(0, count - 1, min(count, most), dtype=int).tolist() if count else []


def num_measured(parts: Parts, max_images: int) -> int:
    """Count the images that `measure` looks at."""
    looked_at = [parts.held_out] if parts.train.labels is None else [*parts]
    return sum(min(len(images), max_images) for images in looked_at)


def measure(
    model: DMJD, parts: Parts, image_hw: tuple[int, int], *, max_images: int, device: torch.device, probe: bool = False
) -> dict[str, float]:
    """Measure the mean-pooled features of the backbone as it is.

    With labels: k-NN accuracy on held-out images (and that of a linear probe), by at most `max_images` training and as
    many held-out images. Without: RankMe and spread of the held-out ones, which show a collapse.
    """
    training = model.training
    model.eval()
    compute = partial(
        features,
        lambda images: model.encoder.backbone(model.normalize(images)),
        transform=partial(center_crop, size=image_hw),
        device=device,
    )
    held_out, shown = compute(parts.held_out, evenly(len(parts.held_out), max_images))
    if parts.train.labels is None or parts.held_out.labels is None:
        measured = {"rankme": rankme(held_out), "feature_std": feature_std(held_out)}
    else:
        bank, seen = compute(parts.train, evenly(len(parts.train), max_images))
        pairs = (bank, parts.train.labels_of(seen), held_out, parts.held_out.labels_of(shown))
        probe = probe and len(pairs[1].unique()) > 1
        measured = {"knn_top1": knn_top1(*pairs)} | ({"linear_top1": linear_top1(*pairs)} if probe else {})
    model.train(training)
    return measured


@torch.inference_mode()
def write_samples(
    path: Path,
    settings: Pretrain,
    model: DMJD,
    samples: Samples,
    held_out: Images,
    *,
    last_epoch: int,
    device: torch.device,
) -> None:
    """Write what the report draws: held-out images, masks, targets and predictions, and how often tokens were hidden.

    The counts are those of the masks that training images had in epoch `last_epoch`, drawn again.
    """
    pictures, masks = [], []
    for index in evenly(len(held_out), NUM_PICTURES):
        try:
            pictures.append(center_crop(held_out.read(index), settings.model.image_hw))
        except BadImage:
            continue
        masks.append(samples.draw(generator=torch.Generator().manual_seed(mix(settings.seed, 0, index))))
    if not pictures:
        return
    images, masked = torch.stack(pictures).to(device), torch.cat(masks)
    model.eval()
    said = model.predict(images, masked).masked.float().cpu()
    hidden = token_ids(masked).hidden[..., None].expand(-1, -1, said.shape[-1])
    predicted = torch.zeros(len(said), math.prod(settings.model.grid), said.shape[-1]).scatter(1, hidden, said)
    counted = [samples[last_epoch, index][1].sum(dim=0) for index in evenly(len(samples.images), NUM_COUNTED)]
    tensors = {
        "images": images.cpu(),
        "masked": masked.byte(),
        "target": model.target(images).float().cpu(),
        "predicted": predicted.unflatten(0, (len(images), -1)),
        "times_hidden": torch.stack(counted),
    }
    variant = settings.hog.variant
    metadata = {
        "grid": "{} {}".format(*settings.model.grid),
        "patch_size": str(settings.model.patch_size),
        "target": f"hog ({variant})"
        if settings.masked.target == "hog" and variant != "dmjd"
        else settings.masked.target,
        "cell_size": str(settings.cell_size),
        "mean": " ".join(map(str, model.mean.flatten().tolist())),
        "std": " ".join(map(str, model.std.flatten().tolist())),
    }
    save_file({name: np.ascontiguousarray(value.numpy()) for name, value in tensors.items()}, path, metadata)
