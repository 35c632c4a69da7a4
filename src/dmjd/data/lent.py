"""Batches of workers in shared memory that is used again.

torch takes new shared memory for every batch. The system has to find and to clear each of its pages, which takes longer
than writing to them: in a virtual machine a quarter of all the time that prepared photographs take.

A slot is shared memory of one batch and a byte more, which says whether a batch is in there. A worker sets it, and the
process that received the batch clears it with the last tensor that looks at it, however long that is kept.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor
from torch.utils.data import get_worker_info

FREE, LENT = 0, 1

_slots: list[Tensor] = []  # of this worker: as many as there ever were batches under way


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Num[Tensor, "*shape"]:
    """Find memory for a batch: in a worker a slot, elsewhere memory like any other. What is in there is arbitrary."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    slot = next((slot for slot in _slots if len(slot) == size + 1 and slot[-1] == FREE), None)
    if slot is None:
        # Crops that grow leave slots behind that no batch fits.
        _slots[:] = [slot for slot in _slots if slot[-1] == LENT or len(slot) == size + 1]
        slot = torch.empty(size + 1, dtype=torch.uint8).share_memory_()
        _slots.append(slot)
    slot[-1] = LENT
    return slot[:-1].view(dtype).view(shape)


def is_lent(batch: Tensor) -> bool:
    """Tell whether a batch begins where a slot of this worker does."""
    return any(slot.data_ptr() == batch.data_ptr() for slot in _slots)


def borrow(batch: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Take over a batch that lies in a worker's slot: the same memory, given back with its last tensor.

    Args:
        batch: As it came from the worker; not to be used any more.
    """
    slot = torch.empty(0, dtype=torch.uint8).set_(batch.untyped_storage())
    held = torch.from_numpy(np.asarray(_Loan(slot.numpy())))
    return held.view(batch.dtype).as_strided(batch.shape, batch.stride())


class _Loan:
    """A slot as NumPy takes it: arrays keep the object that their memory belongs to, and tensors keep the array."""

    def __init__(self, slot: np.ndarray):
        self.slot = slot

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.slot[:-1].__array_interface__

    def __del__(self) -> None:
        self.slot[-1] = FREE
