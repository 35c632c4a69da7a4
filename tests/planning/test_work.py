"""What is counted without memory is what a real step does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmjd.cli import settings_of
from dmjd.planning.work import FORMULAS, MANY, Ledger, StepParts, Work, count, recount
from dmjd.tasks.plan import parts_of

SMALL = {
    "model": {"image_size": 64, "embed_dim": 96, "depth": 1, "num_heads": 3},
    "decoder": {"embed_dim": 64, "num_heads": 2},
}


def parts(preset: str, **given: Any) -> StepParts:
    depth = {} if preset in ("maskfeat", "data2vec") else {"decoder__depth": 2}
    return parts_of(settings_of("plan", preset=preset, images=9, **SMALL, **depth, **given))


def real_step(made: StepParts, batch: int = MANY) -> tuple[float, int]:
    """FLOP of a step on real tensors, and the bytes that its forward pass leaves."""
    with Ledger() as ledger, FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        network = made.create().train()
        before = ledger.now
        losses = network(*made.inputs(batch, torch.device("cpu")))
        kept = ledger.now - before
        losses.total.backward()
    return counter.get_total_flops() / batch, kept


@pytest.mark.parametrize("preset", ["dmjd", "maskfeat", "data2vec"])
def test_count__is_the_work_and_the_memory_of_a_real_step(preset: str) -> None:
    made = parts(preset, **({"teacher__layers": [-1]} if preset == "data2vec" else {}))
    work = count(made, precision="fp32", on_gpu=False)
    flops, kept = real_step(made)
    assert work.flops == pytest.approx(flops, rel=0.01)
    assert work.footprint.fixed + MANY * work.footprint.image == pytest.approx(kept, rel=0.02)
    network = made.create()
    assert work.trained == sum(each.numel() for each in network.parameters() if each.requires_grad)
    assert work.gradients == 4 * work.trained
    assert work.states == pytest.approx(8 * work.trained, rel=0.01)  # AdamW: two moments
    has_teacher = preset == "data2vec"
    assert (work.teachers > 1e5) == has_teacher


def test_count__a_step_of_a_gpu_in_bf16_keeps_less_and_copies_of_weights() -> None:
    made = parts("dm")
    full, half = (count(made, precision=name, on_gpu=True) for name in ("fp32", "bf16"))
    assert half.flops == full.flops
    assert 0.4 * full.footprint.image < half.footprint.image < 0.8 * full.footprint.image
    assert half.footprint.fixed > full.trained  # two bytes of most weights
    again = recount(half, made, precision="fp32", on_gpu=True)
    assert replace(again, footprint=full.footprint) == full
    assert again.footprint.image == full.footprint.image


@pytest.mark.parametrize(("precision", "on_gpu"), [("fp32", False), ("bf16", True)])
def test_count__blocks_that_are_computed_again_keep_less_and_work_more(precision: str, on_gpu: bool) -> None:
    plain = count(parts("dm"), precision=precision, on_gpu=on_gpu)
    spared = count(parts("dm", activation_checkpointing=True), precision=precision, on_gpu=on_gpu)
    assert spared.footprint.image < 0.6 * plain.footprint.image
    assert spared.flops > 1.15 * plain.flops


def test_count__more_views_are_more_work() -> None:
    one, two = (
        count(parts("mae", masking__num_views=views, masking__predict_ratio=0.75), precision="fp32", on_gpu=False)
        for views in (1, 2)
    )
    assert 1.7 * one.flops < two.flops < 2 * one.flops  # patches are embedded once
    assert two.trained == one.trained


@pytest.fixture(scope="module")
def work() -> Work:
    return count(parts("dm"), precision="fp32", on_gpu=True)


def test_memory__ranks_keep_what_they_send_and_fsdp_keeps_a_share(work: Work) -> None:
    alone = work.kept()
    assert alone == work.weights + work.states + work.teachers
    assert work.kept(devices=4) == alone + work.gradients
    assert work.kept(devices=4, parallel="fsdp") == (work.weights + work.states) / 4 + work.weights + work.teachers
    assert work.kept(accumulation=2) == alone + work.gradients


def test_largest__is_the_largest_batch_that_fits(work: Work) -> None:
    usable = work.memory(10)
    assert work.largest(usable) == 10
    assert work.largest(usable - 1) == 9
    assert work.largest(work.memory(1) - 1) == 0
