"""Where to compute, and in which precision."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dmjd.errors import ConfigError, one_line

# Messages of MPS, the CPU's allocator and CUDA's libraries.
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")
WIDE = 256  # narrower networks train faster in float32 on CPUs; measured in docs/decisions.md


def choose_device(name: str) -> torch.device:
    """Choose the best available device for `auto`, or check the named one.

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


def choose_precision(
    name: str, device: torch.device, trained: nn.Module | None = None
) -> Callable[[], AbstractContextManager[None]]:
    """Make the context of a forward pass: float32, or bf16 matrix products.

    Args:
        name: `fp32`, `bf16`, or `auto`: bf16 on GPUs that have it, and for training where it is faster on the CPU.
        device: Device of the forward pass.
        trained: The network, if it is to be trained; on a CPU, `auto` is float32 without training.
    """
    if name == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif name == "auto":
        bf16 = device.type == "cpu" and trained is not None and gains_by_bf16(trained)
    else:
        bf16 = name == "bf16"
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)


def gains_by_bf16(network: nn.Module) -> bool:
    """Tell whether a CPU trains a network faster in bf16: if it has matrix units (AMX) and the network is wide.

    This is a rule, not a measurement, so that a run is the same each time. It depends on the widest matrix: in a narrow
    network, converting to bf16 and back costs more than it saves.
    """
    matrices = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    widest = max((min(matrix.shape) for matrix in matrices if matrix.requires_grad), default=0)
    return torch.cpu._is_amx_tile_supported() and widest >= WIDE


def computes_in_bf16(autocast: Callable[[], AbstractContextManager[None]], device: torch.device) -> bool:
    """Tell whether `choose_precision` chose bf16."""
    with autocast():
        return torch.is_autocast_enabled(device.type)


def float32(found: Any) -> Any:
    """Cast a network's outputs to float32: a tensor, or dictionaries, lists and tuples of tensors."""
    if isinstance(found, Tensor):
        return found.float()
    if isinstance(found, dict):
        return {name: float32(value) for name, value in found.items()}
    return type(found)(float32(each) for each in found)


class Float32Attention(TorchFunctionMode):
    """Computes attention in float32 on a CPU, where autocast would use bf16; for training.

    The backward pass of torch's CPU kernel takes two to six times as long in bf16 as in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function; attention without a backward pass, or with a mask, is left as it is."""
        options = kwargs or {}
        is_attention = func is F.scaled_dot_product_attention and len(args) == 3 and options.get("attn_mask") is None
        if not (is_attention and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return func(*args, **options)
        with torch.autocast("cpu", enabled=False):
            return func(*(tensor.float() for tensor in args), **options).to(args[2].dtype)


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Make torch use deterministic algorithms only, if asked to.

    By default, the backward passes of attention and of indexing add in arbitrary order on a GPU.

    Raises:
        ConfigError: If torch has no deterministic algorithm for an operation.
    """
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(True)  # with warn_only, attention would stay as it is
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise ConfigError(f"{str(error).partition(',')[0]}; --deterministic; leave it out") from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def environment(device: torch.device, autocast: Callable[[], AbstractContextManager[None]]) -> dict[str, str | int]:
    """Describe software and hardware: versions, device, precision of matrix products, and the cores of the host.

    Args:
        device: Device that computes.
        autocast: Context of a forward pass.
    """
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "dmjd")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": "bf16" if computes_in_bf16(autocast, device) else "fp32",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
    }


def is_memory_error(error: Exception) -> bool:
    """Tell whether a GPU or the host is out of memory; of most allocators only the message says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(NO_MEMORY.search(str(error)))


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error into a line that says what to do about it.

    Raises:
        ConfigError: If the device or the host runs out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        message = one_line(error, 120) or "none is left"
        raise ConfigError(f"out of memory ({message}); on the device; {remedy}") from None
