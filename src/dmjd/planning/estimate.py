"""From counted work to hours, memory, communication and storage of a run on a number of devices."""

from dataclasses import dataclass
from typing import NamedTuple

from dmjd.planning.gpus import Device
from dmjd.planning.work import Work

IN_A_MACHINE = 8  # devices
FEWEST = 8  # images in a device's micro-batch, below which kernels are too small to fill it; judgement
# Images of 224 px that a core decodes and crops per second: half of what two workers did (docs/results.md, Feeding).
DECODED = {"files": 538, "prepared": 755}
STEPPED = 32  # bytes that AdamW moves per trained parameter: 16 read, 12 written, and 4 for the norm


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to plan, and the hardware around the devices.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images in a step, over all devices.
        accumulation: Fewest micro-batches of a device in a step.
        image_bytes: Mean size of an image as a file, and in a prepared set.
        parallel: ddp or fsdp.
        network: Bandwidth between machines, in bytes/s per device.
        storage: Bandwidth of the storage, in bytes/s.
        price: Price of one device per hour; None if it is not known.
    """

    steps: int
    batch_size: int
    accumulation: int
    image_bytes: dict[str, float]
    parallel: str
    network: float
    storage: float
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast one device computes.

    Attributes:
        image: Seconds per image, forward and backward.
        step: Seconds that a step takes in addition to its images.
        utilisation: Share of the peak that products reach; None where no peak is known.
        measured: Whether this was timed rather than assumed.
    """

    image: float
    step: float
    utilisation: float | None
    measured: bool = False


class Outlook(NamedTuple):
    """A run on a number of devices; bytes, seconds, and rates of all devices together unless stated otherwise.

    Attributes:
        devices: Number of devices.
        images: Images of a device in a step.
        largest: Largest micro-batch that fits into the usable memory of a device.
        accumulation: Micro-batches of a device in a step.
        memory: Peak memory of a device, in bytes.
        step_seconds: Seconds per step.
        images_per_second: Images per second of one device.
        hours: Hours of the run.
        device_hours: Hours of all devices together.
        cost: Cost at the price.
        sent: Seconds of communication between devices in a step; None where no link is known.
        hidden: Share of these that overlaps with computation.
        storage: Bytes/s read from files or from a prepared set.
        cores: Cores that decode files or read a prepared set, for all devices.
        breaks: Problems, the worst first; empty if there are none.
    """

    devices: int
    images: int
    largest: int
    accumulation: int
    memory: float
    step_seconds: float
    images_per_second: float
    hours: float
    device_hours: float
    cost: float | None
    sent: float | None
    hidden: float | None
    storage: dict[str, float]
    cores: dict[str, float]
    breaks: list[str]

    @property
    def fits(self) -> bool:
        """Whether a device has the memory for one of its micro-batches."""
        return max(self.images // self.accumulation, 1) <= self.largest


def assume(work: Work, device: Device, precision: str, utilisation: float) -> Pace | None:
    """Compute the pace of a device from its data sheet; None if no peak is known."""
    peak = device.peak(precision)
    if peak is None:
        return None
    stepped = STEPPED * work.trained / device.bandwidth if device.bandwidth else 0.0
    return Pace(image=work.flops / (peak * utilisation), step=stepped, utilisation=utilisation)


def split(job: Job, work: Work, device: Device, devices: int) -> tuple[int, int, int]:
    """Split a step into micro-batches.

    Returns:
        Images of a device in a step, the largest micro-batch that fits, and the number of micro-batches: the fewest
        that divide the images and fit.
    """
    share = max(job.batch_size // devices, 1)
    how = {"devices": devices, "parallel": job.parallel}
    for parts in range(job.accumulation, share + 1):
        largest = work.largest(device.usable, accumulation=parts, **how)
        if share % parts == 0 and share // parts <= largest:
            return share, largest, parts
    return share, work.largest(device.usable, accumulation=job.accumulation, **how), job.accumulation


def look_ahead(job: Job, work: Work, device: Device, speed: Pace, devices: int) -> Outlook:
    """Estimate a run on a number of devices."""
    share, largest, parts = split(job, work, device, devices)
    at_a_time = max(share // parts, 1)
    computed = share * speed.image
    backward = at_a_time * speed.image * (1 - work.forward / work.flops)
    sent = send(job, work, device, devices, parts)
    covers = computed if job.parallel == "fsdp" else backward
    waited = max((sent or 0.0) - covers, 0.0)
    seconds = computed + speed.step + waited
    rate, hours = job.batch_size / seconds, job.steps * seconds / 3600
    storage = {kind: rate * each for kind, each in job.image_bytes.items()}
    breaks = {
        "fewer images than devices": job.batch_size < devices,
        "the batch is not divisible": job.batch_size % (devices * parts) != 0,
        "out of memory": at_a_time > largest,
        f"fewer than {FEWEST} images at a time": at_a_time < FEWEST and device.kind == "gpu",
        "communication is not fully hidden": waited > 0,
        f"storage above {job.storage / 1e9:g} GB/s": storage["files"] > job.storage,
    }
    return Outlook(
        devices=devices,
        images=share,
        largest=largest,
        accumulation=parts,
        memory=work.memory(at_a_time, devices=devices, parallel=job.parallel, accumulation=parts),
        step_seconds=seconds,
        images_per_second=rate / devices,
        hours=hours,
        device_hours=hours * devices,
        cost=None if job.price is None else hours * devices * job.price,
        sent=sent,
        hidden=min(covers / sent, 1.0) if sent else None,
        storage=storage,
        cores={kind: rate / each for kind, each in DECODED.items()},
        breaks=[what for what, happens in breaks.items() if happens],
    )


def send(job: Job, work: Work, device: Device, devices: int, parts: int) -> float | None:
    """Estimate the seconds of communication in a step, by ring algorithms: each device passes on all but its share.

    DDP all-reduces the gradients, twice around the ring. FSDP gathers the weights for every forward and every backward
    pass, and reduce-scatters the gradients, each once around. None where no link is known.
    """
    if devices == 1:
        return 0.0
    if device.link is None:
        return None
    rounds = 2 * parts + 1 if job.parallel == "fsdp" else 2
    # Between machines there are as many rings as devices in a machine, each with its own network link.
    link = device.link if devices <= IN_A_MACHINE else min(device.link, IN_A_MACHINE * job.network)
    return rounds * (devices - 1) / devices * work.gradients / link
