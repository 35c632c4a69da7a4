"""Where the time of a training step goes: what belongs to the model, and what the loop around it costs.

    python benchmarks/step_profile.py --size tiny --batch_size 16
    python benchmarks/step_profile.py --size base --batch_size 4 --steps 7
    python benchmarks/step_profile.py --size tiny --image_size 64 --patch_size 8 --decoder 128x2 --batch_size 64

Steps of `engine.loop` on real batches, with a record that writes every step down. Forward, backward and optimizer are
timed inside each step; the loop's share is all the rest of the same step: waiting for images (crop, masks, collate),
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

from dmjd.config import Crop, Decoder, Model, Monitor, Pretrain, to_dict
from dmjd.data.loader import Batch, StepSampler, collate, train_batches
from dmjd.data.source import Images, PackedImages
from dmjd.engine.loop import train
from dmjd.engine.optim import create_optimizer, warmup_cosine
from dmjd.engine.run import Record
from dmjd.factory import from_settings
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

    settings = Pretrain(
        batch_size=arguments.batch_size,
        model=Model(size=arguments.size, image_size=str(arguments.image_size), patch_size=arguments.patch_size),
        decoder=Decoder(embed_dim=width, depth=depth),
        crop=Crop(),
        monitor=Monitor(log_every=1),
    )
    side = arguments.image_size * 8 // 7
    pixels = torch.randint(0, 256, (256, 3, side, side), dtype=torch.uint8)
    names = [str(index) for index in range(len(pixels))]
    images = Images(names=names, labels=None, classes=(), root=None, in_chans=3, held=PackedImages.pack(pixels, {}))
    model = from_settings(settings).train()
    optimizer = create_optimizer(model, name="adamw", lr=settings.lr, weight_decay=0.05, betas=(0.9, 0.95))
    positions = StepSampler(len(images), settings.batch_size, 0, arguments.steps + 1, settings.seed)
    samples = training_samples(settings, images)
    batches = iter(train_batches(samples, positions, collate, workers=0, pin_memory=False))
    record = Record(Path(tempfile.mkdtemp()), to_dict(settings), images, batch_size=settings.batch_size)

    watch = Stopwatch()
    model.forward = watch.timed("forward", model.forward)  # type: ignore[method-assign]
    torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    optimizer.step = watch.timed("optimizer", optimizer.step)  # type: ignore[method-assign]

    def objective(batch: Batch) -> dict[str, torch.Tensor]:
        losses = model(batch.images, batch.masked)
        return {"loss": losses.total, "loss_masked": losses.masked, "loss_visible": losses.visible}

    loop = train(
        objective,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        iter(watch.timed("images", lambda: next(batches, None)), None),
        optimizer,
        start=0,
        steps=arguments.steps + 1,
        seed=settings.seed,
        accumulation=1,
        lr=warmup_cosine(settings.lr, warmup=0, steps=arguments.steps + 1),
        clip_grad=0,
        autocast=nullcontext,
    )
    shares: dict[str, list[float]] = {name: [] for name in (*PARTS, "loop")}
    steps = []
    for number in range(arguments.steps + 1):
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        began = time.perf_counter()
        record.log(next(loop))
        whole = time.perf_counter() - began
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
