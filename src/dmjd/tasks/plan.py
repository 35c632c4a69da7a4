"""`dmjd plan`: estimate the cost of a pre-training run before it begins."""

import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer

from dmjd.config.load import by_flag, read_yaml
from dmjd.config.plan import PlanRun, PlanSettings
from dmjd.config.pretrain import SHAPE, PretrainSettings
from dmjd.config.rules import PRESETS, flags_of, is_flat, plain
from dmjd.data.checkup import file_of
from dmjd.data.decode import Wanted
from dmjd.data.source import Source, open_source
from dmjd.engine.device import choose_device, choose_precision, computes_in_bf16, memory_errors
from dmjd.engine.distributed import recompute
from dmjd.engine.optim import create_optimizer
from dmjd.errors import ConfigError, refusing_settings
from dmjd.factory import from_settings, masks_of
from dmjd.method import DMJD
from dmjd.planning.estimate import Job, Outlook, Pace, assume, look_ahead
from dmjd.planning.gpus import Device, find_device, listed
from dmjd.planning.script import machines, slurm, torchrun
from dmjd.planning.trial import Bench, Trial, try_steps
from dmjd.planning.work import StepParts, Work, count, recount
from dmjd.reports.plan import write_plan

USUAL_BYTES = 110e3  # mean size of a file of ImageNet
WEIGHED = 200  # files whose sizes are read
IMAGENET = 1_281_167  # images for which the published recipes were made
PREPARED = 256 / 224  # ratio of the sides of prepared images and crops, by default of `dmjd prepare`
SHAPED = 4 / 3  # ratio of the sides of a typical photograph
WIDEST = 1024  # most devices in the table
# Settings that the command of a script gets from the plan, or leaves to the machine that it runs on.
OWN = {"device", "resume", "config", "debug", "optim.accumulation"}


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Print the cost of a run as a page or as a line of JSON, or print the run as a script.

    Returns:
        The numbers of the page.

    Raises:
        ConfigError: If settings are incompatible, the device is unknown, or the number of images is not given.
        DataError: If the images are to be counted and there are none.
    """
    run = settings.run
    if run.preset == "auto" and not run.config:
        such = "auto chooses by trial steps on the machine of the run"
        raise ConfigError(f"{such}; --preset auto; name a recipe, or give the config.yaml of such a run by --config")
    if run.batch_size % (settings.devices * settings.optim.accumulation):
        of = f"{settings.devices} devices x optim.accumulation {settings.optim.accumulation}"
        raise ConfigError(f"batch_size {run.batch_size} is no multiple of {of}; --devices; choose numbers that divide")
    device, images, image_bytes = find_device(run.device), *weigh(settings)
    if settings.measure is not None:
        refuse_another(device)
    parts = parts_of(settings)
    precision = precision_of(settings, device)
    work = count(parts, precision=precision, on_gpu=device.kind == "gpu")
    side = round(PREPARED * min(settings.model.image_hw))
    job = Job(
        steps=run.num_steps(images),
        batch_size=run.batch_size,
        accumulation=settings.optim.accumulation,
        image_bytes={"files": image_bytes, "prepared": side**2 * SHAPED * settings.model.in_chans},
        parallel=run.parallel,
        network=settings.network * 1e9,
        storage=settings.storage * 1e9,
        price=settings.price,
    )
    trial = measure(settings, parts, work, device) if settings.measure is not None else None
    speed = speed_of(settings, work, device, precision, trial)
    outlook = look_ahead(job, work, device, speed, settings.devices)
    if settings.script:
        print(script(settings, outlook), end="")
        return {"command": command(settings, outlook), **outlook._asdict()}
    found = {
        **describe(settings, work, precision, images),
        "image_bytes": image_bytes,
        "prepared_size": side,
        "disk": {kind: images * each for kind, each in job.image_bytes.items()},
        "storage": job.storage,
        "steps": job.steps,
        "recipe": beside_recipe(run, job.steps, images),
        "device": asdict(device) | {"usable": device.usable},
        "speed": asdict(speed),
        "measured": compare(trial, work, device, precision) if trial else None,
        "plan": outlook._asdict(),
        "scaling": [look_ahead(job, work, device, speed, many)._asdict() for many in powers(WIDEST)],
        "gpus": others(settings, job, parts, (precision, device.kind), work),
    }
    print(json.dumps(found) if settings.json else write_plan(found))
    return found


# -- what is planned ---------------------------------------------------------------------------------------------------


def weigh(settings: PlanSettings) -> tuple[int, float]:
    """Count the training images, and find the mean size of their files.

    Raises:
        ConfigError: If neither their number nor the images are given.
        DataError: If there are no images.
    """
    run, model = settings.run, settings.model
    if settings.images is None and not run.data:
        raise ConfigError("the number of images is not known; --images; give their number, or --data")
    if settings.images is not None and (settings.image_bytes or not Path(run.data or "?").exists()):
        return settings.images, settings.image_bytes or USUAL_BYTES
    train = open_source(run.data, Wanted(model.in_chans, model.image_hw, pages=run.data_pages), seed=run.seed).train
    return settings.images or len(train), settings.image_bytes or mean_bytes(train)


def mean_bytes(images: Source) -> float:
    """Compute the mean size of some files, evenly spaced over a set; for an archive, its size per image."""
    chosen = range(0, len(images), max(len(images) // WEIGHED, 1))
    sizes = [file.stat().st_size for index in chosen if (file := file_of(images, index))]
    if sizes:
        return float(statistics.mean(sizes))
    with suppress(OSError):
        if (whole := Path(images.address)).is_file():
            return whole.stat().st_size / len(images)
    return USUAL_BYTES


def parts_of(settings: PlanSettings) -> StepParts:
    """Collect the parts of a step. The weights to start from do not change its cost."""
    untrained = replace(settings, init=None)
    names = (settings.model.backbone, settings.masked.target, settings.visible.target or "")

    def create() -> DMJD:
        with refusing_settings():
            network = from_settings(untrained)
        if settings.run.activation_checkpointing:
            recompute(network)
        return network

    def optimizer(network: nn.Module) -> Optimizer:
        return create_optimizer(network, lr=0.0, **settings.optim.keywords)

    with refusing_settings():
        hidden = int(masks_of(settings, torch.zeros(1, dtype=torch.long))[0, 0].sum())
    return StepParts(
        create,
        optimizer,
        (settings.model.in_chans, *settings.model.image_hw),
        lambda seeds: masks_of(settings, seeds),
        hidden,
        reads_files=any(":" in name or name.endswith(".safetensors") for name in names),
    )


def precision_of(settings: PlanSettings, device: Device) -> str:
    """Choose the precision of products, as training does."""
    asked = settings.run.precision
    if asked != "auto":
        return asked
    if device.kind == "gpu":
        return "bf16" if device.has_bf16 else "fp32"
    masked, visible = replace(settings.masked, target="pixels"), replace(settings.visible, target=None)
    parts = parts_of(replace(settings, masked=masked, visible=visible))  # teachers read files, which meta cannot hold
    with torch.device("meta"):
        network = parts.create()
    cpu = torch.device("cpu")
    return "bf16" if computes_in_bf16(choose_precision(asked, cpu, network), cpu) else "fp32"


def describe(settings: PlanSettings, work: Work, precision: str, images: int) -> dict[str, Any]:
    """Describe the run and the work of its network."""
    run, model, masking = settings.run, settings.model, settings.masking
    shape = [model.size, *(f"{name} {value}" for name in SHAPE if (value := getattr(model, name)))]
    return {
        "preset": run.preset,
        "network": " ".join([model.backbone, *([] if model.has_own_shape else shape)]),
        "image_size": model.image_size,
        "views": masking.num_views,
        "mask_ratio": masking.mask_ratio,
        "target": settings.masked.target,
        "images": images,
        "epochs": run.num_steps(images) * run.batch_size / images,
        "batch_size": run.batch_size,
        "parallel": run.parallel,
        "precision": precision,
        "network_bandwidth": settings.network * 1e9,
        "work": asdict(work) | {"trained": work.trained},
    }


def beside_recipe(run: PlanRun, steps: int, images: int) -> dict[str, Any]:
    """Compare the steps of a run with those of its recipe on ImageNet, which were found to be enough.

    Returns:
        The recipe's steps, the run's steps as a multiple of them, and the epochs of these images that they amount to.
    """
    recipe = flags_of(PretrainSettings) | by_flag(read_yaml(PRESETS / f"{run.preset}.yaml"))
    enough = recipe["steps"] or round(recipe["epochs"] * IMAGENET / recipe["batch_size"])
    return {"steps": enough, "times": steps / enough, "epochs": enough * run.batch_size / images}


# -- how fast ----------------------------------------------------------------------------------------------------------


def refuse_another(device: Device) -> None:
    """Refuse to measure a device that is not that of this machine.

    Raises:
        ConfigError: If it is another device.
    """
    here = device if device.kind == "cpu" else find_device("auto")
    if here.name != device.name:
        raise ConfigError(f"{device.name} is not the device of this machine, {here.name}; --measure; leave it out")


def measure(settings: PlanSettings, parts: StepParts, work: Work, device: Device) -> Trial:
    """Train on the device of this machine.

    Raises:
        ConfigError: If it runs out of memory.
    """
    torch.manual_seed(settings.run.seed)
    asked = settings.run.device
    chosen = choose_device("cpu" if device.kind == "cpu" else asked if asked.startswith("cuda") else "auto")
    most = settings.run.batch_size // settings.devices
    with memory_errors("leave --measure out"):
        bench = Bench(parts, chosen, settings.run.precision)
        return try_steps(bench, work, usable=device.usable, most=most, seconds=settings.measure or 0.0)


def speed_of(settings: PlanSettings, work: Work, device: Device, precision: str, trial: Trial | None) -> Pace:
    """Return the pace of the device: as measured, or by its data sheet.

    Raises:
        ConfigError: If it has no data sheet.
    """
    if trial:
        peak = device.peak(precision)
        reached = work.flops / trial.image / peak if peak else None
        return Pace(image=trial.image, step=trial.step, utilisation=reached, measured=True)
    assumed = assume(work, device, precision, settings.utilisation)
    if assumed is None:
        raise ConfigError(f"no data sheet of {device.name}; --device; give --measure 30, or a device that is listed")
    return assumed


def compare(trial: Trial, work: Work, device: Device, precision: str) -> dict[str, Any]:
    """Compare measurements with counts."""
    peak = device.peak(precision)
    rows = [
        each._asdict()
        | {"flops": work.flops * each.batch / each.seconds, "counted": work.memory(each.batch)}
        | {"utilisation": work.flops * each.batch / each.seconds / peak if peak else None}
        for each in dict.fromkeys((trial.small, trial.large))
    ]
    return {"steps": rows, "largest": trial.largest}


def powers(most: int) -> Iterable[int]:
    """List 1, 2, 4 ... up to a number."""
    return (2**power for power in range(int(math.log2(most)) + 1))


def others(
    settings: PlanSettings, job: Job, parts: StepParts, counted_for: tuple[str, str], work: Work
) -> list[dict[str, Any]]:
    """Plan the same run on every listed GPU, by its data sheet.

    Args:
        settings: Settings of the plan.
        job: The run.
        parts: Parts of a step.
        counted_for: Precision and kind of device that `work` was counted for.
        work: The counted work of a step.
    """
    rows, counted = [], {counted_for: work}
    for name, device in listed().items():
        precision = precision_of(settings, device)
        if (precision, "gpu") not in counted:
            counted[precision, "gpu"] = recount(work, parts, precision=precision, on_gpu=True)
        here = counted[precision, "gpu"]
        speed = assume(here, device, precision, settings.utilisation)
        assert speed, "a GPU that is listed has a peak"
        outlook = look_ahead(job, here, device, speed, settings.devices)
        rows.append({"name": name, "precision": precision, "sheet": asdict(device), **outlook._asdict()})
    return rows


# -- the run as a script -----------------------------------------------------------------------------------------------


def script(settings: PlanSettings, outlook: Outlook) -> str:
    """Write the run as a script.

    Raises:
        ConfigError: If it does not fit into memory.
    """
    if not outlook.fits:
        wanted = "give --activation_checkpointing, more --devices or another --device"
        raise ConfigError(f"not one image of {settings.run.preset} fits; --device {settings.run.device}; {wanted}")
    words, out = ["dmjd", "pretrain", *command(settings, outlook)], str(settings.run.out)
    if settings.script == "torchrun":
        return torchrun(words, settings.devices, out=out)
    nodes, each = machines(settings.devices)
    cores = math.ceil(outlook.cores["files"] / nodes) + each
    return slurm(words, settings.devices, hours=outlook.hours, cores=cores, out=out)


def command(settings: PlanSettings, outlook: Outlook) -> list[str]:
    """Write the flags of the run: the recipe, a settings file if there is one, and all settings that differ."""
    run, recipe = settings.run, flags_of(PretrainSettings)
    for file in (PRESETS / f"{run.preset}.yaml", run.config):
        recipe |= by_flag(read_yaml(file)) if file else {}
    words = ["--config", str(run.config)] if run.config else []
    words += ["--preset", run.preset, "--data", run.data or "DATA", "--out", str(run.out)]
    for name, value, kind in leaves(settings):
        known = name in recipe and name not in OWN and name not in ("preset", "data", "out")
        if known and value is not None and plain(value) != recipe[name] and str(value) != str(recipe[name]):
            if isinstance(value, bool):
                words.append(f"--{name}={value}")
            elif isinstance(value, tuple) and any(Ellipsis in get_args(each) for each in (kind, *get_args(kind))):
                words += [word for each in value for word in (f"--{name}", str(each))]
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    if outlook.accumulation > 1:
        words += ["--optim.accumulation", str(outlook.accumulation)]
    return [*words, "--resume"]


def leaves(settings: Any, prefix: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Yield all settings by the names of their flags, with their types."""
    hints, annotated = get_type_hints(type(settings)), get_type_hints(type(settings), include_extras=True)
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if is_dataclass(value):
            yield from leaves(value, prefix if is_flat(annotated[setting.name]) else f"{prefix}{setting.name}.")
        else:
            yield f"{prefix}{setting.name}", value, hints[setting.name]
