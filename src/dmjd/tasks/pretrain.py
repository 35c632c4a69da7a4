"""`dmjd pretrain`: a folder of images in; a backbone, its metrics and a report out."""

import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dmjd.backbones.files import save_backbone
from dmjd.config.pretrain import PretrainSettings
from dmjd.config.rules import to_dict, to_yaml
from dmjd.data.crops import center_crop, random_crop
from dmjd.data.decode import BadImage
from dmjd.data.masked import MaskedBatch, MaskedSamples, collate_masked
from dmjd.data.memory import PackedImages, in_memory
from dmjd.data.random import mix
from dmjd.data.source import Parts, Source, has_labels, open_source
from dmjd.engine.checkpoint import write_atomically
from dmjd.engine.device import choose_precision, memory_errors
from dmjd.engine.distributed import ParallelModel, join_ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run, refuse_second_run
from dmjd.engine.stopwatch import Stopwatch
from dmjd.engine.target_cache import cache_targets
from dmjd.engine.trainer import Trainer
from dmjd.errors import ConfigError
from dmjd.evaluation.monitor import Monitor, evenly
from dmjd.factory import from_settings
from dmjd.masking import block_masks, token_ids
from dmjd.method import DMJD
from dmjd.reports.pretraining import write_report
from dmjd.reports.token_pictures import write_samples

NUM_PICTURES = 8  # held-out images in the report
NUM_COUNTED = 1000  # training images whose masks are counted there


def pretrain(settings: PretrainSettings) -> None:
    """Pre-train as `settings` say and write the run directory `settings.run.out`.

    Raises:
        ConfigError: If settings do not go together, `out` holds a run and is not to be resumed, or memory runs out.
        DataError: If there are no images or too many do not decode.
        CheckpointError: If the run to resume is another one.
        NonFiniteError: If a loss is not finite; the last checkpoint is from before.
        SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
    """
    run, out = settings.run, settings.run.out
    with join_ranks(run.device) as ranks:
        ranks.micro_batch(run.batch_size, settings.optim.accumulation)
        refuse_second_run(out, resume=run.resume, ranks=ranks)
        torch.manual_seed(run.seed)
        network = create(settings).to(ranks.device)
        parts = find_images(settings)
        if settings.teacher.cache:
            cache(settings, network, num_crops=len(parts.train) * (settings.crop.variants or 1))
        model = ParallelModel(network, ranks, parallel=run.parallel, compile=run.compile)
        monitor = Monitor(parts, settings.model.image_hw, settings.monitor.max_images, run.workers)
        trainer = make_trainer(settings, model, monitor)
        trainer.begin(to_yaml(settings), resume=run.resume)
        if trainer.start == trainer.plan.steps and (out / "summary.json").exists():
            print(f"this run is done; look at {out / 'report.html'}")
            return
        if isinstance(parts.train, PackedImages):
            trainer.run.skip({parts.train.name(index): reason for index, reason in parts.train.bad.items()})
        samples = training_samples(settings, parts.train)
        trained = fit(trainer, samples, monitor)
        finish(settings, trainer, samples, parts, trained)


def create(settings: PretrainSettings) -> DMJD:
    """Create the untrained model.

    Raises:
        ConfigError: If settings do not go together.
    """
    try:
        return from_settings(settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def find_images(settings: PretrainSettings) -> Parts:
    """Find the images and hold small sets in memory; a set of one image is its own held-out part."""
    model, run = settings.model, settings.run
    found = open_source(run.data, in_chans=model.in_chans, image_hw=model.image_hw, seed=run.seed)
    parts = Parts(*map(in_memory, found))
    return parts if len(parts.held_out) else Parts(parts.train, parts.train)


def cache(settings: PretrainSettings, network: DMJD, *, num_crops: int) -> None:
    """Keep the targets of frozen teachers on disk, and say how much space that takes.

    Raises:
        ConfigError: If there is no frozen teacher.
        StorageError: If there is not that much space.
    """
    assert settings.teacher.cache
    caches = cache_targets(network, settings.teacher.cache, precision=settings.run.precision)
    if not caches:
        raise ConfigError("no frozen teacher among the targets; --teacher.cache; leave it out")
    for each in caches:
        print(each.reserve(num_crops), file=sys.stderr)


def make_trainer(settings: PretrainSettings, model: ParallelModel, monitor: Monitor) -> Trainer:
    """Make the trainer that settings describe; evaluations look at no more than a share of what training reads."""
    run, optim, images = settings.run, settings.optim, monitor.parts.train
    steps = run.num_steps(len(images))
    plan = Plan(steps=steps, lr=settings.lr, **run.plan, **settings.monitor.plan, **optim.plan)
    affordable = int(settings.monitor.max_share * steps * run.batch_size / monitor.num_images)
    return Trainer(
        Run(run.out, to_dict(settings), images, batch_size=run.batch_size, ranks=model.ranks),
        model,
        create_optimizer(model.module, lr=settings.lr, **optim.keywords),
        replace(plan, evaluations=min(plan.evaluations, affordable)),
        autocast=choose_precision(run.precision, model.ranks.device),
    )


def training_samples(settings: PretrainSettings, images: Source) -> MaskedSamples:
    """Make the training samples that settings describe."""
    crop, masking = settings.crop, settings.masking
    return MaskedSamples(
        images,
        partial(random_crop, size=settings.model.image_hw, scale=crop.scale, ratio=crop.ratio, flip=crop.flip),
        partial(
            block_masks,
            1,
            settings.model.grid,
            block=masking.block,
            num_views=masking.num_views,
            mask_ratio=masking.mask_ratio,
            predict_ratio=masking.predict_ratio,
        ),
        settings.run.seed,
        crop.variants,
    )


def fit(trainer: Trainer, samples: MaskedSamples, monitor: Monitor) -> dict[str, float]:
    """Train to the end; return what the features are worth then."""
    model, plan, device = trainer.model, trainer.plan, trainer.ranks.device
    network: Any = model.module
    targets: list[Any] = [network.target, network.visible_target]
    stopwatch = Stopwatch((target for target in targets if isinstance(target, nn.Module)), device)

    def objective(model: ParallelModel, batch: MaskedBatch) -> dict[str, Tensor]:
        images = batch.images.to(device, non_blocking=True)  # masks stay here, see `masking.token_ids`
        losses = model(images, batch.masked)
        return {"loss": losses.total, "loss_masked": losses.masked, "loss_visible": losses.visible}

    def evaluate(step: int) -> dict[str, float]:
        return monitor.measure(model, trainer.autocast, probe=step in (0, plan.steps))

    return trainer.fit(
        samples,
        collate_masked,
        objective,
        evaluate,
        after_step=lambda step: network.update_targets(step / plan.steps),
        gauge=lambda seconds: {"target_share": round(stopwatch.read() / seconds, 4)},
        untrained=True,
    )


def finish(
    settings: PretrainSettings, trainer: Trainer, samples: MaskedSamples, parts: Parts, trained: dict[str, float]
) -> None:
    """Write the backbone, what it is worth, and the report; say what to do next."""
    out, run, steps, data = settings.run.out, trainer.run, trainer.plan.steps, settings.run.data
    network: Any = trainer.model.whole()
    if not trainer.ranks.is_main:
        return
    encoder = network.encoder
    path = out / "backbone.safetensors"
    save_backbone(path, encoder.backbone, encoder.architecture, *network.normalize.statistics)
    with memory_errors("choose cpu for --device"):
        draw(settings, network, samples, parts.held_out, steps=steps, device=trainer.ranks.device)
    summary = run.summary | {
        "trained": trained,
        "seconds": round(run.seconds, 1),
        "images": steps * settings.run.batch_size,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in encoder.backbone.parameters()),
        "data": data,
        "num_images": len(parts.train),
        "labels": has_labels(parts.train),
        "skipped": len(run.skipped),
        "command": shlex.join(["dmjd", "pretrain", "--config", str(out / "config.yaml"), "--out", "NEW"]),
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    page = write_report(out)
    verb = ["knn"] if has_labels(parts.train) else ["embed", "--out", "features.npy"]
    then = shlex.join(["dmjd", *verb, "--backbone", str(path), "--data", data])
    print(f"done in {run.seconds:.0f} s; look at {page}; then: {then}")


@torch.inference_mode()
def draw(
    settings: PretrainSettings,
    network: DMJD,
    samples: MaskedSamples,
    held_out: Source,
    *,
    steps: int,
    device: torch.device,
) -> None:
    """Write the pictures of the report: held-out images, what was hidden of them, targets and predictions.

    Also how often tokens were hidden in the last epoch of training, by masks drawn again.
    """
    crops, masks = [], []
    for index in evenly(len(held_out), NUM_PICTURES):
        try:
            crops.append(center_crop(held_out.read(index), settings.model.image_hw))
        except BadImage:
            continue
        masks.append(samples.draw(generator=Generator().manual_seed(mix(settings.run.seed, 0, index))))
    if not crops:
        return
    images, masked = torch.stack(crops), torch.cat(masks)
    predicted = network.eval().predict(images.to(device), masked).masked.float().cpu()
    hidden = token_ids(masked).hidden[..., None].expand(-1, -1, predicted.shape[-1])
    full = torch.zeros(len(predicted), math.prod(settings.model.grid), predicted.shape[-1]).scatter(
        1, hidden, predicted
    )
    full = full.unflatten(0, (len(images), -1))
    truth = network.target(images.to(device)).float().cpu()
    picture: Callable[..., Tensor] = network.target.picture
    last_epoch = (steps * settings.run.batch_size - 1) // len(samples.images)
    counted = [samples.masks(last_epoch, index).sum(dim=0) for index in evenly(len(samples.images), NUM_COUNTED)]
    shown = range(len(images))
    write_samples(
        settings.run.out / "samples.safetensors",
        images=images,
        masked=masked.byte(),
        target=torch.stack([picture(truth[place], images[place], truth) for place in shown]),
        predicted=torch.stack(
            [torch.stack([picture(view, images[place], truth) for view in full[place]]) for place in shown]
        ),
        times_hidden=torch.stack(counted),
        metadata={
            "grid": "{} {}".format(*settings.model.grid),
            "target": settings.masked.target,
            "caption": network.target.caption,
            "backdrop": network.target.backdrop,
        },
    )
