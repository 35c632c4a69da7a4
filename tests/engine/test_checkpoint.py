"""What ranks bring together for a checkpoint."""

import pytest
import torch
from ranks import Case, run
from torch import nn

from dmjd.engine import checkpoint
from dmjd.engine.distributed import Ranks


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
