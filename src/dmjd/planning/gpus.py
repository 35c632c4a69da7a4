"""Devices: GPUs by their data sheets, and the device of this machine."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import torch
import yaml

from dmjd.engine.device import choose_device
from dmjd.errors import ConfigError

SHEETS = Path(__file__).parent / "gpus.yaml"
GIB = 2**30
# Share of a device's memory that a plan leaves free. On a GPU: for error correction, driver, cuBLAS, fragmentation.
SPARE = {"gpu": 0.15, "cpu": 0.5}
LIMITS = Path("/sys/fs/cgroup")  # control group of a container; its memory limit has a file in versions 2 and 1
SIDE, REPEATS = 1024, 4  # of the matrix product that a CPU is timed with


@dataclass(frozen=True, kw_only=True)
class Device:
    """Properties of a device that a plan depends on.

    Attributes:
        name: Its name, as for `--device`.
        memory: Its memory in bytes.
        bf16: Peak of dense products in bf16, in FLOP/s; None without units for it, or if it is not known.
        fp32: The same in float32; None if it is not known.
        bandwidth: Memory bandwidth in bytes/s; None if it is not known.
        link: Bandwidth to other devices of the machine, in one direction, in bytes/s; None if it is not known.
        source: Source of these numbers.
        kind: `gpu` or `cpu`.
    """

    name: str
    memory: float
    bf16: float | None = None
    fp32: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    source: str = ""
    kind: str = "gpu"

    @property
    def usable(self) -> float:
        """Bytes of its memory that a plan may fill."""
        return self.memory * (1 - SPARE[self.kind])

    @property
    def has_bf16(self) -> bool:
        """Whether it has units for bf16; assumed of a GPU that is not listed."""
        return self.bf16 is not None or self.fp32 is None

    def peak(self, precision: str) -> float | None:
        """Return the FLOP/s of dense products; without units for bf16 they are no faster than in float32."""
        return (self.bf16 or self.fp32) if precision == "bf16" else self.fp32


@cache
def listed() -> dict[str, Device]:
    """Read the listed GPUs, by name."""
    return {name: _of_sheet(name, sheet) for name, sheet in _sheets().items()}


def find_device(name: str) -> Device:
    """Find a device: a listed one, or for `auto`, `cuda` or `cpu` that of this machine.

    Raises:
        ConfigError: If there is no such device.
    """
    if name.lower() in listed():
        return listed()[name.lower()]
    if name == "auto" or name.partition(":")[0] in ("cpu", "cuda"):
        found = choose_device(name)
        return _this_gpu(found) if found.type == "cuda" else _this_cpu()
    known = [*listed(), "cpu"]
    begun = [each for each in known if each.startswith(name.lower())]
    nearest = " or ".join(begun or get_close_matches(name.lower(), known, n=1, cutoff=0.4))
    raise ConfigError(
        f"no data sheet of such a device; --device {name}; "
        + (f"did you mean {nearest}?" if nearest else f"choose one of {', '.join(known)}")
    )


def _sheets() -> dict[str, dict[str, float | str]]:
    sheets: dict[str, dict[str, float | str]] = yaml.safe_load(SHEETS.read_text("utf-8"))
    return sheets


def _of_sheet(name: str, sheet: dict[str, float | str]) -> Device:
    scales = {"memory": GIB, "bf16": 1e12, "fp32": 1e12, "bandwidth": 1e9, "link": 1e9}
    numbers = {key: float(sheet[key]) * scale for key, scale in scales.items() if key in sheet}
    return Device(name=name, source=str(sheet["source"]), **numbers)  # type: ignore[arg-type]


def _this_gpu(device: torch.device) -> Device:
    """Find the GPU of this machine among the listed ones; of any other, only the memory is known."""
    called, memory = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    for name, sheet in _sheets().items():
        if called == sheet["torch"]:
            return replace(listed()[name], memory=memory)
    return Device(name=called, memory=memory, source="driver")


def _this_cpu() -> Device:
    """Time matrix products, since data sheets of CPUs do not say what they reach."""
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or no limit: max
            memory = min(memory, float((LIMITS / name).read_text()))
    return Device(
        name="cpu",
        memory=memory,
        bf16=_timed_product(torch.bfloat16),
        fp32=_timed_product(torch.float32),
        source="timed here",
        kind="cpu",
    )


def _timed_product(kind: torch.dtype) -> float:
    """Measure the FLOP/s of a matrix product."""
    matrix, seconds = torch.ones(SIDE, SIDE, dtype=kind), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(seconds)
