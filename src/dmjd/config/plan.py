"""Settings of `dmjd plan`: those of `dmjd pretrain`, and the hardware around the run."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from dmjd.config.common import flat, group
from dmjd.config.pretrain import PretrainRun, PretrainSettings
from dmjd.config.rules import within


@dataclass(frozen=True, kw_only=True)
class PlanRun(PretrainRun):
    """The run that is planned."""

    data: Annotated[str, Parameter(required=False)] = ""
    """Images of the run, as `dmjd pretrain` takes them; they are counted, and the sizes of some files read. If they are
    not on this machine, give --images."""
    device: str = "auto"
    """Device to plan for: h100, a100-80, rtx4090 ... as in the printed table; auto, cpu and cuda mean the device of
    this machine."""
    preset: str = "dmjd"
    """Recipe of the run. Not auto, which chooses only when it sees the images: give the config.yaml of such a run as
    --config."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PretrainSettings):
    """Settings of `dmjd plan`."""

    run: Annotated[PlanRun, flat("Run")] = field(default_factory=PlanRun)
    images: Annotated[int | None, group("Plan")] = None
    """Number of training images. Default: those of --data."""
    devices: Annotated[int, group("Plan")] = 1
    """Devices that share a step, eight to a machine."""
    utilisation: Annotated[float, group("Plan")] = 0.15
    """Share of a device's peak that is reached: an assumption, supported by published training times; --measure
    replaces it for the device of this machine."""
    price: Annotated[float | None, group("Plan")] = None
    """Price of one device per hour, in any currency."""
    image_bytes: Annotated[float | None, group("Plan")] = None
    """Mean size of a file in bytes. Default: that of some files of --data, else 110,000, as in ImageNet."""
    network: Annotated[float, group("Plan")] = 25.0
    """Bandwidth of the network between machines, in GB/s per device."""
    storage: Annotated[float, group("Plan")] = 2.0
    """Bandwidth of the storage, in GB/s; a run that needs more is marked in the table."""
    measure: Annotated[float | None, group("Plan")] = None
    """Train on noise for about this many seconds on the device of this machine, and plan with the measurements."""
    script: Annotated[Literal["slurm", "torchrun"] | None, group("Plan")] = None
    """Print the run as a script, and nothing else."""
    json: Annotated[bool, group("Plan")] = False
    """Print the plan as one line of JSON, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, 10**12, self, "images", "image_bytes")
        within(1, 65_536, self, "devices")
        within(0.001, 1, self, "utilisation")
        within(0, 1_000_000, self, "price")
        within(0.001, 1_000_000, self, "network", "storage")
        within(0, 86_400, self, "measure")
