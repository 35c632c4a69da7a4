"""What the loop around the model costs: steps of `engine.loop` on real batches against the bare model and optimizer.

    python benchmarks/step_profile.py --size tiny --batch_size 64
    python benchmarks/step_profile.py --size base --batch_size 4

Both sides run in turns on the same images; the table gives the median over the pairs of seconds a step, and of the
share of the loop's time that is not the model's: decoding, cropping, masks, gradient norm, bookkeeping.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from dmjd.config import Crop, Model, Monitor, Pretrain, to_dict
from dmjd.data.loader import Positions, train_batches
from dmjd.data.sources import Held, Images
from dmjd.engine.loop import train
from dmjd.engine.optim import create_optimizer, warmup_cosine
from dmjd.engine.record import Record
from dmjd.factory import from_settings
from dmjd.tasks.pretrain import training_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=("tiny", "base"))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="steps a side and turn")
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()

    settings = Pretrain(
        batch_size=arguments.batch_size,
        model=Model(size=arguments.size, image_size="224", patch_size=16),
        crop=Crop(),
        monitor=Monitor(log_every=1),
    )
    pixels = torch.randint(0, 256, (256, 3, 256, 256), dtype=torch.uint8)
    names = [str(index) for index in range(len(pixels))]
    images = Images(names=names, labels=None, classes=(), root=None, in_chans=3, held=Held.pack(pixels, {}))
    model = from_settings(settings).train()
    optimizer = create_optimizer(model, name="adamw", lr=settings.lr, weight_decay=0.05, betas=(0.9, 0.95))
    total = (arguments.pairs + 1) * arguments.steps
    positions = Positions(len(images), settings.batch_size, 0, total, settings.seed)
    batches = train_batches(training_samples(settings, images), positions, workers=0, pin_memory=False)
    record = Record(Path(tempfile.mkdtemp()), to_dict(settings), images, batch_size=settings.batch_size)
    loop = train(
        model,
        iter(batches),
        optimizer,
        start=0,
        steps=total,
        accumulation=1,
        lr=warmup_cosine(settings.lr, warmup=0, steps=total),
        clip_grad=0,
        device=torch.device("cpu"),
        autocast=nullcontext,
    )
    fixed = next(iter(batches))

    def loop_step() -> None:
        record.log(next(loop))

    def bare_step() -> None:
        model(fixed.images, fixed.masked).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    pairs = []
    for turn in range(arguments.pairs + 1):
        seconds = []
        for side in (loop_step, bare_step) if turn % 2 else (bare_step, loop_step):
            began = time.perf_counter()
            for _ in range(arguments.steps):
                side()
            seconds.append((time.perf_counter() - began) / arguments.steps)
        if turn:  # the first turn warms up
            pairs.append(seconds if turn % 2 else seconds[::-1])
    shares = sorted(1 - bare / whole for whole, bare in pairs)
    whole, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"ViT {arguments.size}, 224 px, 2 views, batch {arguments.batch_size}, {torch.get_num_threads()} threads")
    print(f"| step of the loop | step of the model | share of the loop, median of {arguments.pairs} (min .. max) |")
    print("|---|---|---|")
    print(f"| {whole:.3f} s | {bare:.3f} s | {statistics.median(shares):.1%} ({shares[0]:.1%} .. {shares[-1]:.1%}) |")


if __name__ == "__main__":
    main()
