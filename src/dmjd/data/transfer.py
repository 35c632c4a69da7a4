"""Copies from host memory to a device."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def transfer(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Copy a tensor to a device, without waiting where its memory may be reused at once.

    CUDA has read the memory when the call returns or, if it is pinned, keeps it until then. MPS reads it later, when it
    may already hold something else: the next batch, in memory that a worker has lent.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
