"""Where the time of a training step goes: what belongs to the model, and what the loop around it costs.

    python benchmarks/step_profile.py --size tiny --batch_size 16
    python benchmarks/step_profile.py --size base --batch_size 4 --steps 7
    python benchmarks/step_profile.py --size tiny --image_size 64 --patch_size 8 --decoder 128x2 --batch_size 64

Steps of `engine.trainer` on real batches, each of which is written down. Forward, backward and optimizer are timed
inside each step; the loop's share is all the rest of the same step: waiting for images (crop, masks, collate),
the gradient's norm, metrics.jsonl. Two separate runs, with and without the loop, would differ by more than that.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dmjd.config.pretrain import DecoderSettings, ModelSettings, MonitorSettings, PretrainRun, PretrainSettings
from dmjd.config.rules import to_dict
from dmjd.data.builtin import ArrayImages
from dmjd.data.levels import BYTES
from dmjd.data.masked import MaskedBatch
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run
from dmjd.engine.trainer import Trainer
from dmjd.factory import from_settings, masks_of
from dmjd.tasks.pretrain import training_samples

PARTS = ("forward", "backward", "optimizer", "images", "rest")


class Stopwatch:
    """Adds up the seconds of calls by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=("tiny", "base"))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--decoder", default="512x8", help="width x blocks")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=11)
    arguments = parser.parse_args()
    width, depth = map(int, arguments.decoder.split("x"))

    out = Path(tempfile.mkdtemp())
    settings = PretrainSettings(
        run=PretrainRun(out=out, batch_size=arguments.batch_size, steps=arguments.steps + 1, workers=0),
        model=ModelSettings(size=arguments.size, image_size=str(arguments.image_size), patch_size=arguments.patch_size),
        decoder=DecoderSettings(embed_dim=width, depth=depth),
        monitor=MonitorSettings(log_every=1),
    )
    side = arguments.image_size * 8 // 7
    pixels = torch.randint(0, 256, (256, 3, side, side), dtype=torch.uint8)
    images = ArrayImages(address="noise", pixels=pixels, labels=torch.zeros(len(pixels), dtype=torch.long), classes=())
    ranks = Ranks(torch.device("cpu"))
    model = from_settings(settings).train()
    optimizer = create_optimizer(model, lr=settings.lr, **settings.optim.keywords)
    sections = settings.run.plan | settings.monitor.plan | settings.optim.plan
    plan = Plan(**sections | {"steps": arguments.steps + 1, "lr": settings.lr, "warmup_epochs": 0.0})
    trainer = Trainer(
        Run(out, to_dict(settings), images, batch_size=plan.batch_size, ranks=ranks, held_out=0, defaults={}),
        ParallelModel(model, ranks),
        optimizer,
        plan,
        autocast=nullcontext,
    )
    trainer.begin(resume=False)

    watch = Stopwatch()
    model.forward = watch.timed("forward", model.forward)  # type: ignore[method-assign]
    torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    optimizer.step = watch.timed("optimizer", optimizer.step)  # type: ignore[method-assign]

    samples = training_samples(settings, images, BYTES, ranks.device)
    num_hidden = int(masks_of(settings, torch.zeros(1, dtype=torch.long))[0, 0].sum())

    def objective(model: ParallelModel, batch: MaskedBatch) -> dict[str, torch.Tensor]:
        losses = model(samples.pixels(batch, ranks.device), masks_of(settings, batch.seeds), num_hidden)
        return {"loss": losses.total, "loss_masked": losses.masked, "loss_visible": losses.visible}

    steps_of = trainer.steps(samples, None, objective)
    shares: dict[str, list[float]] = {name: [] for name in (*PARTS, "loop")}
    steps, waited = [], 0.0
    for number in range(plan.steps):
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        began = time.perf_counter()
        step = next(steps_of)
        trainer.log(step, lambda seconds: {})
        whole = time.perf_counter() - began
        watch.seconds["images"], waited = trainer.waited - waited, trainer.waited
        if number == 0:  # the first step warms up
            continue
        watch.seconds["rest"] = whole - sum(watch.seconds.values())
        steps.append(whole)
        for name, seconds in watch.seconds.items():
            shares[name].append(seconds / whole)
        shares["loop"].append((watch.seconds["images"] + watch.seconds["rest"]) / whole)

    middle = {name: f"{statistics.median(values):.1%}" for name, values in shares.items()}
    print(
        f"ViT {arguments.size}, {arguments.image_size} px, patch {arguments.patch_size}, decoder {arguments.decoder}, "
        f"2 views, batch {arguments.batch_size}, {torch.get_num_threads()} threads, "
        f"median (min .. max) of {len(steps)} steps"
    )
    print("| step | forward | backward | optimizer | images and masks | norm, record | the loop's share |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {statistics.median(steps):.3f} s | {' | '.join(middle[name] for name in PARTS)} "
        f"| {middle['loop']} ({min(shares['loop']):.1%} .. {max(shares['loop']):.1%}) |"
    )


if __name__ == "__main__":
    main()
