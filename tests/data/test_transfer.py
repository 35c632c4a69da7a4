"""Only where a device reads memory in time is a copy not waited for."""

import ast
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import dmjd
from dmjd.data.transfer import transfer

SOURCE = Path(dmjd.__file__).parent


class Copies(TorchFunctionMode):
    """Notes where tensors are asked to go, and leaves them where they are."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.to:
            return func(*args, **(kwargs or {}))
        self.asked.append((args[1].type, kwargs["non_blocking"]))
        return args[0]


@pytest.mark.parametrize(("device", "asynchronous"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_transfer__waits_for_copies_to_anything_but_cuda(device, asynchronous):
    with Copies() as copies:
        transfer(torch.ones(2), torch.device(device))
    assert copies.asked == [(device, asynchronous)]


def test_source__copies_without_waiting_in_one_place():
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "non_blocking"
    }
    assert found == {"data/transfer.py"}
