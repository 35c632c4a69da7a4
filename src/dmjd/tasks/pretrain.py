"""`dmjd pretrain`: a folder of images in; a backbone, its metrics and a report out."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from dmjd.backbones.files import save_backbone
from dmjd.backbones.normalize import STATISTICS
from dmjd.config.pretrain import PretrainRun, PretrainSettings
from dmjd.config.rules import flags_of, to_dict
from dmjd.data.crops import RandomCrop, center_crop
from dmjd.data.decode import Wanted
from dmjd.data.folder import ignored_files
from dmjd.data.levels import BYTES, Levels, refuse_deep
from dmjd.data.loader import read_batches
from dmjd.data.masked import MaskedBatch, MaskedSamples
from dmjd.data.memory import PackedImages, in_memory, stack_of
from dmjd.data.source import Parts, Scaled, Source, evenly, has_labels, measure_levels, open_source, sample
from dmjd.data.statistics import Statistics, statistics_of
from dmjd.data.transfer import transfer
from dmjd.engine.checkpoint import write_atomically
from dmjd.engine.claim import claim
from dmjd.engine.device import choose_precision, environment, memory_errors
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run, read_facts
from dmjd.engine.stopwatch import Stopwatch
from dmjd.engine.target_cache import cache_targets
from dmjd.engine.trainer import Trainer
from dmjd.errors import CheckpointError, ConfigError, refusing_settings
from dmjd.evaluation.monitor import Monitor
from dmjd.evaluation.shown import glance, most_alike, patch_features, principal_colours, token_errors
from dmjd.evaluation.verdict import judge
from dmjd.factory import from_settings, masks_of, save_pretrained
from dmjd.masking import mask_counts, token_ids
from dmjd.method import DMJD
from dmjd.reports.nearest_pictures import NearestPictures, write_nearest
from dmjd.reports.pretraining import write_report
from dmjd.reports.strips import read_strips
from dmjd.reports.token_pictures import Samples, write_samples

NUM_PICTURES = 8  # held-out images in the report
NUM_COUNTED = 1000  # training images whose masks are counted in the report
NUM_QUERIES = 5  # held-out images shown with their neighbours
NUM_NEAREST = 5
NUM_COMPARED = 400  # training images among which neighbours are searched


def pretrain(settings: PretrainSettings) -> dict[str, Any] | None:
    """Pre-train with `settings` and write the run directory `settings.run.out`.

    Returns:
        The results, on rank 0.

    Raises:
        ConfigError: If settings are incompatible, `out` holds a run that is not to be resumed, or memory runs out.
        DataError: If there are no images or too many do not decode.
        CheckpointError: If the run to resume has other settings or images.
        NonFiniteError: If a loss is not finite; the last checkpoint is from before.
        Stopped: After a signal that stops runs.
    """
    settings.check_shown()
    run, out = settings.run, settings.run.out
    with ExitStack() as stack, join_ranks(run.device) as ranks, claim(run.out, resume=run.resume, ranks=ranks):
        ranks.micro_batch(run.batch_size, settings.optim.accumulation)
        torch.manual_seed(run.seed)
        network = create(settings)  # incompatible settings are refused before images are listed
        found, statistics = find_images(settings, ranks)
        if (statistics.mean, statistics.std) != tuple(map(tuple, network.normalize.statistics)):
            torch.manual_seed(run.seed)
            network = create(settings, statistics)
        network = network.to(ranks.device)
        parts = Parts(in_memory(found.train), in_memory(found.held_out))
        model = ParallelModel(network, ranks, **run.training)
        if settings.teacher.cache:  # now, since FSDP has copied the network, and an open file cannot be copied
            cache(settings, network, stack, num_crops=len(parts.train) * (settings.crop.variants or 1))
        scaled = Parts(Scaled(parts.train, statistics.levels), Scaled(parts.held_out, statistics.levels))
        monitor = Monitor(
            scaled, settings.model.image_hw, partial(masks_of, settings), settings.monitor.max_images, run.workers
        )
        samples = training_samples(settings, parts.train, statistics.levels, ranks.device)
        trainer = make_trainer(settings, model, parts.train, monitor)
        trainer.begin(resume=run.resume)
        keep_statistics(trainer.run, statistics)
        if trainer.done == trainer.plan.steps and (summary := read_facts(out / "summary.json")):
            if not ranks.is_main:
                return None
            print(f"this run is finished; look at {write_report(out)}")
            return summary
        name_broken(trainer.run, parts)
        if ranks.is_main:  # now, since the folder may be gone at the end
            trainer.run.summary["ignored"] = sum(ignored_files(run.data).values())
        with trainer.run.logging():
            trained = fit(settings, trainer, samples, monitor)
            return finish(settings, trainer, samples, scaled, trained)


def create(settings: PretrainSettings, statistics: Statistics | None = None) -> DMJD:
    """Create the untrained model, with the usual statistics of images or the given ones.

    Raises:
        ConfigError: If settings are incompatible.
    """
    with refusing_settings():
        return from_settings(settings, (statistics.mean, statistics.std) if statistics else None)


def find_images(settings: PretrainSettings, ranks: Ranks) -> tuple[Parts, Statistics]:
    """Find the images and their statistics; a set of one image is also its held-out part."""
    model, run = settings.model, settings.run
    wanted = Wanted(model.in_chans, model.image_hw, pages=run.data_pages)
    # The listing of a large folder is cached, so that one rank walks it, not all at once.
    train, held_out = ranks.main_first(partial(open_source, run.data, wanted, seed=run.seed))
    return Parts(train, held_out if len(held_out) else train), find_statistics(run, train, model.in_chans)


def find_statistics(run: PretrainRun, images: Source, in_chans: int) -> Statistics:
    """Look up or measure the statistics of the images, and report the range of deep images on stderr.

    Raises:
        ConfigError: If the statistics have another number of channels.
    """
    asked = run.data_statistics
    given = None if asked in ("auto", "imagenet") else Statistics.read(Path(asked))
    levels = Levels(*run.data_range) if run.data_range else given.levels if given else measure_levels(images) or BYTES
    if levels != BYTES:
        print(f"values of {levels.low:g} to {levels.high:g} become 0 to 1; {images.address}", file=sys.stderr)
    if given:
        known = replace(given, levels=levels)
    elif asked == "imagenet" or (in_chans == 3 and levels == BYTES):  # deep colours are far from ImageNet's
        known = Statistics(*STATISTICS[3], levels)
    else:
        known = statistics_of(sample(images), levels)
    if len(known.mean) != in_chans:
        raise ConfigError(f"statistics of {len(known.mean)} channels, not {in_chans}; --data_statistics {asked}")
    return known


def keep_statistics(run: Run, statistics: Statistics) -> None:
    """Record the statistics, or check that they have not changed in a resumed run: images or a file may have.

    Raises:
        CheckpointError: If they have changed, and `allow_change` names no setting of the data.
    """
    now = json.loads(json.dumps(asdict(statistics)))  # as read from a checkpoint
    known = run.summary.setdefault("statistics", now)
    if known != now and not any(name.startswith("data") for name in run.settings["allow_change"]):
        measured = run.settings["data_statistics"] in ("auto", "imagenet")
        what = "the values of the images have changed" if measured else "the values of --data_statistics have changed"
        raise CheckpointError(f"{what}; {run.out}; restore them, or resume with --allow_change data_statistics")
    run.summary["statistics"] = now


def name_broken(run: Run, parts: Parts) -> None:
    """Record the images that did not decode when they were read into memory, and warn before training begins."""
    train, held_out = ({} if not isinstance(part, PackedImages) else part.broken for part in parts)
    if parts.train.address != parts.held_out.address:  # two folders may have images of the same name
        held_out = {f"{parts.held_out.address}/{name}": reason for name, reason in held_out.items()}
    broken = train | held_out
    run.skip(broken)
    if broken and run.ranks.is_main:
        name, reason = next(iter(broken.items()))
        such = f"left out {len(broken)} of {sum(map(len, set(parts)))} images, such as {name}: {reason}"
        print(f"warning: {such}; see {run.out / 'skipped.tsv'}", file=sys.stderr)


def cache(settings: PretrainSettings, network: DMJD, stack: ExitStack, *, num_crops: int) -> None:
    """Cache the targets of frozen teachers on disk until the stack unwinds, and report how much space that takes.

    Raises:
        ConfigError: If there is no frozen teacher.
        StorageError: If there is not enough space.
    """
    assert settings.teacher.cache
    caches = stack.enter_context(cache_targets(network, settings.teacher.cache))
    if not caches:
        raise ConfigError("no frozen teacher among the targets; --teacher.cache; leave it out")
    for each in caches:
        print(each.reserve(num_crops), file=sys.stderr)


def make_trainer(settings: PretrainSettings, model: ParallelModel, images: Source, monitor: Monitor) -> Trainer:
    """Make the trainer from the settings; evaluations use at most a share of the images that training reads."""
    run, optim = settings.run, settings.optim
    steps = run.num_steps(len(images))
    plan = Plan(steps=steps, lr=settings.lr, **run.plan, **settings.monitor.plan, **optim.plan)
    affordable = int(settings.monitor.max_share * steps * run.batch_size / monitor.num_images)
    return Trainer(
        Run(
            to_dict(settings),
            images,
            ranks=model.ranks,
            held_out=len(monitor.parts.held_out),
            defaults=flags_of(type(settings)),
        ),
        model,
        create_optimizer(model.module, lr=settings.lr, **optim.keywords),
        replace(plan, evals=min(plan.evals, affordable)),
        autocast=choose_precision(run.precision, model.ranks.device, model.module),
    )


def training_samples(settings: PretrainSettings, images: Source, levels: Levels, device: torch.device) -> MaskedSamples:
    """Make the training samples from the settings, and from a tensor on the device if images are few and small.

    Raises:
        ConfigError: If images are to be on the device but do not form a tensor, or crops have more sizes than the run
            has epochs.
        DataError: If images have more than 8 bits, but are said to range from 0 to 255.
    """
    crop, asked = settings.crop, settings.run.data_on_device
    stack = stack_of(images) if asked != "no" else None
    if stack and levels == BYTES:
        refuse_deep(stack.pixels, images.address)
    if asked == "yes" and stack is None:
        raise ConfigError(f"images of several sizes, or too many to hold; {images.address}; --data_on_device auto")
    stack = stack.to(device) if stack and (asked == "yes" or stack.fits(device)) else None
    cropping = RandomCrop(settings.model.image_hw, crop.scale, crop.ratio, crop.flip)
    run, sizes = settings.run, settings.crop_sizes
    epochs = run.num_steps(len(images)) * run.batch_size / len(images)
    first = [int(epochs * part / len(sizes)) for part in range(len(sizes))]
    if len({*first}) < len(first):
        said = f"{len(first)} sizes of crops and {epochs:.3g} epochs; --crop.progressive"
        raise ConfigError(f"{said}; choose fewer sizes, or more --epochs")
    parts = tuple(zip(first, sizes, strict=True))
    return MaskedSamples(images, cropping, run.seed, crop.variants, levels, stack, parts)


def fit(settings: PretrainSettings, trainer: Trainer, samples: MaskedSamples, monitor: Monitor) -> dict[str, float]:
    """Train to the end, and return the last evaluation."""
    model, plan, device = trainer.model, trainer.plan, trainer.ranks.device
    network: Any = model.module
    targets: list[Any] = [network.target, network.visible_target]
    stopwatch = Stopwatch(device, (target for target in targets if isinstance(target, nn.Module)))
    patch_size, masking = settings.model.patch_size, asdict(settings.masking)
    longer = settings.run.longer

    def objective(model: ParallelModel, batch: MaskedBatch) -> dict[str, Tensor]:
        images = samples.pixels(batch, device)
        grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
        masked = masks_of(settings, transfer(batch.seeds, device), grid)
        losses = model(images, token_ids(masked, mask_counts(grid, **masking)[0]))
        return {"loss": losses.total, "loss_masked": losses.masked, "loss_visible": losses.visible}

    def evaluate(step: int) -> dict[str, float]:
        measured = monitor.measure(model, trainer.autocast, probe=step in (0, plan.steps))
        stopwatch.read()  # the time of targets in evaluations does not count as that of steps
        if 0 < step < plan.steps and trainer.ranks.is_main:
            verdict = judge(trainer.run.summary["untrained"], measured, longer=longer)
            # Early on, good runs too predict the mean target, and lose directions that they later regain.
            if verdict.kind in ("collapsed", "nothing") and step > plan.steps / 2:
                print(f"warning: step {step}: {verdict.line}; {verdict.advice}", file=sys.stderr)
        return measured

    return trainer.fit(
        samples,
        None,
        objective,
        evaluate,
        after_step=lambda step: network.update_targets(step / plan.steps),
        gauge=lambda seconds: {} if model.compiled else {"target_share": round(stopwatch.read() / seconds, 4)},
        untrained=True,
    )


def finish(
    settings: PretrainSettings, trainer: Trainer, samples: MaskedSamples, parts: Parts, trained: dict[str, float]
) -> dict[str, Any] | None:
    """Write backbone, summary and report, print what to do next, and return the summary."""
    out, run, steps, data = settings.run.out, trainer.run, trainer.plan.steps, settings.run.data
    network: Any = trainer.model.whole()
    if not trainer.ranks.is_main:
        return None
    encoder = network.encoder
    path = out / "backbone.safetensors"
    levels = samples.levels
    save_backbone(
        path,
        encoder.backbone,
        encoder.architecture,
        *network.normalize.statistics,
        value_range=(levels.low, levels.high),
    )
    save_pretrained(out / "pretrained.safetensors", network, settings, (levels.low, levels.high))
    with memory_errors("choose cpu for --device"):
        draw(settings, network, samples, parts, steps=steps)
    if run.log_to and (pictures := out / "samples.safetensors").exists():
        run.show(read_strips(pictures), steps)
    longer = settings.run.longer
    verdict = judge(run.summary["untrained"], trained, longer=longer)
    if settings.init is None:
        looks = steps * settings.run.batch_size * settings.masking.num_views / len(parts.train)
        verdict = verdict.knowing(len(parts.train), looks, longer=longer)
    summary = run.summary | {
        "trained": trained,
        "verdict": verdict._asdict(),
        "seconds": round(run.seconds, 1),
        "images": steps * settings.run.batch_size,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in encoder.backbone.parameters()),
        "data": data,
        "num_images": len(parts.train),
        "labels": has_labels(parts.train),
        "skipped": len(run.skipped),
        "environment": environment(trainer.ranks.device, trainer.autocast) | {"processes": trainer.ranks.world_size},
        "command": shlex.join(["dmjd", "pretrain", "--config", str(out / "config.yaml"), "--out", "NEW"]),
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    page = write_report(out)
    verb = ["knn"] if has_labels(parts.train) else ["embed", "--out", "features.npy"]
    pages = ["--data_pages", settings.run.data_pages] if settings.run.data_pages else []
    then = shlex.join(["dmjd", *verb, "--backbone", str(path), "--data", data, *pages])
    print(f"{verdict.kind}: {verdict.line}" + (f"; try {verdict.advice}" if verdict.advice else ""))
    print(f"done in {run.seconds:.0f} s; look at {page}; then: {then}")
    return summary


@torch.inference_mode()
def draw(settings: PretrainSettings, network: DMJD, samples: MaskedSamples, parts: Parts, *, steps: int) -> None:
    """Write the pictures of the report: held-out images, their masks, targets, predictions and features.

    Also write how often tokens were hidden in the last epoch of training, from the same masks drawn again, and the
    training images that are most like held-out ones.
    """
    middle, chosen = partial(center_crop, size=settings.model.image_hw), evenly(len(parts.held_out), NUM_PICTURES)
    ((crops, drawn),) = read_batches(
        parts.held_out, chosen, middle, batch_size=NUM_PICTURES, workers=0, pin_memory=False
    )
    if not drawn:
        return
    images = crops.float().to(next(network.parameters()).device)
    masked = masks_of(settings, samples.mask_seeds(torch.zeros(len(drawn), dtype=torch.long), torch.tensor(drawn)))
    predicted = network.eval().predict(images, masked).masked.float().cpu()
    hidden = token_ids(masked).hidden[..., None].expand(-1, -1, predicted.shape[-1])
    full = torch.zeros(len(predicted), math.prod(settings.model.grid), predicted.shape[-1]).scatter(
        1, hidden, predicted
    )
    full = full.unflatten(0, (len(images), -1))
    truth = network.target(images).float().cpu()
    colours = principal_colours(patch_features(network, images))
    images = images.round().to(torch.uint8).cpu()
    last_epoch = (steps * settings.run.batch_size - 1) // len(samples.images)
    counted = torch.tensor(evenly(len(samples.images), NUM_COUNTED))
    times_hidden = masks_of(settings, samples.mask_seeds(torch.full_like(counted, last_epoch), counted)).sum(dim=1)

    def picture(values: Tensor, place: int) -> Tensor:
        return in_colour(network.target.picture(values, images[place], truth), settings)

    shown = range(len(images))
    write_samples(
        settings.run.out / "samples.safetensors",
        Samples(
            images=torch.stack([in_colour(image, settings) for image in images]),
            masked=masked,
            target=torch.stack([picture(truth[place], place) for place in shown]),
            predicted=torch.stack([torch.stack([picture(view, place) for view in full[place]]) for place in shown]),
            errors=token_errors(full, truth),
            patch_colours=colours,
            times_hidden=times_hidden,
        ),
        {
            "grid": "{} {}".format(*settings.model.grid),
            "target": settings.masked.target,
            "caption": network.target.caption,
            "backdrop": network.target.backdrop,
        },
    )
    draw_nearest(settings, network, parts, drawn)


def draw_nearest(settings: PretrainSettings, network: DMJD, parts: Parts, drawn: Sequence[int]) -> None:
    """Write which of some training images are most like held-out ones, by features and by pixels.

    Args:
        settings: Settings of the run.
        network: The trained network.
        parts: The images.
        drawn: Indices of held-out images that decode.
    """
    train, held_out = parts
    queries = [drawn[place] for place in evenly(len(drawn), NUM_QUERIES)]
    bank = glance(network, train, evenly(len(train), NUM_COMPARED), settings.model.image_hw)
    asked = glance(network, held_out, queries, settings.model.image_hw)
    if len(train) == 1 or bank is None or asked is None:  # the only image is also the held-out one
        return
    features = most_alike(asked.features, bank.features, NUM_NEAREST)
    pixels = most_alike(asked.pixels, bank.pixels, NUM_NEAREST)
    thumbs = torch.stack([in_colour(thumb, settings) for thumb in bank.thumbs])
    names = [train.name(number) for number in bank.numbers.tolist()]
    write_nearest(
        settings.run.out / "neighbours.safetensors",
        NearestPictures(
            queries=torch.stack([in_colour(thumb, settings) for thumb in asked.thumbs]),
            by_features=thumbs[features.rows],
            features_similarity=features.similarity,
            by_pixels=thumbs[pixels.rows],
            pixels_similarity=pixels.similarity,
        ),
        {
            "queries": [held_out.name(number) for number in queries],
            "by_features": [[names[row] for row in rows] for rows in features.rows.tolist()],
            "by_pixels": [[names[row] for row in rows] for rows in pixels.rows.tolist()],
            "compared": len(names),
        },
    )


def in_colour(picture: UInt8[Tensor, "C h w"], settings: PretrainSettings) -> UInt8[Tensor, "c h w"]:
    """Choose the channels of a picture to show: those in the settings, or the first three, or the first of two."""
    channels = len(picture)
    if channels != settings.model.in_chans or (channels in (1, 3) and not settings.monitor.channels):
        return picture
    return picture[list(settings.monitor.channels or (range(3) if channels > 2 else range(1)))]
