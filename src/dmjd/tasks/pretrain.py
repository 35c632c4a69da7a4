"""`dmjd pretrain`: a folder of images in; a backbone, its metrics and a report out."""

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from dmjd.backbones.files import save_backbone
from dmjd.config import Pretrain, to_dict, to_yaml
from dmjd.data import source as sources
from dmjd.data.crops import random_crop
from dmjd.data.loader import Batch, Samples, StepSampler, collate, train_batches
from dmjd.data.source import Images, Parts
from dmjd.engine import checkpoint
from dmjd.engine.device import choose_device, choose_precision, memory_errors
from dmjd.engine.loop import train
from dmjd.engine.optim import create_optimizer, warmup_cosine, warmup_steps
from dmjd.engine.run import Record, refuse_second_run
from dmjd.engine.stopwatch import Stopwatch
from dmjd.engine.target_cache import keep_targets
from dmjd.errors import ConfigError
from dmjd.evaluation.monitor import measure, num_measured, write_samples
from dmjd.factory import from_settings
from dmjd.masking import block_masks, token_ids
from dmjd.method import DMJD
from dmjd.reports.page import write_report

# What may differ between a run and its resumption: none of it changes a loss on the same kind of device.
MAY_CHANGE = {"out", "resume", "preset", "config", "data", "workers", "device", "debug", "monitor"}


def pretrain(settings: Pretrain) -> None:
    """Pre-train as `settings` say and write the run directory `settings.out`.

    Raises:
        ConfigError: If settings do not go together, `out` holds a run and shall not be resumed, or memory runs out.
        DataError: If there are no images or too many do not decode.
        CheckpointError: If the run to resume is another one.
        NonFiniteError: If a loss is no number; the last checkpoint is from before.
        SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
    """
    out = settings.out
    refuse_second_run(out, resume=settings.resume)
    device = choose_device(settings.device)
    model, optimizer = create(settings, device)
    parts = Parts(*map(sources.in_memory, load(settings)))
    if not len(parts.held_out):  # a set of one image
        parts = Parts(parts.train, parts.train)
    steps = settings.steps or max(round(settings.epochs * len(parts.train) / settings.batch_size), 1)
    record = Record(out, to_dict(settings), parts.train, batch_size=settings.batch_size)
    start = 0
    if settings.resume and (newest := checkpoint.latest(record.checkpoints)):
        start = record.resume(newest, model=model, optimizer=optimizer, may_change=MAY_CHANGE)
        if start == steps and (out / "summary.json").exists():
            print(f"this run is done; look at {out / 'report.html'}")
            return
    else:
        record.begin(to_yaml(settings))
    if parts.train.held:
        record.skip({parts.train.names[index]: reason for index, reason in parts.train.held.bad.items()})
    if settings.teacher.cache:
        keep(settings, model, num_crops=len(parts.train) * (settings.crop.variants or 1))
    with memory_errors("give more --optim.accumulation or a smaller --batch_size"):
        max_images = settings.monitor.max_images
        evaluate = partial(measure, model, parts, settings.model.image_hw, max_images=max_images, device=device)
        affordable = settings.monitor.max_share * steps * settings.batch_size / num_measured(parts, max_images)
        if start == 0:
            record.summary["untrained"] = record.evaluate(0, partial(evaluate, probe=True))
        samples = training_samples(settings, parts.train)
        train_steps(
            settings,
            model,
            optimizer,
            samples,
            record,
            evaluate,
            evaluations=min(settings.monitor.evals, int(affordable)),
            start=start,
            steps=steps,
            device=device,
        )
        finish(settings, model, samples, parts, record, evaluate, steps=steps, device=device)


def create(settings: Pretrain, device: torch.device) -> tuple[DMJD, Optimizer]:
    """Create the untrained model on the device, and its optimizer.

    Raises:
        ConfigError: If settings do not go together.
    """
    torch.manual_seed(settings.seed)
    optim = settings.optim
    try:
        model = from_settings(settings).to(device)
        return model, create_optimizer(
            model, name=optim.name, lr=settings.lr, weight_decay=optim.weight_decay, betas=optim.betas
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def keep(settings: Pretrain, model: DMJD, *, num_crops: int) -> None:
    """Keep the targets of frozen teachers on disk, and say how much space that takes.

    Raises:
        ConfigError: If there is no frozen teacher.
        StorageError: If there is not that much space.
    """
    assert settings.teacher.cache
    caches = keep_targets(model, settings.teacher.cache, precision=settings.precision)
    if not caches:
        raise ConfigError("no frozen teacher among the targets; --teacher.cache; leave it out")
    for cache in caches:
        print(cache.reserve(num_crops), file=sys.stderr)


def train_steps(
    settings: Pretrain,
    model: DMJD,
    optimizer: Optimizer,
    samples: Samples,
    record: Record,
    evaluate: Callable[[], dict[str, float]],
    *,
    evaluations: int,
    start: int,
    steps: int,
    device: torch.device,
) -> None:
    """Train from step `start` to the end."""
    optim, count = settings.optim, len(samples.images)
    warmup = warmup_steps(optim.warmup_epochs, count, settings.batch_size, steps)
    positions = StepSampler(count, settings.batch_size, start, steps, settings.seed, optim.accumulation)
    batches = train_batches(samples, positions, collate, workers=settings.workers, pin_memory=device.type == "cuda")

    def objective(batch: Batch) -> dict[str, Tensor]:
        images = batch.images.to(device, non_blocking=True)  # masks stay here, see `masking.token_ids`
        losses = model(images, batch.masked, None if settings.visible.aligned else shuffled_visible(batch.masked))
        return {"loss": losses.total, "loss_masked": losses.masked, "loss_visible": losses.visible}

    targets: list[Any] = [model.target, model.visible_target]
    stopwatch = Stopwatch((target for target in targets if isinstance(target, nn.Module)), device)
    model.train()
    done = train(
        objective,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        iter(batches),
        optimizer,
        start=start,
        steps=steps,
        seed=settings.seed,
        accumulation=optim.accumulation,
        lr=warmup_cosine(settings.lr, warmup=warmup, steps=steps),
        clip_grad=optim.clip_grad,
        autocast=choose_precision(settings.precision, device),
    )
    for step in record.follow(
        done,
        "pretrain",
        start=start,
        steps=steps,
        log_every=settings.monitor.log_every,
        evaluations=evaluations,
        evaluate=evaluate,
        saves=settings.monitor.saves,
        model=model,
        optimizer=optimizer,
        gauge=lambda seconds: {"target_share": round(stopwatch.read() / seconds, 4)},
    ):
        model.follow(step.number / steps)


def shuffled_visible(masked: Bool[Tensor, "B V L"]) -> Int[Tensor, "N K"]:
    """Draw an order of the visible tokens of every view."""
    visible_NK = token_ids(masked).visible
    return visible_NK.gather(1, torch.rand(visible_NK.shape).argsort(dim=1))


def finish(
    settings: Pretrain,
    model: DMJD,
    samples: Samples,
    parts: Parts,
    record: Record,
    evaluate: Callable[..., dict[str, float]],
    *,
    steps: int,
    device: torch.device,
) -> None:
    """Write the backbone, what it is worth, and the report; say what to do next."""
    out, count, backbone = settings.out, len(parts.train), model.encoder.backbone
    mean, std = (statistic.flatten().tolist() for statistic in (model.mean, model.std))
    assert model.encoder.architecture is not None
    save_backbone(out / "backbone.safetensors", backbone, model.encoder.architecture, mean, std)
    record.summary["trained"] = record.evaluate(steps, partial(evaluate, probe=True))
    last_epoch = (steps * settings.batch_size - 1) // count
    write_samples(
        out / "samples.safetensors", settings, model, samples, parts.held_out, last_epoch=last_epoch, device=device
    )
    summary = record.summary | {
        "seconds": round(record.seconds, 1),
        "images": steps * settings.batch_size,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "data": settings.data,
        "num_images": count,
        "labels": parts.train.labels is not None,
        "skipped": len(record.skipped),
        "command": shlex.join(["dmjd", "pretrain", "--config", str(out / "config.yaml"), "--out", "NEW"]),
    }
    checkpoint.write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    report = write_report(out)
    verb = ["embed", "--out", "features.npy"] if parts.train.labels is None else ["knn"]
    then = shlex.join(["dmjd", *verb, "--backbone", str(out / "backbone.safetensors"), "--data", settings.data])
    print(f"done in {record.seconds:.0f} s; look at {report}; then: {then}")


def load(settings: Pretrain) -> Parts:
    """Find the images."""
    model = settings.model
    return sources.load(settings.data, in_chans=model.in_chans, image_hw=model.image_hw, seed=settings.seed)


def training_samples(settings: Pretrain, images: Images) -> Samples:
    """Make the training samples that settings describe."""
    crop, masking = settings.crop, settings.masking
    return Samples(
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
        settings.seed,
        crop.variants,
    )
