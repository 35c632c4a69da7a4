"""`--preset auto`, before `dmjd pretrain` begins: sample the images, time a few steps, choose a recipe.

The rules are in `dmjd.config.auto`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor
from torch.optim import Optimizer

from dmjd.backbones import encoder_of
from dmjd.backbones.files import create_network
from dmjd.config import auto
from dmjd.config.auto import Chosen, Facts, Given
from dmjd.config.pretrain import PretrainSettings
from dmjd.data.checkup import open_as_most
from dmjd.data.crops import RandomCrop
from dmjd.data.decode import BadImage, Reduce
from dmjd.data.levels import BYTES
from dmjd.data.loader import spare_cores
from dmjd.data.masked import MaskedSamples
from dmjd.data.memory import MEMORY_LIMIT, PackedImages, stack_of
from dmjd.data.sampler import StepKeys
from dmjd.data.source import Source, Subset, View, evenly, measure_levels, split
from dmjd.data.workers import usable_cores
from dmjd.engine.device import choose_precision, is_memory_error, memory_errors
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.optim import create_optimizer
from dmjd.errors import DataError, refusing_settings
from dmjd.factory import from_settings, masks_of
from dmjd.initialization import StartingWeights
from dmjd.method import DMJD

MINUTES = 30.0  # default
NUM_LOOKED_AT = 64
TIMED = 2  # steps, after one to warm up
SPARE = 0.9  # share of the minutes for steps; the rest is for evaluations, checkpoints and the report
SMALLER = "give a smaller --model.image_size, or choose cpu for --device"  # if the smallest network does not fit
Parse = Callable[[Chosen], PretrainSettings]  # resolves settings with a choice, which the user's settings override


def choose(settings: PretrainSettings, own: Mapping[str, Any], parse: Parse) -> Chosen:
    """Choose the settings that the user does not give, and report the choices and reasons on stderr.

    Args:
        settings: The user's settings, over defaults.
        own: The user's settings among `auto.OWN`, as written.
        parse: Resolves settings with a choice, which the user's settings override.

    Returns:
        The choice, in the form of a preset.

    Raises:
        DataError: If there are no images, or none decodes.
        CheckpointError: If a network that the user names does not load.
        ConfigError: If settings conflict, or even the smallest network does not fit into memory.
    """
    with join_ranks(settings.run.device) as ranks, memory_errors(SMALLER):
        chosen, said = ranks.on_main(lambda: _choose(settings, own, parse, ranks))
        if ranks.is_main:
            for line in said:
                print(f"auto: {line}", file=sys.stderr)
    return chosen


def _choose(settings: PretrainSettings, own: Mapping[str, Any], parse: Parse, ranks: Ranks) -> tuple[Chosen, list[str]]:
    run, kind = settings.run, "cpu" if ranks.device.type == "cpu" else "gpu"
    given, minutes = given_network(settings), run.minutes or MINUTES
    usual = Facts(1, auto.SIDES["cpu"][-1], settings.model.in_chans, "cpu", minutes)
    parts = ranks.world_size * settings.optim.accumulation
    first = parse(auto.networks(usual, own, given)[0] | {"batch_size": parts})  # or with the user's own batch size
    ranks.micro_batch(first.run.batch_size, settings.optim.accumulation)
    make(first)  # refuse conflicting settings before searching for images
    images, in_chans = find(settings)
    asked = parse({"model": {**auto.image(own, usual.side, kind), "in_chans": in_chans}})
    asked.check_shown()
    if asked.model.in_chans != in_chans:  # the user's own
        images, in_chans = find(settings, asked.model.in_chans)
    sample = look(images, run.data)
    facts = Facts(len(images), sample.side, in_chans, kind, minutes)
    held = len(images) * sample.largest <= MEMORY_LIMIT
    at_first = sample.seconds * len(images) / 60 if held else 0.0
    training = replace(facts, minutes=max(SPARE * minutes - at_first, 0.1 * minutes))
    networks = auto.networks(facts, own, given)
    few = ForCrops(Subset(images, sample.numbers), None if held else crop_of(parse(networks[0])))
    packed = PackedImages(few)  # reads them all
    readers = ranks.world_size * (spare_cores() if run.workers is None else max(run.workers, 1))
    waiting = 0.0 if held else few.seconds / len(few) / readers  # seconds per image that all workers together need

    def measure(trial: PretrainSettings) -> float:
        return max(time_image(trial, packed, ranks.device, auto.TRIED[kind]) / ranks.world_size, waiting)

    chosen, seconds, passes, larger = largest(networks, training, parse, measure)
    fitting = parse(chosen | {"epochs": passes})
    chosen = chosen | auto.schedule(
        facts,
        fitting.run.epochs,
        asdict(fitting.masking),
        world_size=ranks.world_size,
        accumulation=settings.optim.accumulation,
    )
    if parse(chosen).run.batch_size != chosen["batch_size"]:  # the user's own, in parts that the user knows to fit
        del chosen["optim"]["accumulation"]
    if steps := fitting.run.steps:  # the user's own
        passes = steps * parse(chosen).run.batch_size / len(images)
        chosen["optim"] |= {"warmup_epochs": float(f"{auto.WARM_UP * passes:.3g}")}
    said = describe(facts, parse(chosen), seconds, at_first, ranks.device)
    if larger:
        said[1] += f"; a larger one would not see each image {auto.OFTEN} times"
    return chosen, said


def given_network(settings: PretrainSettings) -> Given | None:
    """Look up the network that `--model.backbone` or the weights of `--init` name, if one does.

    Raises:
        CheckpointError: If it does not load.
        ConfigError: If it cannot read masked views.
    """
    if settings.model.has_own_shape:
        with torch.device("meta"), refusing_settings():
            encoder = encoder_of(*create_network(settings.model.backbone, image_hw=(224, 224), in_chans=3))
        return Given({"patch_size": encoder.patch_size}, encoder.embed_dim)
    if settings.init:
        weights = StartingWeights(settings.init)
        return Given(weights.shape, weights.width)
    return None


def largest(
    networks: Sequence[Chosen], facts: Facts, parse: Parse, measure: Callable[[PretrainSettings], float]
) -> tuple[Chosen, float, float, bool]:
    """Find the largest network that still sees every image often enough, by trying them in order.

    Args:
        networks: Networks from the smallest, which is always accepted, to the largest.
        facts: Facts about the set; the minutes are those for training steps.
        parse: See `choose`.
        measure: Measures the seconds per image of training with given settings.

    Returns:
        The network, its seconds per image, its epochs, and whether a larger one would see images too seldom.
    """
    chosen: Chosen = {}
    model, seconds, passes = None, 0.0, 0.0
    for network in networks:
        trial = parse(network)
        if trial.model == model:  # the user's settings leave no other network
            continue
        try:
            took = measure(trial)
        except (RuntimeError, MemoryError) as error:
            if not (chosen and is_memory_error(error)):
                raise
            break
        count = auto.epochs(facts, took, trial.masking.num_views)
        if chosen and count * trial.masking.num_views < auto.OFTEN:
            return chosen, seconds, passes, True
        chosen, model, seconds, passes = network, trial.model, took, count
    return chosen, seconds, passes, False


class Sample(NamedTuple):
    """A sample of images, evenly spaced over a set.

    Attributes:
        numbers: Indices of images that decode, and together fit into memory.
        side: Median of the shorter sides, in pixels.
        largest: Bytes of the largest image.
        seconds: Mean time to decode an image on one core.
    """

    numbers: list[int]
    side: int
    largest: int
    seconds: float


def look(images: Source, data: str) -> Sample:
    """Decode some images one at a time, since even a few large photographs might not fit into memory together.

    Raises:
        DataError: If none decodes.
    """
    numbers, sides, sizes, bad = list[int](), list[int](), list[int](), list[BadImage]()
    began = time.perf_counter()
    for number in evenly(len(images), NUM_LOOKED_AT):
        try:
            image = images.read(number)
        except BadImage as reason:
            bad.append(reason)
            continue
        numbers.append(number)
        sides.append(min(image.shape[1:]))
        sizes.append(image.nbytes)
    if not sides:
        raise DataError(f"none of {len(bad)} images decodes ({bad[0]}); {data}; see dmjd doctor")
    seconds = (time.perf_counter() - began) / len(numbers)
    fitting = max(MEMORY_LIMIT // max(sizes), 1)
    return Sample(numbers[:fitting], int(median(sides)), max(sizes), seconds)


class ForCrops(View):
    """Images as training reads them: if they are read for each crop, no larger than the crop needs.

    Args:
        source: Images that all decode.
        crop: Draws the crops; None if whole images are held in memory.

    Attributes:
        seconds: Total time spent reading.
    """

    def __init__(self, source: Source, crop: RandomCrop | None):
        super().__init__(source)
        self.crop, self.seconds = crop, 0.0

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Read an image for a crop that is drawn from its index."""
        began = time.perf_counter()
        if self.crop:
            (draws,) = self.crop.draws(torch.tensor([index]))
            reduce = partial(self.crop.factor, draws)
        image = self.source.read(index, reduce)
        self.seconds += time.perf_counter() - began
        return image


def crop_of(settings: PretrainSettings) -> RandomCrop:
    """Build the random crop of the settings."""
    crop = settings.crop
    return RandomCrop(settings.model.image_hw, crop.scale, crop.ratio, crop.flip)


def find(settings: PretrainSettings, in_chans: int | None = None) -> tuple[Source, int]:
    """Open the training images with the given number of channels, or with that of most of them."""
    run = settings.run
    parts, wanted = open_as_most(run.data, in_chans, run.data_pages)
    return split(parts, run.data, seed=run.seed).train, wanted.in_chans


def make(settings: PretrainSettings, device: torch.device | None = None) -> tuple[DMJD, Optimizer]:
    """Build the network, untrained even if `init` is set, and its optimizer.

    Raises:
        ConfigError: If settings conflict.
    """
    with refusing_settings():
        network = from_settings(replace(settings, init=None)).to(device).train()
    return network, create_optimizer(network, lr=0.0, **settings.optim.keywords)


def time_image(settings: PretrainSettings, images: PackedImages, device: torch.device, count: int) -> float:
    """Train a few steps of `count` images each, as the run will, and return the seconds per image.

    With progressive crops, this is the mean over their sizes.

    Raises:
        ConfigError: If settings conflict.
        RuntimeError: If the device runs out of memory, see `is_memory_error`.
    """
    stack = stack_of(images)
    samples = MaskedSamples(
        images,
        crop_of(settings),
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
            batch = sized.__getitems__(StepKeys(((step, index % len(images)) for index in range(count)), step))
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
    """Describe the choices and their reasons in a few lines."""
    model, masking, run = settings.model, settings.masking, settings.run
    cores = usable_cores()
    where = f"{cores} core{'s' * (cores > 1)}" if device.type == "cpu" else str(device)
    channels = f"{facts.in_chans} channel{'s' if facts.in_chans > 1 else ''}"
    shape = f" {model.embed_dim} wide" if model.embed_dim else f" of size {model.size}"
    network = model.backbone + ("" if model.has_own_shape else shape)
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
        f"{network}, {model.image_size} px in patches of {model.patch_size}: {1000 * seconds:.3g} ms an image",
        f"{masking.num_views} views of an image hide {masking.mask_ratio:.0%} each; {predicted}",
        f"{passes:.3g} epochs, {steps} steps of {run.batch_size} images, peak learning rate {settings.lr:.2g}: "
        f"about {minutes:.0f} minutes; an image is seen {float(f'{passes * masking.num_views:.3g}'):g} times",
        "change the length by --minutes or --epochs; any other flag overrides these choices",
    ]
