"""Millions of short texts in one buffer.

A list of strings would be copied into every worker process, object by object.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedStrings:
    """A numbered set of texts; tensors, because worker processes share the memory of these.

    Attributes:
        content: The texts one after the other, in UTF-8; bytes of file names that are no Unicode stay as they are.
        ends: Where they end.
    """

    content: UInt8[Tensor, " bytes"]
    ends: Int[Tensor, " n"]

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "PackedStrings":
        """Pack texts, none of them or many, as they come."""
        content, ends = bytearray(), array("q")
        for text in texts:
            content += text.encode(errors="surrogateescape")
            ends.append(len(content))
        return cls(
            *(
                torch.frombuffer(each, dtype=kind) if each else torch.empty(0, dtype=kind)
                for each, kind in ((content, torch.uint8), (ends, torch.long))
            )
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """Look one text up.

        Raises:
            IndexError: If there is none of this number.
        """
        if not 0 <= index < len(self.ends):
            raise IndexError(f"no text {index} among {len(self.ends)}")
        content, ends = self._views
        return content[ends[index - 1] if index else 0 : ends[index]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def _views(self) -> tuple[np.ndarray, np.ndarray]:
        """The same memory as arrays, which are ten times as fast to index."""
        return self.content.numpy(), self.ends.numpy()

    def __getstate__(self) -> dict[str, Tensor]:
        """Let go of the views: a tensor on its way to a worker moves to shared memory, and its old memory is freed."""
        self.__dict__.pop("_views", None)
        return {"content": self.content, "ends": self.ends}
