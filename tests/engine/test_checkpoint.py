"""What ranks bring together for a checkpoint."""

import pytest
import torch
from ranks import Case, run
from torch import nn

from dmjd.engine import checkpoint
from dmjd.engine.distributed import Ranks
from dmjd.engine.optim import create_optimizer


def test_collect__a_rank_that_does_not_write_keeps_no_tensor():
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    written = checkpoint.collect(network, network, optimizer, keep=True)
    assert written.model.keys() == {"weight", "bias"}
    assert written.optimizer.keys() == {
        f"{name}:{key}" for name in written.model for key in optimizer.state[network.bias]
    }
    others = checkpoint.collect(network, network, optimizer, keep=False)
    assert (others.model, others.optimizer) == ({}, {})
    assert others.numbers == written.numbers


@pytest.mark.parametrize("rank", [0, 1])
def test_trainer__the_first_rank_alone_has_tensors_to_write(paint, tmp_path, rank):
    images = paint(tmp_path / "images", {"red": 8})
    alone = Ranks(torch.device("cpu"), rank)  # so it writes, whatever its number
    run(Case(out=str(tmp_path / "run"), data=str(images), steps=1, batch_size=2, dtype="float32"), alone)
    (written,) = checkpoint.whole_ones(tmp_path / "run" / "checkpoints")
    assert bool(checkpoint.read(written / "model")) == bool(checkpoint.read(written / "optimizer")) == (rank == 0)


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "adafactor", "adafactorbv", "muon", "lookahead_adamw"])
def test_load__a_run_goes_on_with_any_optimizer_as_if_it_had_not_stopped(name, tmp_path):
    def begin():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return network, create_optimizer(network, name=name, lr=0.1, weight_decay=0.05, betas=(0.9, 0.95))

    def go_on(network, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            (network(torch.full((1, 3), step / 3)) ** 2).sum().backward()
            optimizer.step()

    whole, optimizer = begin()
    go_on(whole, optimizer, range(1, 14))  # every sixth step is one of Lookahead's
    stopped, optimizer = begin()
    go_on(stopped, optimizer, range(1, 8))
    path = checkpoint.save(tmp_path, checkpoint.collect(stopped, stopped, optimizer), {"step": 7})
    resumed, optimizer = begin()
    checkpoint.load(path, model=resumed, trained=resumed, optimizer=optimizer)
    go_on(resumed, optimizer, range(8, 14))
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key
