"""Runs several small pre-trainings one after the other, on as many ranks as it is started with.

`[torchrun ...] ranks.py CASES.json`: a list of cases, each a dictionary of `Case`.
"""

import dataclasses
import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import dmjd
from dmjd.data.crops import RandomCrop
from dmjd.data.masked import MaskedSamples
from dmjd.data.source import open_source
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks, whole
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run
from dmjd.engine.trainer import Trainer
from dmjd.masking import seeded_masks

SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    out: str
    data: str
    backbone: str = "vit"
    target: str = "hog"
    parallel: str = "ddp"
    dtype: str = "float64"
    steps: int = 50
    batch_size: int = 8
    accumulation: int = 1
    saves: int = 1
    workers: int = 0
    clip_grad: float = 0.0
    crash_after: int | None = None  # steps
    resume: bool = False


class Crash(Exception):
    """The end of a run that is to be taken up again."""


def run(case: Case, ranks: Ranks) -> None:
    """Train, and write losses and sample ids of every rank, and the whole weights at the end."""
    torch.manual_seed(0)
    network = dmjd.build(
        "dmjd",
        "tiny",
        image_size=32,
        backbone=case.backbone,
        masked_target=case.target,
        decoder_num_heads=2,
        **SHAPE,
    ).to(getattr(torch, case.dtype))
    model = ParallelModel(network, ranks, parallel=case.parallel)
    train = open_source(case.data).train
    plan = Plan(
        steps=case.steps,
        batch_size=case.batch_size,
        lr=1e-3,
        warmup_epochs=1.0,
        accumulation=case.accumulation,
        clip_grad=case.clip_grad,
        workers=case.workers,
        log_every=1,
        evals=0,
        saves=case.saves,
    )
    optimizer = create_optimizer(network, name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    settings = {"out": case.out, "batch_size": case.batch_size, "max_bad": 0.01}
    record = Run(settings, train, ranks=ranks, held_out=0, defaults={})
    trainer = Trainer(record, model, optimizer, plan, autocast=nullcontext)
    trainer.begin(resume=case.resume)
    started = trainer.done
    ids: list[list[int]] = []

    def objective(model: ParallelModel, batch: Any) -> dict[str, torch.Tensor]:
        ids.append(batch.indices.tolist())
        losses = model(batch.images, seeded_masks(batch.seeds, (4, 4), num_views=2, mask_ratio=0.5))
        return {"loss": losses.total, "loss_masked": losses.masked, "loss_visible": losses.visible}

    def after_step(step: int) -> None:
        network.update_targets(step / case.steps)
        if step == case.crash_after:
            raise Crash

    samples = MaskedSamples(train, RandomCrop((32, 32), (0.5, 1.0), (0.75, 1.33), flip=True), 0)
    with suppress(Crash):
        trainer.fit(samples, None, objective, lambda step: {}, after_step=after_step)
    parameters = model.parameters
    shares = [each.to_local() if isinstance(each, DTensor) else each for each in parameters]
    held = sum(each.numel() for each in shares) / sum(each.numel() for each in parameters)
    (Path(case.out) / f"share-{ranks.rank}.json").write_text(json.dumps(held))
    (Path(case.out) / f"ids-{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps([started, ids]))
    weights = {name: value.contiguous() for name, value in model.whole().state_dict().items()}
    if ranks.is_main:
        save_file(weights, Path(case.out) / "weights.safetensors")


def accumulate(out: Path, ranks: Ranks) -> None:
    """Note whether the ranks agree on the gradient after the first and after the last part of a step."""
    for parallel in ("ddp", "fsdp"):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        model = ParallelModel(network, ranks, parallel=parallel)
        agreed = []
        for last in (False, True):
            with model.synchronized(last=last):
                model(torch.full((2, 4), ranks.rank + 1.0)).sum().backward()
            gradient = network[0].weight.grad
            seen = ranks.gather(None if gradient is None else whole(gradient))
            agreed.append(seen[0] is not None and torch.equal(seen[0], seen[1]))
        (out / f"accumulation-{parallel}.json").write_text(json.dumps(agreed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_ranks("cpu") as joined:
        for values in json.loads(Path(sys.argv[1]).read_text()):
            run(Case(**values), joined)
        accumulate(Path(sys.argv[1]).parent, joined)
