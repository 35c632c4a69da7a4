"""What two ranks come to, computed in one process, one rank after the other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dmjd.engine.distributed import Ranks


@dataclass(frozen=True)
class OneOfTwo(Ranks):
    """A rank that keeps what it tells the other, and hears what that has told before."""

    told: list[Any] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)

    def agree(self, *flags: bool) -> list[bool]:
        return [*flags]

    def gather(self, item: Any) -> list[Any]:
        self.told.append(item)
        return [item, self.heard.pop(0) if self.heard else item]


def in_two(work: Callable[[Ranks], Any]) -> Any:
    """Let the second rank of two work, then the first, and return what that has."""
    other = OneOfTwo(torch.device("cpu"), 1, 2)
    work(other)
    return work(OneOfTwo(torch.device("cpu"), 0, 2, heard=other.told))
