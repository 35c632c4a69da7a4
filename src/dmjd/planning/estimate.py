"""From counted work to hours, memory, communication and storage of a run on so many devices."""

from dataclasses import dataclass
from typing import NamedTuple

from dmjd.planning.gpus import Device
from dmjd.planning.work import Work

IN_A_MACHINE = 8  # devices
FEWEST = 8  # images of a device at a time, below which kernels are too small to fill it; judgement
# Images of 224 px that a core decodes and crops in a second: half of what two workers did (docs/results.md, Feeding).
DECODED = {"files": 538, "prepared": 755}
STEPPED = 32  # bytes that AdamW moves for a trained number: 16 read, 12 written, and 4 for the norm


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and what surrounds the devices.

    Attributes:
        steps: Of the optimizer.
        batch_size: Images in one, over all devices.
        accumulation: Parts of a step at least.
        image_bytes: Mean size of an image as a file, and in a set that is prepared.
        parallel: ddp or fsdp.
        network: Bytes/s between machines, for each device.
        storage: Bytes/s that the storage delivers.
        price: Of an hour of a device; None if nobody knows.
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
        image: Seconds that another image takes, forward and backward.
        step: Seconds that a step takes beside its images.
        utilisation: Share of the peak that products reach; None where no peak is known.
        measured: Whether that was timed, not assumed.
    """

    image: float
    step: float
    utilisation: float | None
    measured: bool = False


class Outlook(NamedTuple):
    """A run on so many devices; bytes, seconds, and rates of all devices together unless said otherwise.

    Attributes:
        devices: How many.
        images: Of a device in a step.
        largest: Images at a time that fit on a device, with what is spared.
        accumulation: Parts of a device's share of a step.
        memory: Bytes of a device where most is needed.
        step_seconds: Of a step.
        images_per_second: Of one device.
        hours: Of the run.
        device_hours: Of all devices.
        cost: At the price.
        sent: Seconds of a step in which something is sent between devices; None where no link is known.
        hidden: Share of these that the computation covers.
        storage: Bytes/s that are read, of files or of a set that is prepared.
        cores: That decode files, or a set that is prepared, for all devices.
        breaks: What goes wrong, the worst first; empty if nothing does.
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
        """Whether a device has the memory for one of its parts of a step."""
        return max(self.images // self.accumulation, 1) <= self.largest


def assume(work: Work, device: Device, precision: str, utilisation: float) -> Pace | None:
    """Make the speed of a device by its data sheet; None if there is none."""
    peak = device.peak(precision)
    if peak is None:
        return None
    stepped = STEPPED * work.trained / device.bandwidth if device.bandwidth else 0.0
    return Pace(image=work.flops / (peak * utilisation), step=stepped, utilisation=utilisation)


def split(job: Job, work: Work, device: Device, devices: int) -> tuple[int, int, int]:
    """Split a step.

    Returns:
        Images of a device in a step, those at a time that fit, and the parts that follow: the fewest that fit and
        divide them.
    """
    share = max(job.batch_size // devices, 1)
    how = {"devices": devices, "parallel": job.parallel}
    for parts in range(job.accumulation, share + 1):
        largest = work.largest(device.usable, accumulation=parts, **how)
        if share % parts == 0 and share // parts <= largest:
            return share, largest, parts
    return share, work.largest(device.usable, accumulation=job.accumulation, **how), job.accumulation


def look_ahead(job: Job, work: Work, device: Device, speed: Pace, devices: int) -> Outlook:
    """Work out a run on so many devices."""
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
        "the batch does not divide": job.batch_size % (devices * parts) != 0,
        "no memory for it": at_a_time > largest,
        f"fewer than {FEWEST} images at a time": at_a_time < FEWEST and device.kind == "gpu",
        "communication is longer than what hides it": waited > 0,
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
    """Count the seconds of a step in which something is sent, by the ring: each device passes on all but its share.

    DDP reduces the gradients, twice around. FSDP gathers the weights for every forward and every backward pass, and
    reduces the gradients once around. None where no link is known.
    """
    if devices == 1:
        return 0.0
    if device.link is None:
        return None
    rounds = 2 * parts + 1 if job.parallel == "fsdp" else 2
    # Between machines the ring is as many rings as devices in one, each with a network of its own.
    link = device.link if devices <= IN_A_MACHINE else min(device.link, IN_A_MACHINE * job.network)
    return rounds * (devices - 1) / devices * work.gradients / link
