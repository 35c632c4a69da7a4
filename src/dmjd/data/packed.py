"""Millions of short strings, or of numbers, in one buffer.

Worker processes would each get a copy of a list, object by object, or of an array; they share the memory of tensors.
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
    """A sequence of strings in two tensors, whose memory worker processes share.

    Attributes:
        content: The strings one after the other, in UTF-8; bytes of file names that are not Unicode stay as they are.
        ends: The end of each string.
    """

    content: UInt8[Tensor, " bytes"]
    ends: Int[Tensor, " n"]

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "PackedStrings":
        """Pack strings as they come; there may be none."""
        packer = Packer()
        for text in texts:
            packer.append(text)
        return packer.packed()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """Look up a string.

        Raises:
            IndexError: If the index is out of range.
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
        """The same memory as NumPy arrays, which are ten times as fast to index."""
        return self.content.numpy(), self.ends.numpy()

    def __getstate__(self) -> dict[str, Tensor]:
        """Drop the views: pickling for a worker moves a tensor to shared memory and frees its old memory."""
        self.__dict__.pop("_views", None)
        return {"content": self.content, "ends": self.ends}


class Packer:
    """Packs strings one by one, so that several columns can be packed in turn."""

    def __init__(self) -> None:
        self.content, self.ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        """Append a string."""
        self.content += text.encode(errors="surrogateescape")
        self.ends.append(len(self.content))

    def packed(self) -> PackedStrings:
        """Return the packed strings; nothing can be appended afterwards."""
        return PackedStrings(*(torch.from_numpy(np.asarray(each)) for each in (self.content, self.ends)))


@dataclass(frozen=True, eq=False)
class PackedNumbers:
    """A sequence of integers in a tensor, whose memory worker processes share.

    Attributes:
        content: The numbers.
    """

    content: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: int) -> int:
        """Look up a number; raises `IndexError`."""
        return int(self._view[index])

    @cached_property
    def _view(self) -> np.ndarray:
        """The same memory as a NumPy array, which is ten times as fast to index."""
        return self.content.numpy()

    def __getstate__(self) -> dict[str, Tensor]:
        """Drop the view, as `PackedStrings` does."""
        self.__dict__.pop("_view", None)
        return {"content": self.content}
