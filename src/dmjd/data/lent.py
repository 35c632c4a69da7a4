"""Batches of workers in shared memory that is reused.

torch allocates new shared memory for every batch. The system has to allocate and clear each of its pages, which takes
longer than writing to them: in a virtual machine, a quarter of the whole time to load prepared photographs.

A slot is the shared memory of one batch, and a byte that says whether it is in use. A worker sets that byte, and the
process that received the batch clears it when the last tensor that views the memory is freed.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor
from torch.utils.data import get_worker_info

FREE, LENT = 0, 1

_slots: list[Tensor] = []  # of this worker: as many as the most batches ever in flight


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Num[Tensor, "*shape"]:
    """Get uninitialised memory for a batch: a slot in a worker, ordinary memory elsewhere."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    slot = next((slot for slot in _slots if len(slot) == size + 1 and slot[-1] == FREE), None)
    if slot is None:
        # When crops grow, the old slots fit no batch any more.
        _slots[:] = [slot for slot in _slots if slot[-1] == LENT or len(slot) == size + 1]
        slot = torch.empty(size + 1, dtype=torch.uint8).share_memory_()
        _slots.append(slot)
    slot[-1] = LENT
    return slot[:-1].view(dtype).view(shape)


def is_lent(batch: Tensor) -> bool:
    """Tell whether a batch lies in a slot of this worker."""
    return any(slot.data_ptr() == batch.data_ptr() for slot in _slots)


def borrow(batch: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Take over a batch in a worker's slot: the same memory, returned when its last tensor is freed.

    Args:
        batch: As received from the worker; not to be used afterwards.
    """
    slot = torch.empty(0, dtype=torch.uint8).set_(batch.untyped_storage())
    held = torch.from_numpy(np.asarray(_Loan(slot.numpy())))
    return held.view(batch.dtype).as_strided(batch.shape, batch.stride())


class _Loan:
    """A slot for NumPy: an array keeps the owner of its memory alive, and a tensor keeps the array alive."""

    def __init__(self, slot: np.ndarray):
        self.slot = slot

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.slot[:-1].__array_interface__

    def __del__(self) -> None:
        self.slot[-1] = FREE
