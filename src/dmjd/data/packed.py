"""Millions of short texts, or of numbers, in one buffer.

A list would be copied into every worker process, object by object, and an array as a whole.
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
        packer = Packer()
        for text in texts:
            packer.append(text)
        return packer.packed()

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
        start = 0
        for ends in self.ends.split(4096):
            for end in ends.tolist():
                yield self._views[0][start:end].tobytes().decode(errors="surrogateescape")
                start = end

    @cached_property
    def _views(self) -> tuple[np.ndarray, np.ndarray]:
        """The same memory as arrays, which are ten times as fast to index."""
        return self.content.numpy(), self.ends.numpy()

    def __getstate__(self) -> dict[str, Tensor]:
        """Let go of the views: a tensor on its way to a worker moves to shared memory, and its old memory is freed."""
        self.__dict__.pop("_views", None)
        return {"content": self.content, "ends": self.ends}


class Packer:
    """Packs texts that come one by one, of several columns in turn."""

    def __init__(self) -> None:
        self.content, self.ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        """Put one more behind the others."""
        self.content += text.encode(errors="surrogateescape")
        self.ends.append(len(self.content))

    def packed(self) -> PackedStrings:
        """Hand over what was packed; nothing can be appended afterwards."""
        return PackedStrings(*(torch.from_numpy(np.asarray(each)) for each in (self.content, self.ends)))


@dataclass(frozen=True, eq=False)
class PackedNumbers:
    """A numbered set of whole numbers; a tensor, because worker processes share the memory of it.

    Attributes:
        content: The numbers.
    """

    content: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: int) -> int:
        """Look one number up; raises `IndexError`."""
        return int(self._view[index])

    @cached_property
    def _view(self) -> np.ndarray:
        """The same memory as an array, which is ten times as fast to index."""
        return self.content.numpy()

    def __getstate__(self) -> dict[str, Tensor]:
        """Let go of the view, as `PackedStrings` does."""
        self.__dict__.pop("_view", None)
        return {"content": self.content}
