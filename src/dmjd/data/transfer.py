"""From the memory of the host to that of a device."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def transfer(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Copy a tensor to a device, without waiting for that where the memory may be used again at once.

    CUDA has read memory when the call returns, or, if it is pinned, keeps it until then. MPS reads it later, whatever
    is there by then: perhaps the next batch, in memory that a worker has lent.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
