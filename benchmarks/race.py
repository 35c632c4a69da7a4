"""Time training steps against plain forms, by name; each adds a row to docs/results/bench/NAME.json and its table.

    python benchmarks/race.py hybrid --size base --batch-size 2 --precision bf16
    python benchmarks/race.py mae --against transformers
    python benchmarks/race.py share --model hybrid --form plain
    python benchmarks/race.py all

Both sides of a pair run in turns on the same images, masks and weights, and are only timed if their losses agree. Times
are those of forward and backward pass, as wall-clock and CPU time: on a busy machine only the latter is meaningful, and
only with one thread. A ratio is the other side's seconds over ours. `--help` of a race lists its settings.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import cyclopts
import numpy as np
import psutil
import torch
from PIL import Image
from plain.hybrid import PlainHybrid, plain_cells
from plain.mae import LightlyMAE, TransformersMAE
from timing import RESULTS, Seconds, agree, alternate, cells_of, spread, store, summary, timed, written
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dmjd
from dmjd.engine.optim import create_optimizer
from dmjd.masking import TokenIds, block_masks, token_ids
from dmjd.method import DMJD, Losses
from dmjd.targets.hog import hog_cells

TOY = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TOY |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
FOUR = {"num_views": 4, "mask_ratio": 0.75, "block": 1}  # every token is visible once
# Models by name: a preset and changed settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {}),
    "vit": ("dm", {}),
    "vit-4": ("dm", FOUR),
    "hybrid": ("dmjd", {}),
    "hybrid-4": ("fastconvmae", {}),
}
MASKS = {
    "mae": {"num_views": 1, "mask_ratio": 0.75, "predict_ratio": 0.75, "block": 1},
    "vit": {"num_views": 2, "mask_ratio": 0.6, "block": 2},
    "vit-4": FOUR,
    "hybrid": {"num_views": 2, "mask_ratio": 0.6, "block": 2},
    "hybrid-4": FOUR,
}
Model = Literal["mae", "vit", "vit-4", "hybrid", "hybrid-4"]
Size = Literal["toy", "tiny", "small", "base", "large"]
Step = Callable[[], Losses]

# Categories of a step's time, by a part of an operator's name; the first match counts.
KINDS = {
    "attention": ("attention",),
    "convolutions": ("convolution", "conv2d"),
    "products": ("mm", "matmul", "linear"),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "copies": ("copy", "clone", "cat", "index", "gather", "scatter", "fill", "zero"),
    "sums": ("sum", "add"),
}

app = cyclopts.App(help=__doc__, help_format="plaintext")


@cyclopts.Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class How:
    """How to measure."""

    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    pairs: int = 7
    out: Path = RESULTS

    def autocast(self) -> AbstractContextManager[None]:
        """Create the context manager of a forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def settings(self, **others: Any) -> dict[str, Any]:
        """Return all settings."""
        return {"precision": self.precision, "threads": self.threads, "pairs": self.pairs, **others}


@dataclass(frozen=True)
class Case:
    """A case to time: a model and its batch."""

    model: DMJD
    images: Tensor
    masked: Tensor

    @classmethod
    def of(cls, name: str, size: str, batch_size: int, threads: int) -> "Case":
        """Build a model of a size, untrained, and a batch of noise; let torch have so many threads."""
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        preset, settings = MODELS[name]
        toy = size == "toy"
        model = dmjd.build(preset, "tiny" if toy else size, **(TOY if toy else {}), **settings)
        side, grid = (32, (4, 4)) if toy else (224, (14, 14))
        images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
        return cls(model, images, block_masks(batch_size, grid, **MASKS[name]))

    @property
    def tokens(self) -> TokenIds:
        """Number the tokens of all views."""
        return token_ids(self.masked)

    def step(self, form: nn.Module, how: How) -> Losses:
        """Compute losses and gradients."""
        form.zero_grad(set_to_none=True)
        with how.autocast():
            losses = form(self.images, self.tokens)
        losses.total.backward()
        return losses


def race(ours: Step, other: Step, how: How, *, sides: tuple[str, str]) -> dict[str, Any]:
    """Time two sides whose losses agree; returns all pairs, their summary and their table cells."""
    agree(ours(), other(), how.precision)
    pairs = alternate(lambda: timed(ours), lambda: timed(other), how.pairs)
    return {"sides": sides, "pairs": pairs, **summary(pairs), "cells": cells_of(pairs, sides)}


@app.command
def hybrid(*, size: Size = "base", batch_size: int = 2, how: How = How()) -> None:
    """Race the hybrid on visible rows against the released program's formulation: aim 1.6."""
    case = Case.of("hybrid", size, batch_size, how.threads)
    plain = PlainHybrid(case.model)
    found = race(partial(case.step, case.model, how), partial(case.step, plain, how), how, sides=("dmjd", "plain"))
    row = f"{size}, batch {batch_size}, {how.precision}, threads {how.threads}"
    store("hybrid", row, how.settings(size=size, batch_size=batch_size, aim=1.6) | found, how.out)


@app.command
def mae(
    *,
    against: Literal["transformers", "lightly"] = "transformers",
    size: Size = "base",
    batch_size: int = 4,
    how: How = How(),
) -> None:
    """Race our MAE against that of transformers, or of lightly, which must be importable: aim 1.1."""
    case = Case.of("mae", size, batch_size, how.threads)
    if against == "lightly":
        other: nn.Module = LightlyMAE(case.model)
    else:
        other = TransformersMAE(case.model)
        other.copy_weights(case.model)
    found = race(partial(case.step, case.model, how), partial(case.step, other, how), how, sides=("dmjd", "other"))
    row = f"{against}, {size}, batch {batch_size}, {how.precision}, threads {how.threads}"
    store("mae", row, how.settings(size=size, batch_size=batch_size, aim=1.1) | found, how.out)


@app.command
def views(
    *, model: Literal["vit-4", "hybrid-4"] = "vit-4", size: Size = "small", batch_size: int = 4, how: How = How()
) -> None:
    """Race four complementary views in one step against four steps of one view of the same images: aim 1.3."""
    case = Case.of(model, size, batch_size, how.threads)
    single = [Case(case.model, case.images, view) for view in case.masked.split(1, dim=1)]

    def apart() -> Losses:
        steps = [each.step(case.model, how) for each in single]
        return Losses(*(torch.stack(parts).mean() for parts in zip(*steps, strict=True)))

    found = race(partial(case.step, case.model, how), apart, how, sides=("at once", "one by one"))
    row = f"{model}, {size}, batch {batch_size}, {how.precision}, threads {how.threads}"
    store("views", row, how.settings(model=model, size=size, batch_size=batch_size, aim=1.3) | found, how.out)


@app.command
def compiled(*, model: Model = "vit", size: Size = "small", batch_size: int = 4, how: How = How()) -> None:
    """Race compiled steps (torch.compile) against the same steps in eager mode: aim 1.15."""
    case = Case.of(model, size, batch_size, how.threads)
    fast = torch.compile(case.model)
    seconds = timed(partial(case.step, fast, how))
    found = race(partial(case.step, fast, how), partial(case.step, case.model, how), how, sides=("compiled", "eager"))
    found["cells"]["first step, s"] = f"{seconds.wall:.0f}"
    row = f"{model}, {size}, batch {batch_size}, {how.precision}, threads {how.threads}"
    settings = how.settings(model=model, size=size, batch_size=batch_size, aim=1.15, first_step=seconds)
    store("compiled", row, settings | found, how.out)


@app.command
def hog(*, batch_size: int = 64, image_size: int = 224, how: How = How()) -> None:
    """Race HOG cells against whole-batch operators: aims 10 times as fast, a tenth of the memory."""
    torch.set_num_threads(how.threads)
    images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    torch.testing.assert_close(hog_cells(images), plain_cells(images))
    pairs = alternate(lambda: timed(lambda: hog_cells(images)), lambda: timed(lambda: plain_cells(images)), how.pairs)
    memory = [peak_memory(cells, images) for cells in (hog_cells, plain_cells)]
    cells = cells_of(pairs, ("dmjd", "plain"))
    cells |= {"memory, times the images in float32": " against ".join(f"{each:.1f}" for each in memory)}
    settings = how.settings(batch_size=batch_size, image_size=image_size, aim=10, memory=memory)
    found = {"sides": ("dmjd", "plain"), "pairs": pairs, **summary(pairs), "cells": cells}
    store("hog", f"{batch_size} images of {image_size} px, threads {how.threads}", settings | found, how.out)


def peak_memory(function: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Measure the peak memory of torch's allocator without the images, relative to the images' size in float32."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(images)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / (4 * images.numel())


@app.command
def share(
    *,
    model: Model = "hybrid",
    size: Size = "base",
    batch_size: int = 2,
    form: Literal["dmjd", "plain", "transformers"] = "dmjd",
    how: How = How(),
) -> None:
    """Break down the CPU time of a step by operators; aim: 88 % are matrix products in float32, 75 % in bf16.

    Attention, which torch fuses, and convolutions are products, too, and have columns of their own.
    """
    case = Case.of(model, size, batch_size, how.threads)
    forms = {"dmjd": lambda: case.model, "plain": lambda: PlainHybrid(case.model)}
    network = (forms | {"transformers": lambda: TransformersMAE(case.model)})[form]()
    for _ in range(2):  # then memory for gradients is allocated
        case.step(network, how)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        case.step(network, how)
    events = [(each.key, each.self_cpu_time_total, each.count) for each in profiler.key_averages()]
    whole = sum(microseconds for _, microseconds, _ in events)
    shares = dict.fromkeys([*KINDS, "rest"], 0.0)
    for name, microseconds, _ in events:
        shares[kind_of(name)] += microseconds / whole
    top = sorted(((name, round(time / whole, 4), calls) for name, time, calls in events), key=lambda each: -each[1])
    parts = {"all products": sum(shares[kind] for kind in ("products", "attention", "convolutions")), **shares}
    cells = {kind: f"{part:.1%}" for kind, part in parts.items()}
    row = f"{model}, {form}, {size}, batch {batch_size}, {how.precision}, threads {how.threads}"
    settings = how.settings(model=model, form=form, size=size, batch_size=batch_size)
    store("share", row, settings | {"seconds": whole / 1e6, "operators": top[:25], "cells": cells}, how.out)


def kind_of(operator: str) -> str:
    """Classify an operator by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "rest")


@app.command
def overhead(*, batch_size: int = 32, steps: int = 8, num_images: int = 10_000, how: How = How()) -> None:
    """Race `dmjd pretrain` of a tiny ViT on small images in memory against steps on data that is ready: aim 1.05.

    Two views with HOG targets; the steps alone have the optimizer, and the run no checkpoints. The ratio is of the
    run's seconds to theirs.
    """
    torch.set_num_threads(how.threads)
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 4, "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4}
    model = dmjd.build("dm", "tiny", **shape)
    optimizer = create_optimizer(model, name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    tokens = token_ids(block_masks(batch_size, (8, 8), **MASKS["vit"]))

    def bare() -> None:
        for _ in range(steps):
            with how.autocast():
                loss = model(images, tokens).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    words = "--preset dm --model.size tiny --model.image_size 32 --model.patch_size 4 --decoder.embed_dim 128"
    words += f" --decoder.depth 2 --decoder.num_heads 4 --batch_size {batch_size} --precision {how.precision}"
    words += f" --steps {2 * steps} --monitor.log_every {steps} --monitor.evals 0 --monitor.max_images 64"
    words += " --monitor.saves 0"  # a checkpoint is saved twenty times in a run, however short
    with tempfile.TemporaryDirectory() as made:
        noise = np.random.default_rng(0).integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)
        np.save(f"{made}/images.npy", noise)
        number = count()

        def run() -> Seconds:
            out = Path(made) / f"run-{next(number)}"
            first, last = observe([*words.split(), "--data", f"{made}/images.npy"], out, how.threads).losses
            return Seconds(last.wall - first.wall, last.cpu - first.cpu)

        pairs = alternate(lambda: timed(bare), run, how.pairs)
    cells = cells_of(pairs, ("steps alone", "dmjd pretrain"))
    row = f"ViT tiny, 32 px, batch {batch_size}, {steps} steps, {how.precision}, threads {how.threads}"
    found = {"sides": ("steps alone", "dmjd pretrain"), "pairs": pairs, **summary(pairs), "cells": cells}
    settings = how.settings(batch_size=batch_size, steps=steps, num_images=num_images, aim=1.05)
    store("overhead", row, settings | found, how.out)


class Seen(NamedTuple):
    """A run as observed from outside, all its processes together."""

    losses: list[Seconds]  # time used at each logged loss
    memory: int  # peak memory in bytes


def observe(words: list[str], out: Path, threads: int) -> Seen:
    """Observe `dmjd pretrain` while it runs on the CPU."""
    command = [sys.executable, "-m", "dmjd", "pretrain", *words, "--out", str(out), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    losses: list[Seconds] = []
    began, memory, metrics = time.perf_counter(), 0, out / "metrics.jsonl"
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for look in count():
        if process.poll() is not None:
            break
        logged = metrics.read_text().count('"loss"') if metrics.exists() else 0
        if logged > len(losses):
            losses += [Seconds(time.perf_counter() - began, cpu_seconds(process))] * (logged - len(losses))
        if look % 25 == 0:  # every half second, since counting pages takes time
            memory = max(memory, memory_of(process))
        time.sleep(0.02)
    if process.returncode or not losses:
        raise SystemExit(f"error: dmjd pretrain failed: {process.stderr.read()[-300:]}")
    return Seen(losses, memory)


def family(process: psutil.Process) -> list[psutil.Process]:
    """List a process and its children."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def cpu_seconds(process: psutil.Process) -> float:
    """Sum the CPU seconds of a process and its children."""
    total = 0.0
    for each in family(process):
        with suppress(psutil.Error):  # it has ended; its parent now includes its time
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_of(process: psutil.Process) -> int:
    """Sum the memory of a process and its children, counting shared memory once."""
    total = 0
    for each in family(process):
        with suppress(psutil.Error):
            total += each.memory_full_info().pss
    return total


@app.command
def start(
    *, num_images: Annotated[list[int] | None, cyclopts.Parameter(consume_multiple=True)] = None, how: How = How()
) -> None:
    """Time a run up to its first step: from a folder of 5,000 small images (aim 8 s), from a list of 200,000 (20 s)."""
    for number in num_images or [5_000, 200_000]:
        with tempfile.TemporaryDirectory() as made:
            data = write_images(Path(made) / "images", number)
            if number > 5_000:
                listed = Path(made) / "images.txt"
                listed.write_text("".join(f"{path}\n" for path in sorted(data.glob("*/*.jpg"))))
                data = listed
            words = ["--preset", "quick", "--data", str(data), "--steps", "2", "--monitor.log_every", "1"]
            words += ["--monitor.evals", "0", "--monitor.max_images", "64", "--precision", how.precision]
            seen = [observe(words, Path(made) / f"run-{turn}", how.threads) for turn in range(how.pairs)]
        times = [each.losses[0] for each in seen]
        wall, cpu = (spread(column) for column in zip(*times, strict=True))
        memory = max(each.memory for each in seen)
        cells = {"first step after, s": written(wall, 1), "CPU s": written(cpu, 1), "GB": f"{memory / 1e9:.2f}"}
        cells["aim, s"] = "8" if number <= 5_000 else "20"
        row = f"{data.suffix.strip('.') or 'folder'} of {number:,} JPEGs of 32 px, threads {how.threads}"
        store("start", row, how.settings(num_images=number, times=times, memory=memory, cells=cells), how.out)


def write_images(folder: Path, number: int) -> Path:
    """Write JPEGs of noise, a thousand per folder; beyond 5,000 they are links to the first ones."""
    generator, paths = np.random.default_rng(0), []
    for place in range(number):
        path = folder / f"{place // 1000:04d}" / f"{place:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if place < 5_000:
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            paths.append(path)
        else:
            os.link(paths[place % len(paths)], path)
    return folder


@app.command(name="all")
def every(*, out: Path = RESULTS) -> None:
    """Run the races whose rows are stored, except the one against lightly."""
    fp32, bf16 = How(out=out), How(precision="bf16", out=out)
    for batch_size in (16, 64):
        hog(batch_size=batch_size, how=fp32)
    start(how=How(pairs=3, out=out))
    overhead(how=fp32)
    for how in (fp32, bf16):
        hybrid(how=how)
        mae(how=how)
        views(model="vit-4", how=how)
        for form in ("dmjd", "plain"):
            share(model="hybrid", form=form, how=how)
        for form in ("dmjd", "transformers"):
            share(model="mae", batch_size=4, form=form, how=how)
    views(model="hybrid-4", batch_size=2, how=bf16)
    compiled(how=bf16)


if __name__ == "__main__":
    app()
