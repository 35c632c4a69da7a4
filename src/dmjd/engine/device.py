"""Where to compute, and in which precision."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version

import torch

from dmjd.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Turn `auto` into the best device there is, or check the one that is named.

    Raises:
        ConfigError: If the device is unknown or absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no such device ({reason}); --device {name}; choose cpu or leave it at auto") from None


def choose_precision(name: str, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Make the context of a forward pass: float32, or bf16 matrix products (`auto`: on GPUs that have them)."""
    bf16 = name == "bf16" or (
        name == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)


def environment(device: torch.device, precision: str) -> dict[str, str | int]:
    """Describe what computes: versions, device, precision of matrix products, and the cores of the host.

    Args:
        device: Where.
        precision: As `choose_precision` takes it.
    """
    with choose_precision(precision, device)():
        bf16 = torch.is_autocast_enabled(device.type)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "dmjd")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": "bf16" if bf16 else "fp32",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
    }


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn running out of memory into a line that says what to do about it.

    Raises:
        ConfigError: If the device, or the allocator of the CPU, has no memory left.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in message:
            raise
        raise ConfigError(f"out of memory ({message[:120]}); on the device; {remedy}") from None
