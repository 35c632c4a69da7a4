"""Which precision `auto` takes, and what is computed in it."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from dmjd.engine.device import WIDE, Float32Attention, choose_precision, deterministic, environment, memory_errors
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.engine.loop import Plan, train
from dmjd.errors import ConfigError

CPU = torch.device("cpu")
ONE = Ranks(CPU)
FROZEN = nn.Linear(2 * WIDE, 2 * WIDE).requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "network", "units", "precision"),
    [
        ("auto", nn.Sequential(nn.Linear(WIDE, WIDE)), True, "bf16"),
        ("auto", nn.Sequential(nn.Linear(WIDE, WIDE)), False, "fp32"),
        ("auto", nn.Sequential(nn.Linear(WIDE - 1, 4 * WIDE)), True, "fp32"),
        ("auto", nn.Sequential(nn.Linear(8, 8), FROZEN), True, "fp32"),
        ("auto", None, True, "fp32"),
        ("fp32", nn.Sequential(nn.Linear(WIDE, WIDE)), True, "fp32"),
        ("bf16", nn.Sequential(nn.Linear(8, 8)), False, "bf16"),
    ],
    ids=["wide", "no units", "narrow", "wide teacher", "not trained", "fp32", "bf16"],
)
def test_auto__is_bf16_for_wide_networks_in_training_on_cpus_with_units_for_it(
    monkeypatch, name, network, units, precision
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    assert environment(CPU, choose_precision(name, CPU, network))["precision"] == precision


def test_float32_attention__is_exact_under_autocast_and_changes_nothing_else():
    query, key, value = (torch.randn(2, 2, 7, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(each.bfloat16().float() for each in (query, key, value)))
    small = [each.bfloat16() for each in (query, key, value)]
    with Float32Attention():
        with torch.autocast("cpu", torch.bfloat16):
            found, product = F.scaled_dot_product_attention(*small), query @ key.mT
        plain = F.scaled_dot_product_attention(query, key, value)
    assert found.dtype == product.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(plain, F.scaled_dot_product_attention(query, key, value))


def test_train__in_bf16_attention_is_float32_in_the_backward_pass_of_checkpointed_blocks_too():
    def trained(checkpointing):
        torch.manual_seed(0)
        network = nn.Sequential(OrderedDict(blocks=nn.Sequential(Block(16, 2))))
        model = ParallelModel(network, ONE, checkpointing=checkpointing)
        images = torch.randn(3, 5, 16)
        (step,) = train(
            model,
            torch.optim.SGD(network.parameters(), lr=0.1),
            iter([SimpleNamespace(skipped={})]),
            lambda model, batch: {"loss": model(images).square().mean()},
            Plan(steps=1, batch_size=3, lr=0.1),
            start=0,
            lr=lambda step: 0.1,
            autocast=choose_precision("bf16", CPU),
        )
        return step.losses["loss"], [*network.parameters()]

    (loss, weights), (again, same) = trained(False), trained(True)
    assert loss == again
    assert all(map(torch.equal, weights, same))


@pytest.mark.parametrize("asked", [True, False])
def test_train__has_deterministic_algorithms_in_force_if_asked_for_and_not_after(asked):
    network, seen = nn.Linear(2, 1), []

    def objective(model, batch):
        loss = model(torch.ones(1, 2)).sum()
        loss.register_hook(lambda gradient: seen.append(torch.are_deterministic_algorithms_enabled()))
        return {"loss": loss}

    steps = train(
        ParallelModel(network, ONE),
        torch.optim.SGD(network.parameters(), lr=0.1),
        iter([SimpleNamespace(skipped={})]),
        objective,
        Plan(steps=1, batch_size=1, lr=0.1, deterministic=asked),
        start=0,
        lr=lambda step: 0.1,
        autocast=choose_precision("fp32", CPU),
    )
    assert len([*steps]) == 1
    assert seen == [asked]  # in the backward pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic__what_cannot_be_so_is_named_in_a_line():
    said = r"^put_ does not have a deterministic implementation; --deterministic"
    with pytest.raises(ConfigError, match=said), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="a bug"), deterministic(True):
        raise RuntimeError("a bug")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GiB, max allowed: 9 GiB)."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),  # Windows
        MemoryError(),
    ],
    ids=["cuda", "mps", "cublas", "windows", "python"],
)
def test_memory_errors__know_the_words_of_every_allocator(error):
    with (
        pytest.raises(ConfigError, match=r"^out of memory \(.+\); on the device; take less$"),
        memory_errors("take less"),
    ):
        raise error


def test_memory_errors__numpy_s_are_among_them():
    with pytest.raises(ConfigError, match=r"out of memory \(Unable to allocate"), memory_errors("take less"):
        np.empty(1 << 60, np.uint8)
