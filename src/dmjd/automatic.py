"""What `--preset auto` does before `dmjd pretrain` begins: look at the images, time a few steps, choose a recipe.

The rules are `dmjd.config.auto`.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import mean, median

import torch
from torch.optim import Optimizer

from dmjd.config import auto
from dmjd.config.auto import Chosen, Facts
from dmjd.config.pretrain import SHAPE, PretrainSettings
from dmjd.data.checkup import open_as_most
from dmjd.data.crops import RandomCrop
from dmjd.data.levels import BYTES
from dmjd.data.loader import spare_cores
from dmjd.data.masked import MaskedSamples
from dmjd.data.memory import MEMORY_LIMIT, PackedImages, stack_of
from dmjd.data.source import HELD_OUT_PARTS, Source, Subset, evenly, hold_out, measure_levels
from dmjd.engine.device import choose_precision, is_memory_error, memory_errors
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.optim import create_optimizer
from dmjd.errors import DataError, refusing_settings
from dmjd.factory import from_settings, masks_of
from dmjd.method import DMJD

MINUTES = 30.0  # where nobody says
NUM_LOOKED_AT = 64
TIMED = 2  # steps, after one to warm up
IMAGES = {"cpu": 32, "gpu": 256}  # in each of them: fewer would leave a GPU idle
SPARE = 0.9  # of the minutes for steps; the others go to evaluations, checkpoints and the report
SMALLER = "give a smaller --model.image_size, or choose cpu for --device"  # where the smallest network does not fit
Parse = Callable[[Chosen], PretrainSettings]  # settings with these below what a user gives


def choose(settings: PretrainSettings, parse: Parse) -> Chosen:
    """Choose what the user leaves open, and say on stderr what and why.

    Args:
        settings: What the user gives, over defaults.
        parse: Makes settings of a choice, over which stands what the user gives.

    Returns:
        The choice, as a preset has it.

    Raises:
        DataError: If there are no images, or none decodes.
        ConfigError: If settings do not go together, or the smallest network has not the memory.
    """
    with join_ranks(settings.run.device) as ranks, memory_errors(SMALLER):
        chosen, said = ranks.on_main(lambda: _choose(settings, parse, ranks.device, ranks.world_size))
        if ranks.is_main:
            for line in said:
                print(f"auto: {line}", file=sys.stderr)
    return chosen


def _choose(
    settings: PretrainSettings, parse: Parse, device: torch.device, world_size: int
) -> tuple[Chosen, list[str]]:
    run = settings.run
    make(settings)  # settings that do not go together are refused before images are looked for
    images, in_chans = find(settings)
    asked = parse({"model": {"in_chans": in_chans}}).model.in_chans
    if asked != in_chans:  # the user's own
        images, in_chans = find(settings, asked)
    began = time.perf_counter()
    few = PackedImages(Subset(images, evenly(len(images), NUM_LOOKED_AT)))
    reading = (time.perf_counter() - began) / len(few)  # of an image, on one core
    sides = [min(few.shapes[number, :2].tolist()) for number in range(len(few)) if number not in few.bad]
    if not sides:
        raise DataError(f"none of {len(few)} images decodes ({few.bad[0]}); {run.data}; see dmjd doctor")
    kind = "cpu" if device.type == "cpu" else "gpu"
    minutes = run.minutes or MINUTES
    facts = Facts(len(images), int(median(sides)), in_chans, kind, minutes)
    held = len(images) * few.pixels.nbytes / len(few) <= MEMORY_LIMIT
    at_first = reading * len(images) / 60 if held else 0.0
    readers = world_size * (spare_cores() if run.workers is None else max(run.workers, 1))
    training = replace(facts, minutes=max(SPARE * minutes - at_first, 0.1 * minutes))

    chosen: Chosen = {}
    model, seconds, passes, larger = None, 0.0, 0.0, False
    for network in auto.networks(facts):
        trial = parse(network)
        if trial.model.size != network["model"]["size"]:  # the user's own, and so are width and depth
            own = {key: value for key, value in network["model"].items() if key not in SHAPE}
            network = network | {"model": own}
            trial = parse(network)
        if trial.model == model:  # there is no other one
            continue
        try:
            took = time_image(trial, few, device, IMAGES[kind]) / world_size
        except (RuntimeError, MemoryError) as error:
            if not (chosen and is_memory_error(error)):
                raise
            break
        took = took if held else max(took, reading / readers)
        count = auto.epochs(training, took, trial.masking.num_views)
        if chosen and count * trial.masking.num_views < auto.OFTEN:
            larger = True
            break
        chosen, model, seconds, passes = network, trial.model, took, count
    fitting = parse(chosen | {"epochs": passes})
    chosen = chosen | auto.schedule(facts, fitting.run.epochs, asdict(fitting.masking))
    if steps := fitting.run.steps:  # the user's own
        passes = steps * parse(chosen).run.batch_size / len(images)
        chosen["optim"] |= {"warmup_epochs": float(f"{auto.WARM_UP * passes:.3g}")}
    said = describe(facts, parse(chosen), seconds, at_first, device)
    if larger:
        said[1] += f"; a larger one would not see each image {auto.OFTEN} times"
    return chosen, said


def find(settings: PretrainSettings, in_chans: int | None = None) -> tuple[Source, int]:
    """Find the images to train on, with the channels that most of them have, or with so many."""
    run = settings.run
    parts, wanted = open_as_most(run.data, in_chans, run.data_pages)
    train = parts.get("train", parts.get(""))
    if train is None:
        raise DataError(
            f"no part to train on; {run.data}; the set needs a part called train, and has {', '.join(parts)}"
        )
    brings_own = any(part in parts for part in HELD_OUT_PARTS)
    return (train if brings_own else hold_out(train, run.seed).train), wanted.in_chans


def make(settings: PretrainSettings, device: torch.device | None = None) -> tuple[DMJD, Optimizer]:
    """Make the untrained network, and its optimizer.

    Raises:
        ConfigError: If settings do not go together.
    """
    with refusing_settings():
        network = from_settings(settings).to(device).train()
    return network, create_optimizer(network, lr=0.0, **settings.optim.keywords)


def time_image(settings: PretrainSettings, images: PackedImages, device: torch.device, count: int) -> float:
    """Train a few steps of `count` of some images, as the run will, and return the seconds that one takes.

    Where crops grow, it is the mean over their sizes.

    Raises:
        ConfigError: If settings do not go together.
        RuntimeError: If the device has not the memory, see `is_memory_error`.
    """
    crop, stack = settings.crop, stack_of(images)
    samples = MaskedSamples(
        images,
        RandomCrop(settings.model.image_hw, crop.scale, crop.ratio, crop.flip),
        settings.run.seed,
        levels=measure_levels(images) or BYTES,
        stack=stack.to(device) if stack and stack.fits(device) else None,
    )
    network, optimizer = make(settings, device)
    model = ParallelModel(network, Ranks(device), checkpointing=settings.run.activation_checkpointing)
    autocast = choose_precision(settings.run.precision, device, network)
    means = []
    for height, width in settings.crop_sizes:
        sized, taken = replace(samples, crop=replace(samples.crop, size=(height, width))), list[float]()
        grid = height // settings.model.patch_size, width // settings.model.patch_size
        for step in range(TIMED + 1):
            began = time.perf_counter()
            batch = sized.__getitems__([(step, index % len(images)) for index in range(count)])
            with autocast():
                loss = model(sized.pixels(batch, device), masks_of(settings, batch.seeds.to(device), grid)).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            taken.append((time.perf_counter() - began) / count)
        means.append(median(taken[1:]))
    return mean(means)


def describe(
    facts: Facts, settings: PretrainSettings, seconds: float, at_first: float, device: torch.device
) -> list[str]:
    """Say in a few lines what was chosen and why."""
    model, masking, run = settings.model, settings.masking, settings.run
    where = f"{os.cpu_count()} cores" if device.type == "cpu" else str(device)
    channels = f"{facts.in_chans} channel{'s' if facts.in_chans > 1 else ''}"
    network = f"{model.embed_dim} wide" if model.embed_dim else f"of size {model.size}"
    steps = run.num_steps(facts.num_images)
    minutes = (steps * run.batch_size * seconds) / 60 + at_first
    passes = steps * run.batch_size / facts.num_images
    predicted = f"{settings.masked.target} of hidden tokens"
    if settings.visible.weight:
        predicted += f" and {settings.visible.target or settings.masked.target} of visible ones are predicted"
    else:
        predicted += " is predicted"
    return [
        f"{facts.num_images} images, shorter side {facts.side} px, {channels}; {where}; {facts.minutes:g} minutes",
        f"{model.backbone} {network}, {model.image_size} px in patches of {model.patch_size}: "
        f"{1000 * seconds:.3g} ms an image",
        f"{masking.num_views} views of an image hide {masking.mask_ratio:.0%} each; {predicted}",
        f"{passes:.3g} epochs, {steps} steps of {run.batch_size} images, peak learning rate {settings.lr:.2g}: "
        f"about {minutes:.0f} minutes; an image is seen {passes * masking.num_views:.0f} times",
        "for another length --minutes or --epochs; every other flag stands above what is chosen here",
    ]
