"""Speed of a training step on a GPU: ViTs and the hybrid at 224 px with one, two and four views, and plain forms.

    python benchmarks/gpu_speed.py --out speed.json
    python benchmarks/gpu_speed.py --sizes base --precisions bf16 --modes compiled --out compiled.json
    python benchmarks/gpu_speed.py --device cpu --toy --out toy.json

A step draws masks, computes losses and gradients of images that are already on the device, and updates weights with
AdamW. The plain forms are the hybrid on whole maps (`plain.hybrid`), ours with only the depthwise convolutions on maps
(`maps`), as without Triton, and, if it is installed, transformers' `ViTMAEForPreTraining`.
All models of a size are on the device together, each with the largest batch that fits, found by halving; they are then
timed by CUDA events, one round of each in turn. The file is written whenever a model is ready and after every round, so
that a failing model or the end of the time loses nothing else. Whatever would begin too late for --minutes is skipped
and named; whatever has begun is completed, such as a compilation.

A line of `results` has the median and quartiles of its rounds, in images and rows (views of an image) per second;
TFLOP/s by the counter of `dmjd plan` (matrix products, attention and convolutions, forward, backward and targets, two
per multiply-add, but not Triton kernels: the depthwise convolutions of rows, a small part) and their share of the GPU's
peak (`mfu`; `peak_tflops` is that peak); and the peak memory of a step with weights and optimizer.
With --profile, a line also has `operators`: the share of a step's device time that each torch operator takes.
fp32 is torch's default: TF32 in convolutions, not in matrix products.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from plain.hybrid import PlainHybrid
from plain.mae import TransformersMAE
from study import device_name, versions
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import dmjd
from dmjd.backbones.convvit import ConvBlock
from dmjd.config.rules import PRESETS
from dmjd.engine.optim import create_optimizer
from dmjd.masking import seeded_masks, token_ids
from dmjd.planning.work import FORMULAS

# TFLOP/s of dense matrix products from NVIDIA's data sheets, by a part of the GPU's name.
PEAKS = {
    "H200": {"bf16": 989.4, "fp32": 66.9},
    "H100 80GB HBM3": {"bf16": 989.4, "fp32": 66.9},
    "A100": {"bf16": 312.0, "fp32": 19.5},
}
FOUR = {"num_views": 4, "mask_ratio": 0.75, "block": 1}  # every token is visible once
TOY = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16}
ROUND = 0.3  # minimum seconds of a round

T = TypeVar("T")


class Case(NamedTuple):
    """A case to time: a preset with changed settings, in our form or in a plain one."""

    model: str
    preset: str
    settings: dict[str, Any]
    form: str = "dmjd"  # or "dense", "maps", "transformers"


VIT = (
    Case("vit", "mae", {}),
    Case("vit", "mae", {}, "transformers"),
    Case("vit", "maskfeat", {}),
    Case("vit", "dm", {}),
    Case("vit", "dm", FOUR),
    Case("vit", "dmjd", {}),
)
HYBRID = (
    Case("convvit", "convmae", {}),
    Case("convvit", "dmjd", {}),
    Case("convvit", "dmjd", {}, "maps"),
    Case("convvit", "dmjd", {}, "dense"),
    Case("convvit", "fastconvmae", {}),
)
CASES = {"small": VIT + HYBRID, "base": VIT + HYBRID, "large": VIT}


def masking_of(preset: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `seeded_masks` for a preset with changed settings."""
    asked = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())["masking"]
    return {name: settings.get(name, value) for name, value in asked.items()}


def create(case: Case, size: str, *, toy: bool) -> nn.Module:
    """Build the untrained model of a case, tiny if requested."""
    shape: dict[str, Any] = {**TOY, "decoder_num_heads": 2} if toy else {}
    if toy and case.preset != "maskfeat":
        shape["decoder_depth"] = 2
    model = dmjd.build(case.preset, size, backbone=case.model, **shape, **case.settings)
    if case.form == "dense":
        return PlainHybrid(model)
    if case.form == "maps":
        for block in (each for each in model.modules() if isinstance(each, ConvBlock)):
            block.register_forward_pre_hook(lambda _, given: (given[0], replace(given[1], table=None)))
    return TransformersMAE(model) if case.form == "transformers" else model


class Contender:
    """A model in training, whose steps are timed.

    Args:
        case: What it is.
        size: Of the backbone.
        images: Pixels (B, 3, H, W), uint8, on the device: batches are their first ones.
        precision: Of the forward pass, fp32 or bf16.
        toy: In a toy's shape.

    Attributes:
        views: V.
        flops: Floating-point operations of a step, an image.
    """

    def __init__(self, case: Case, size: str, images: Tensor, *, precision: str, toy: bool):
        self.images, self.device = images, images.device
        self.masking = masking_of(case.preset, case.settings)
        self.views = self.masking["num_views"]
        side = images.shape[-1] // (TOY["patch_size"] if toy else 16)
        self.grid, self.draw, self.precision = (side, side), count(), precision
        self.num_hidden = int(self.masks(torch.zeros(1, dtype=torch.long))[0, 0].sum())
        self.model = create(case, size, toy=toy).to(self.device).train()
        self.optimizer = create_optimizer(self.model, name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            self.step(1)
        self.flops = counter.get_total_flops()

    def masks(self, seeds: Tensor) -> Tensor:
        """Draw masks (B, V, L)."""
        return seeded_masks(seeds, self.grid, **self.masking)

    def step(self, batch: int) -> None:
        """Train on the first images once."""
        seeds = torch.arange(batch, device=self.device) + next(self.draw) * batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model(self.images[:batch], token_ids(self.masks(seeds), self.num_hidden)).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, batch: int, steps: int) -> float:
        """Time a number of steps, in seconds per step."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(steps):
                self.step(batch)
            return (time.perf_counter() - began) / steps
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(steps):
            self.step(batch)
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended)) / 1e3 / steps

    def operators(self, batch: int) -> dict[str, float]:
        """Profile a step: the share of device time of each operator, for shares above a hundredth."""
        with profile() as profiler:
            self.step(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        spent = {
            each.key: each.self_device_time_total if self.device.type == "cuda" else each.self_cpu_time_total
            for each in profiler.key_averages()
            if each.device_type == DeviceType.CPU  # operators only, since their kernels are listed as well
        }
        whole = sum(spent.values())
        ordered = sorted(spent.items(), key=lambda item: -item[1])
        return {name: round(time / whole, 4) for name, time in ordered if time > whole / 100}

    def memory(self, batch: int) -> float | None:
        """Measure the peak memory of a step with weights and optimizer in GiB; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
        self.step(batch)
        states = (value for state in self.optimizer.state.values() for value in state.values())
        kept = [*self.model.parameters(), *(value for value in states if isinstance(value, Tensor))]
        own = sum(each.nbytes for each in kept if each.is_cuda)
        return round((torch.cuda.max_memory_allocated() - others + own) / 2**30, 2)


def largest_batch(step: Callable[[int], None], most: int) -> int:
    """Halve a batch until a step of it fits into the memory of the device.

    Raises:
        torch.OutOfMemoryError: If one image does not.
    """
    while most > 1:
        try:
            step(most)
        except torch.OutOfMemoryError:
            most //= 2
        else:
            return most
        torch.cuda.empty_cache()  # here, not above, where the error still held the tensors of the step
    step(1)
    return 1


@dataclass
class Entry:
    """A contender in a race: its batch, steps per round, peak memory in GiB, and seconds per step in each round.

    `operators` are their shares of a step, if asked for.
    """

    contender: Contender
    batch: int
    steps: int
    memory: float | None
    operators: dict[str, float] | None
    seconds: list[float] = field(default_factory=list)

    def go_round(self) -> None:
        """Time a round."""
        self.seconds.append(self.contender.seconds(self.batch, self.steps))


def enter(contender: Contender, *, most: int, compiled: bool, profiled: bool) -> Entry:
    """Find the batch size of a contender up to a maximum, compile and profile it if requested, and warm it up."""
    batch = largest_batch(contender.step, most)  # first, since another batch size would be recompiled
    if compiled:
        contender.model.compile()
    for _ in range(2):
        contender.step(batch)
    steps = math.ceil(ROUND / contender.seconds(batch, 1))
    operators = contender.operators(batch) if profiled else None
    return Entry(contender, batch, min(steps, 100), contender.memory(batch), operators)


def results_of(entry: Entry, peak: float | None) -> dict[str, Any]:
    """Summarise the rounds of a contender; `peak` is that of the device in TFLOP/s, if known."""
    contender, batch = entry.contender, entry.batch
    low, median, high = (batch / each for each in reversed(statistics.quantiles(entry.seconds, n=4)))
    tflops = contender.flops * median / 1e12
    return {
        "batch": batch,
        "rounds": len(entry.seconds),
        "images_per_s": round(median, 1),
        "quartiles": [round(low, 1), round(high, 1)],
        "rows_per_s": round(median * contender.views, 1),
        "gflop_per_image": round(contender.flops / 1e9, 3),
        "tflops": round(tflops, 3),
        "mfu": round(tflops / peak, 4) if peak else None,
        "peak_gib": entry.memory,
        **({"operators": entry.operators} if entry.operators else {}),
    }


class Race:
    """All cases to time, and their results.

    Args:
        given: The command line.
    """

    def __init__(self, given: argparse.Namespace):
        self.given, self.until = given, time.monotonic() + 60 * given.minutes
        name = device_name(given.device)
        self.peaks = next((peaks for part, peaks in PEAKS.items() if part in name), {})
        self.found: dict[str, Any] = {"device": name, "commit": given.commit, "versions": versions()}
        self.found |= {"peak_tflops": self.peaks, "results": [], "errors": [], "left_out": []}

    def run(self) -> None:
        """Run all modes and sizes, the most informative first."""
        given = self.given
        side = TOY["image_size"] if given.toy else 224
        images = torch.randint(256, (given.batch, 3, side, side), dtype=torch.uint8, device=given.device)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for mode in given.modes:
            for size in given.sizes:
                for precision in given.precisions:
                    self.race(size, images, {"mode": mode, "precision": precision})

    def write(self) -> None:
        """Write the results so far."""
        made = self.given.out.with_suffix(".part")
        made.write_text(json.dumps(self.found, indent=1) + "\n")
        made.rename(self.given.out)

    def race(self, size: str, images: Tensor, how: dict[str, str]) -> None:
        """Time all models of a size against each other, as time permits."""
        torch.compiler.reset()  # from the networks of the previous race
        contenders: list[tuple[dict[str, Any], Contender]] = []
        entries: list[tuple[dict[str, Any], Entry]] = []
        for case in (case for case in CASES[size] if case.preset in self.given.presets):
            views = masking_of(case.preset, case.settings)["num_views"]
            label = {"model": case.model, "size": size, "preset": case.preset, "views": views, "form": case.form} | how
            make = partial(Contender, case, size, images, precision=how["precision"], toy=self.given.toy)
            contenders += [(label, contender) for contender in self.attempt(make, label)]
        for label, contender in contenders:
            begin = partial(
                enter,
                contender,
                most=len(images),
                compiled=how["mode"] == "compiled",
                profiled=self.given.profile,
            )
            kept = self.given.rounds * ROUND * (len(entries) + 1)  # seconds for the rounds of those that are ready
            entries += [(label, entry) for entry in self.attempt(begin, label, kept=kept)]
        racing, before, peak = entries, len(self.found["results"]), self.peaks.get(how["precision"])
        for _ in range(self.given.rounds):
            racing = [(label, entry) for label, entry in racing if self.attempt(entry.go_round, label)]
            timed = [(label, entry) for label, entry in entries if len(entry.seconds) > 1]
            self.found["results"][before:] = [label | results_of(entry, peak) for label, entry in timed]
            named = [label for label, _ in timed]  # `rounds` shows if there was no time for all of them
            self.found["left_out"] = [label for label in self.found["left_out"] if label not in named]
            self.write()
        for line in self.found["results"][before:]:
            print(json.dumps(line), file=sys.stderr, flush=True)

    def attempt(self, work: Callable[[], T], label: dict[str, Any], *, kept: float = 0.0) -> list[T]:
        """Return the result of some work as a list; it is empty if it fails or only `kept` seconds are left."""
        late, done = time.monotonic() + kept > self.until, []
        if late:
            self.found["left_out"].append(label)
        else:
            try:
                done = [work()]
            except Exception as error:  # from a compiler or another library, or out of memory: the others continue
                self.found["errors"].append(label | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
        self.write()
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["base", "small", "large"], choices=CASES)
    presets = list(dict.fromkeys(case.preset for case in CASES["base"]))
    parser.add_argument("--presets", nargs="+", default=presets, choices=presets)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=("eager", "compiled"))
    parser.add_argument("--batch", type=int, default=256, help="images in a step at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="say which operators take the time")
    parser.add_argument("--minutes", type=float, default=8.0, help="what would begin later is left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="networks of nothing, to see that this program works")
    parser.add_argument("--commit", default="", help="of the program, to be noted")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100  # compile every network that shares a forward pass, not only eight
    Race(given).run()


if __name__ == "__main__":
    main()
