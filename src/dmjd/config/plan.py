"""Settings of `dmjd plan`: those of `dmjd pretrain`, and what is around the run."""

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
    """Images of the run, as `dmjd pretrain` takes them; they are counted, and some files weighed. They may be
    elsewhere: then give --images."""
    device: str = "auto"
    """Device that is planned for: h100, a100-80, rtx4090 ... as in the table that is printed; auto, cpu and cuda mean
    that of this machine."""
    preset: str = "dmjd"
    """Recipe of the run; auto has none before it looks at images: give the config.yaml of such a run by --config."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PretrainSettings):
    """Settings of `dmjd plan`."""

    run: Annotated[PlanRun, flat("Run")] = field(default_factory=PlanRun)
    images: Annotated[int | None, group("Plan")] = None
    """Images to train on. Default: those of --data."""
    devices: Annotated[int, group("Plan")] = 1
    """Devices that share a step; eight of them are a machine."""
    utilisation: Annotated[float, group("Plan")] = 0.15
    """Share of a device's peak that is reached; an assumption, which published hours support; for the device of this
    machine replaced by --measure."""
    price: Annotated[float | None, group("Plan")] = None
    """Price of a device for an hour, in any currency."""
    image_bytes: Annotated[float | None, group("Plan")] = None
    """Mean size of a file. Default: that of some files of --data, else 110,000, as in ImageNet."""
    network: Annotated[float, group("Plan")] = 25.0
    """What the network between machines has for each device, in GB/s."""
    storage: Annotated[float, group("Plan")] = 2.0
    """What the storage delivers, in GB/s; more is marked in the table."""
    measure: Annotated[float | None, group("Plan")] = None
    """Train on noise for about so many seconds on the device of this machine, and plan with what was measured."""
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
