"""Check that a device computes what a CPU computes: differences found, and differences that rounding explains.

    python benchmarks/gpu_correct.py --out correct.json [--golden FOLDER]
    python benchmarks/gpu_correct.py --device cpu --toy --only masks crops step --out toy.json

Each check prints a line of JSON when it is done. If a check fails, the others still run, and the program fails at the
end. The checks, by their name for --only:

masks    hashes, uniform numbers and masks from the same seeds: equal to the last bit
crops    boxes equal to the last bit; pixels within one level
step     losses and gradients of one step, float32, by preset
rows     the hybrid's convolution and its gradients, as implemented on the device, against maps in float64
golden   losses and gradient norms of the official programs (FOLDER has their files, as tests/parity reads them)
curve    the losses of 20 steps of `dmjd pretrain`, float32, against those of the CPU
repeat   a second run: close to the first, and with --deterministic equal to the last bit, in float32 and in bf16
resume   a run with --deterministic that is killed by SIGKILL when step 10 is saved, and resumed: equal to the last bit
bf16     bf16 against float32
compile  --compile against the plain run, float32
verbs    the output and files of every verb, and runs of many kinds (gpu_verbs.py), against the CPU

The difference of losses is relative to the CPU's, the largest over all steps; that of gradients is the largest over all
weights: the norm of the difference relative to the norm of the gradient. TF32 is off everywhere.
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_speed import TOY, masking_of
from gpu_verbs import LINES, Verbs
from PIL import Image
from safetensors import safe_open
from study import device_name, versions
from torch import Tensor, nn

import dmjd
from dmjd.backbones.depthwise import DepthwiseOnRows, Layout, layout_of
from dmjd.cli import main as dmjd_main
from dmjd.data.crops import RandomCrop
from dmjd.masking import seeded_masks, token_ids
from dmjd.random import mix_all, uniforms
from dmjd.reference import our_name

# Differences that rounding explains; DECISION is four pixels of a thousand.
LOSS, GRADIENT, CURVE, BF16, VERB, DECISION = 1e-5, 1e-4, 1e-3, 1e-2, 1e-3, 4e-3
STEPS = 20
PRESETS: dict[str, dict[str, Any]] = {
    "mae": {},
    "maskfeat": {},
    "dm": {},
    "dmjd": {},
    "dmjd, vit": {"backbone": "vit"},
    "fastconvmae": {},
}
RUNS = ("quick", "quick-dmjd")  # presets: a ViT, the hybrid
TINY = ["--model.embed_dim", "24", "--model.depth", "1", "--decoder.embed_dim", "24", "--decoder.depth", "1"]
KILLED = """
import os, signal, sys, torch
from dmjd.cli import main
torch.backends.cudnn.allow_tf32 = False
from dmjd.engine.trainer import Trainer
save = Trainer.save
def save_and_die(trainer):
    save(trainer)
    os.kill(os.getpid(), signal.SIGKILL)
Trainer.save = save_and_die
main(sys.argv[1:])
"""


class Finding(NamedTuple):
    """A measured difference and the largest one allowed."""

    part: str
    difference: float
    allowed: float


def masks(device: str) -> Iterator[Finding]:
    """Compare what is drawn from the same seeds."""
    seeds = torch.randint(2**62, (512,), generator=torch.Generator().manual_seed(0))
    ours = seeds.to(device)
    yield Finding("hash", differing(mix_all(7, ours, 3), mix_all(7, seeds, 3)), 0)
    yield Finding("uniform", differing(uniforms(ours, 100), uniforms(seeds, 100)), 0)
    for grid, block, views in (((14, 14), 1, 4), ((14, 14), 2, 2), ((7, 13), 2, 2)):
        draw = partial(seeded_masks, grid=grid, block=block, num_views=views, mask_ratio=0.6)
        rows, columns = grid
        yield Finding(f"{rows} x {columns}, block {block}", differing(draw(ours), draw(seeds)), 0)


def differing(ours: Tensor, theirs: Tensor) -> float:
    """Return the share of numbers that differ."""
    return (ours.cpu() != theirs).double().mean().item()


def crops(device: str) -> Iterator[Finding]:
    """Compare crops of noise, the boxes and the pixels."""
    images = torch.randint(256, (256, 3, 72, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = RandomCrop((64, 64), (0.2, 1.0), (3 / 4, 4 / 3), flip=True)
    draws = crop.draws(torch.arange(len(images)))
    on_device = crop.draws(torch.arange(len(images), device=device))
    yield Finding("boxes", float((draws != on_device).mean()), 0)
    pixels, ours = crop.of_many(images, draws), crop.of_many(images.to(device), draws)
    yield Finding("largest difference in levels", (ours.cpu().int() - pixels.int()).abs().max().item(), 1)
    yield Finding("share of pixels that differ", differing(ours, pixels), 1e-3)


def step(name: str, device: str, *, toy: bool) -> Iterator[Finding]:
    """Compare losses and gradients of a preset on noise."""
    torch.manual_seed(0)
    preset, settings = name.partition(",")[0], PRESETS[name] | (TOY if toy else {})
    model = dmjd.build(preset, "small", **settings)
    encoder: Any = model.encoder
    side = encoder.grid[0] * encoder.patch_size
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    masked = seeded_masks(torch.arange(2), encoder.grid, **masking_of(preset, settings))
    ours = copy.deepcopy(model).to(device)
    expected, found = model(images, masked), ours(images.to(device), masked.to(device))
    for part, loss in expected._asdict().items():
        yield Finding(f"{part} loss", relative(getattr(found, part), loss), LOSS)
    expected.total.backward()
    found.total.backward()
    yield Finding("gradients", largest_difference(ours, model), GRADIENT)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Compare two losses; the loss of a missing branch is 0."""
    return ((ours.detach().cpu() - theirs.detach()).abs() / theirs.detach().abs().clamp_min(1e-12)).item()


def largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Compare the gradients of two copies of a model, weight by weight."""
    pairs = [
        (mine.grad.cpu(), other.grad)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True)
        if mine.grad is not None and other.grad is not None
    ]
    whole = torch.stack([other.norm() for _, other in pairs]).norm()
    # Some gradients are pure rounding error, such as that of a key's bias: add a thousandth of the whole norm.
    return max(((mine - other).norm() / (other.norm() + 1e-3 * whole)).item() for mine, other in pairs)


def rows(device: str) -> Iterator[Finding]:
    """Compare the convolutions of both stages of a base hybrid, with three quarters of the tokens hidden."""
    torch.manual_seed(0)
    visible = token_ids(dmjd.block_masks(4, (14, 14), num_views=2, mask_ratio=0.75)).visible
    for side, dim in ((4, 256), (2, 384)):
        maps = layout_of(visible, (14, 14), side)
        layout = layout_of(visible.to(device), (14, 14), side).for_its_device()
        form = "on rows" if layout.table else "on maps"
        given = [torch.randn(shape) for shape in ((len(maps.places), dim), (dim, 1, 5, 5), (dim,))]
        gradient = torch.randn_like(given[0])
        for precision, allowed in ((torch.float32, LOSS), (torch.bfloat16, BF16)):
            rounded = [given[0].to(precision), *given[1:], gradient.to(precision)]
            expected = convolution(maps, *(each.double() for each in rounded))
            found = convolution(layout, *(each.to(device) for each in rounded))
            for part, ours, theirs in zip(("outputs", "rows", "weights", "biases"), found, expected, strict=True):
                difference = ((ours.cpu().double() - theirs).norm() / theirs.norm()).item()
                yield Finding(f"{form}, {dim} channels, {precision}: {part}", difference, allowed)


def convolution(layout: Layout, rows: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
    """Compute outputs, and gradients of rows, weight and bias."""
    given = [each.detach().requires_grad_() for each in (rows, weight, bias)]
    out = DepthwiseOnRows.apply(*given, layout)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


def golden(path: Path, device: str) -> Iterator[Finding]:
    """Compare losses and norms of gradients with those of an official program, as tests/parity does on a CPU."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads(file.metadata()["config"])
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    heads = {"num_heads": config["heads"], "decoder_num_heads": config["decoder_heads"]}
    masked, hybrid = tensors["mask"].bool(), "convvit" in path.stem
    if hybrid:  # two views, whose rows are view-major
        model = dmjd.load_reference(state, **heads)
        masked, losses = masked.unflatten(0, (2, -1)).transpose(0, 1), ("masked", "visible", "total")
        official = {name: tensors[f"loss_{name}"] for name in losses}
    else:
        model = dmjd.load_reference(state, **heads, target="normalized_pixels")
        masked, official = masked[:, None], {"total": tensors["loss"]}
    model = model.to(device)
    found = model(tensors["image_uint8"].to(device), masked.to(device))
    for name, loss in official.items():
        yield Finding(f"{name} loss", relative(getattr(found, name), loss), LOSS)
    found.total.backward()
    norms = {name: each.grad.norm().cpu() for name, each in model.named_parameters() if each.grad is not None}
    differences = [
        abs(norms[our_name(key.removeprefix("gradnorm."), hybrid=hybrid)] / norm - 1).item()
        for key, norm in tensors.items()
        if key.startswith("gradnorm.") and norm > 1e-7  # the gradient of a key's bias is pure rounding error
    ]
    yield Finding("norms of gradients", max(differences), GRADIENT)


class Runs:
    """Short runs of `dmjd pretrain`, each started once, on first use.

    Args:
        folder: For the runs and their images.
        device: That is checked.
        toy: Smaller networks.
    """

    def __init__(self, folder: Path, device: str, *, toy: bool):
        self.folder, self.device, self.flags = folder, device, TINY if toy else []
        (folder / "images").mkdir()
        for number in range(48):
            rng = np.random.default_rng(number)
            pixels = rng.integers(0, 120, (72, 80, 3))
            top, left, side = rng.integers(8, 36, 3)
            pixels[top : top + side, left : left + side] += rng.integers(0, 130, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")

    def line(self, name: str, preset: str, *flags: str) -> list[str]:
        """Write the command line of a run, on the device and in float32 unless flags say otherwise."""
        fixed = f"--steps {STEPS} --batch_size 32 --workers 0 --monitor.log_every 1 --monitor.evals 0 --monitor.saves 2"
        words = ["pretrain", "--preset", preset, "--data", str(self.folder / "images"), *fixed.split(), *self.flags]
        where = [] if "--device" in flags else ["--device", self.device]
        how = [] if "--precision" in flags else ["--precision", "fp32"]
        return [*words, "--out", str(self.folder / preset / name), *where, *how, *flags]

    def losses(self, name: str, preset: str, *flags: str) -> np.ndarray:
        """Train, and read loss and norm of the gradient of every step: (steps, 2)."""
        out = self.folder / preset / name
        if not (out / "summary.json").exists():
            with contextlib.redirect_stdout(sys.stderr):
                status = dmjd_main(self.line(name, preset, *flags))
            if status:
                raise RuntimeError(f"dmjd pretrain ended with {status}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return np.array([[line["loss"], line["grad_norm"]] for line in lines if "loss" in line])

    def exact(self, name: str, preset: str, *flags: str) -> np.ndarray:
        """Do the same with --deterministic."""
        return self.losses(name, preset, *flags, "--deterministic")

    def curve(self, preset: str) -> Iterator[Finding]:
        """Compare with the CPU."""
        expected = self.losses("cpu", preset, "--device", "cpu")
        yield Finding("losses", largest(self.losses("fp32", preset), expected), CURVE)

    def repeat(self, preset: str) -> Iterator[Finding]:
        """Compare two equal runs."""
        for precision in ("fp32", "bf16"):
            flags = ("--precision", precision)
            once, again = (self.losses(name, preset, *flags) for name in (precision, f"{precision}-2"))
            yield Finding(precision, largest(again, once), CURVE)
            once, again = (self.exact(f"exact-{precision}{name}", preset, *flags) for name in ("", "-2"))
            yield Finding(f"{precision}, deterministic", exactly(again, once), 0)

    def resume(self, preset: str) -> Iterator[Finding]:
        """Compare a run that was killed with one that was not."""
        flags = ("--precision", "bf16")
        line = self.line("killed", preset, *flags, "--deterministic")
        killed = subprocess.run([sys.executable, "-c", KILLED, *line], stdout=subprocess.DEVNULL, check=False)
        if killed.returncode != -9:
            raise RuntimeError(f"it should have been killed, and ended with {killed.returncode}")
        resumed = self.exact("killed", preset, *flags, "--resume")
        yield Finding("losses", exactly(resumed, self.exact("exact-bf16", preset, *flags)), 0)

    def bf16(self, preset: str) -> Iterator[Finding]:
        """Compare bf16 with float32."""
        half = self.losses("bf16", preset, "--precision", "bf16")
        yield Finding("losses", largest(half, self.losses("fp32", preset)), BF16)

    def compile(self, preset: str) -> Iterator[Finding]:
        """Compare the compiled network with the plain one."""
        compiled = self.losses("compiled", preset, "--compile", "on")
        yield Finding("losses", largest(compiled, self.losses("fp32", preset)), CURVE)


def verb(verbs: Verbs, name: str) -> Iterator[Finding]:
    """Compare a verb's printed output and files on the device with those on the CPU."""
    for part, difference in verbs.compare(name):
        yield Finding(part, difference, DECISION if "decisions" in part else VERB)


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Compare the losses of two runs."""
    return float(np.max(np.abs(ours[:, 0] / theirs[:, 0] - 1)))


def exactly(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Compare losses and norms of gradients of two runs."""
    return float(np.max(np.abs(ours / theirs - 1)))


def checks_of(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, Callable[[], Iterator[Finding]]]]:
    """List the checks, quickest first: name, subject and function."""
    device, toy = given.device, given.toy
    yield "masks", "", partial(masks, device)
    yield "crops", "", partial(crops, device)
    for name in PRESETS:
        yield "step", name, partial(step, name, device, toy=toy)
    yield "rows", "", partial(rows, device)
    for path in sorted(given.golden.glob("*.safetensors")) if given.golden else ():
        if path.stem != "convvit_classifier":
            yield "golden", path.stem, partial(golden, path, device)
    runs = Runs(folder, device, toy=toy)
    for name in ("curve", "repeat", "resume", "bf16", "compile"):
        for preset in RUNS:
            yield name, preset, partial(getattr(runs, name), preset)
    made = Verbs(folder / "verbs", device)
    for name in LINES:
        yield "verbs", name, partial(verb, made, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--golden", type=Path, help="folder of the official programs' numbers")
    parser.add_argument("--only", nargs="+", help="names of checks")
    parser.add_argument("--toy", action="store_true", help="networks of nothing, to see that this program works")
    parser.add_argument("--commit", default="", help="of the program, to be noted")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # for convolutions; for matrix products it is off by default
    found: dict[str, Any] = {"device": device_name(given.device), "commit": given.commit, "versions": versions()}
    found["checks"] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, subject, check in checks_of(given, Path(folder)):
            if given.only and name not in given.only:
                continue
            began = time.perf_counter()
            try:
                lines = [each._asdict() | {"ok": bool(each.difference <= each.allowed)} for each in check()]
            except Exception as error:  # the other checks should still run
                frames = traceback.extract_tb(error.__traceback__)
                where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
                lines = [{"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}", "at": where[-300:]}]
            seconds = round(time.perf_counter() - began, 1)
            lines = [{"check": name, "of": subject, **line, "seconds": seconds} for line in lines]
            print("\n".join(map(json.dumps, lines)), flush=True)
            found["checks"] += lines
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(line["ok"] for line in found["checks"]))


if __name__ == "__main__":
    sys.exit(main())
