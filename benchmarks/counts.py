"""The cost of a pre-training step, counted rather than timed: the same on any machine with the same versions.

    python benchmarks/counts.py                      count, and write docs/results/bench/counts.json
    python benchmarks/counts.py check [--only NAME]  count again, and fail if a figure is worse than the stored one

Figures of a step (forward pass, backward pass and AdamW) in float32, for all images of a batch together:
    flops        of matrix products, attention and convolutions, two per multiply-add
    saved_bytes  activations that are saved for the backward pass
    calls        operators that torch dispatches, including those of the target and the optimizer
    syncs        operators of forward and backward pass that synchronise with a device: item, nonzero
    breaks       graph breaks of torch.compile in the step, and in its parts, at size `small`

Plain implementations of the same steps are counted too when figures are written; only ours are checked. Four views are
compared with four steps of one view each.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from plain.hybrid import PlainHybrid
from plain.mae import TransformersMAE
from race import MASKS, MODELS, TOY
from timing import RESULTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dmjd
from dmjd.engine.optim import create_optimizer
from dmjd.masking import TokenIds, seeded_masks, token_ids
from dmjd.method import DMJD, Losses
from dmjd.planning.work import FORMULAS

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
UNITS = {"flops": 1e9, "saved_bytes": 1e6}
SLACK = 1.001  # factor by which a figure may exceed the stored one
STORED = RESULTS / "counts.json"


@dataclass(frozen=True)
class Counted:
    """A case to count: a model of `race.MODELS`, its size and the number of images."""

    model: str
    size: str
    images: int = 1

    def build(self) -> DMJD:
        """Build it, untrained."""
        preset, settings = MODELS[self.model]
        toy = self.size == "toy"
        return dmjd.build(preset, "tiny" if toy else self.size, **(TOY if toy else {}), **settings).train()


COUNTED = {
    f"{model}-{size}": Counted(model, size)
    for size, models in {
        "toy": ("hybrid",),
        "small": ("mae", "vit", "vit-4", "hybrid", "hybrid-4"),
        "base": ("mae", "vit", "hybrid"),
    }.items()
    for model in models
}
PLAIN: dict[str, Callable[[DMJD], nn.Module]] = {"mae": TransformersMAE, "hybrid": PlainHybrid}


app = cyclopts.App(help=__doc__, help_format="plaintext")
Only = Annotated[list[str] | None, cyclopts.Parameter(consume_multiple=True)]


class Calls(TorchDispatchMode):
    """Counts dispatched operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Step:
    """A training step as a run takes it, from seeds of masks to weights.

    Args:
        counted: Of what.
    """

    def __init__(self, counted: Counted):
        self.model, self.masking = counted.build(), MASKS[counted.model]
        self.grid = (4, 4) if counted.size == "toy" else (14, 14)
        side = self.grid[0] * self.model.encoder.patch_size
        self.images = torch.randint(0, 256, (counted.images, 3, side, side), dtype=torch.uint8)
        self.seeds = torch.arange(counted.images)
        self.num_hidden = int(seeded_masks(self.seeds[:1], self.grid, **self.masking)[0, 0].sum())
        self.optimizer = create_optimizer(self.model, name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))

    def tokens(self) -> TokenIds:
        """Draw masks."""
        return token_ids(seeded_masks(self.seeds, self.grid, **self.masking), self.num_hidden)

    def forward(self) -> Losses:
        """Draw masks and compute the losses."""
        return self.model(self.images, self.tokens())

    def __call__(self) -> None:
        """Take the step."""
        self.forward().total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def saved_bytes(forward: Callable[[], Losses], model: nn.Module) -> int:
    """Count the bytes saved for the backward pass, without weights and buffers, and each storage only once."""
    owned = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = forward()
    del losses
    return sum(saved.values())


def graph_breaks(step: Step) -> dict[str, int]:
    """Count the graph breaks of a model and of its parts."""
    model, images = step.model, step.images
    tokens = step.tokens()
    latents = model.encoder(model.normalize(images), tokens)
    parts: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "whole": (model, (images, tokens)),
        "encoder": (model.encoder, (model.normalize(images), tokens)),
        "decoder": (model.decoder, (latents, tokens)),
        "target": (model.target, (images,)),
    }
    if model.projector is not None:
        parts["projector"] = (model.projector, (latents,))
    found = {}
    for name, (part, arguments) in parts.items():
        torch.compiler.reset()
        found[name] = int(torch._dynamo.explain(part)(*arguments).graph_break_count)
    return found


def count(counted: Counted) -> dict[str, int]:
    """Count everything, by name."""
    step = Step(counted)
    figures = work(step.forward, step.model)
    step()  # the optimizer's first step creates its state
    with Calls() as calls:
        step.forward().total.backward()
    figures["syncs"] = sum(calls.counts[name] for name in WAITING)
    with calls:
        step.optimizer.step()
    figures["calls"] = calls.counts.total()
    breaks = graph_breaks(step) if counted.size == "small" else {}  # other sizes have the same graphs
    return figures | {f"breaks, {name}": value for name, value in breaks.items()}


def work(forward: Callable[[], Losses], model: nn.Module) -> dict[str, int]:
    """Count floating-point operations and saved bytes of a step of forward and backward pass."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
        forward().total.backward()
    model.zero_grad(set_to_none=True)
    return {"flops": flops.get_total_flops(), "saved_bytes": saved_bytes(forward, model)}


def count_plain(counted: Counted) -> dict[str, int] | None:
    """Count the work of the plain form of a model, or of one view at a time, if there is such a form."""
    step = Step(counted)
    if (num_views := step.masking["num_views"]) > 2:  # the work of all views adds up, but what they save does not
        one = work(lambda: step.model(step.images, TokenIds(*(ids[:1] for ids in step.tokens()))), step.model)
        return one | {"flops": num_views * one["flops"]}
    if counted.model not in PLAIN:
        return None
    plain = PLAIN[counted.model](step.model)
    return work(lambda: plain(step.images, step.tokens()), plain)


def worse(stored: dict[str, int], now: dict[str, int]) -> list[str]:
    """List the figures that are worse than those stored: name, stored, now."""
    return [
        f"{name}: {stored[name]:,} -> {value:,}"
        for name, value in now.items()
        if name in stored and value > stored[name] * SLACK
    ]


def table(figures: dict[str, dict[str, int]], plain: dict[str, dict[str, int]]) -> str:
    """Format figures as a table, in GFLOP and MB, with those of the plain form after a slash."""
    rows = ["| one image | GFLOP | saved, MB | operators | waits | graph breaks |", "|---|---|---|---|---|---|"]
    for name, each in figures.items():
        both = [each, plain[name]] if name in plain else [each]
        work = [" / ".join(f"{one[key] / unit:.4g}" for one in both) for key, unit in UNITS.items()]
        breaks = (f"{key.partition(', ')[2]} {value}" for key, value in each.items() if key.startswith("breaks, "))
        rows.append(f"| {' | '.join([name, *work, str(each['calls']), str(each['syncs']), ', '.join(breaks)])} |")
    return "\n".join(rows) + "\n"


@app.default
def write(*, only: Only = None, file: Path = STORED) -> None:
    """Count, and store the figures.

    Args:
        only: Names of models; others keep their stored figures.
        file: File to write; the table goes beside it.
    """
    stored = json.loads(file.read_text()) if file.exists() else {"figures": {}, "plain": {}}
    for name in only or COUNTED:
        stored["figures"][name] = count(COUNTED[name])
        if plain := count_plain(COUNTED[name]):
            stored["plain"][name] = plain
        print(f"{name}: counted", flush=True)
    stored["versions"] = versions()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stored, indent=1) + "\n")
    text = table(stored["figures"], stored["plain"])
    file.with_suffix(".md").write_text(text)
    print(text)


@app.command
def check(*, only: Only = None, file: Path = STORED) -> None:
    """Count again, and fail if a figure is worse than the stored one.

    Args:
        only: Names of models; default: all stored ones.
        file: File of the stored figures.
    """
    stored = json.loads(file.read_text())
    if stored["versions"] != versions():
        print(f"note: stored with {stored['versions']}, counted with {versions()}")
    lines: list[str] = []
    for name in only or stored["figures"]:
        lines += [f"{name}, {line}" for line in worse(stored["figures"][name], count(COUNTED[name]))]
        print(f"{name}: counted", flush=True)
    print("\n".join(lines) or "no figure is worse than the stored one")
    if lines:
        raise SystemExit(1)


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    return {name: version(name) for name in ("torch", "timm")}


if __name__ == "__main__":
    app()
