"""The optimizers follow their rules, in numbers worked by hand."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import dmjd.backbones.convvit  # noqa: F401 (registers its models with timm)
from dmjd.engine import checkpoint
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.engine.loop import Plan, train
from dmjd.engine.optim import create_lars, create_optimizer, warmup_poly

DEPTH = 3
DECAY = 0.65


def hybrid(num_classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "convvit_tiny",
        num_classes=num_classes,
        img_size=32,
        patch_size=8,
        embed_dims=(4, 8, 16),
        depths=(1, 1, DEPTH),
        num_heads=2,
    )


def adamw(model: nn.Module, layer_decay: float | None, weight_decay: float = 0.05) -> torch.optim.Optimizer:
    return create_optimizer(
        model, name="adamw", lr=1e-3, weight_decay=weight_decay, betas=(0.9, 0.999), layer_decay=layer_decay
    )


def layer_of(name: str) -> int:
    """The rule of the official ConvMAE: all before the transformer is 0, block i is i + 1, the rest is last."""
    if name.startswith(("patch_embed", "pos_embed", "blocks1", "blocks2")):
        return 0
    if name.startswith("blocks3."):
        return int(name.split(".")[1]) + 1
    assert name.startswith(("fc_norm", "head")), name
    return DEPTH + 1


# -- LARS --------------------------------------------------------------------------------------------------------------


def lars_steps(*gradients: tuple[tuple[float, float], float]) -> tuple[list[float], float]:
    """Weight and bias after steps of learning rate 10 from weight (3, 4) and bias 1."""
    head = nn.Linear(2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0]]))
        head.bias.fill_(1.0)
    optimizer = create_lars(head, lr=10.0)
    for weight, bias in gradients:
        head.weight.grad, head.bias.grad = torch.tensor([weight]), torch.tensor([bias])
        optimizer.step()
    return head.weight.flatten().tolist(), head.bias.item()


def test_create_lars__two_steps_are_those_worked_by_hand() -> None:
    # Step 1: |w| = 5, |g| = 1, so g counts 0.001 * 5 / 1 = 0.005 times: buffer (0.003, 0.004), and 10 of it go off.
    # The bias is plain SGD: buffer 0.02.
    first = ((0.6, 0.8), 0.02)
    weight, bias = lars_steps(first)
    assert weight == pytest.approx([3 - 0.03, 4 - 0.04])
    assert bias == pytest.approx(1 - 0.2)
    # Step 2: |w| = 4.95, |g| = 2, so g counts 0.002475 times: (0, 0.00495).
    # Buffer 0.9 * (0.003, 0.004) + (0, 0.00495) = (0.0027, 0.00855); the bias' is 0.9 * 0.02 - 0.01 = 0.008.
    weight, bias = lars_steps(first, ((0.0, 2.0), -0.01))
    assert weight == pytest.approx([2.97 - 0.027, 3.96 - 0.0855])
    assert bias == pytest.approx(0.8 - 0.08)


def test_create_lars__the_length_of_the_weights_gradient_does_not_count() -> None:
    assert lars_steps(((600.0, 800.0), 0.0))[0] == pytest.approx(lars_steps(((0.006, 0.008), 0.0))[0], rel=1e-5)


def test_create_lars__nothing_decays() -> None:
    assert lars_steps(((0.0, 0.0), 0.0), ((0.0, 0.0), 0.0)) == ([3.0, 4.0], 1.0)


# -- layer decay -------------------------------------------------------------------------------------------------------


def test_create_optimizer__a_hybrids_layers_have_the_scale_of_their_depth() -> None:
    model = hybrid()
    group_of = {parameter: group for group in adamw(model, DECAY).param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(group_of) == len(trained)
    for name, parameter in trained.items():
        group = group_of[parameter]
        assert group["lr_scale"] == pytest.approx(DECAY ** (DEPTH + 1 - layer_of(name))), name
        assert group["weight_decay"] == (0 if parameter.ndim == 1 or name == "pos_embed" else 0.05), name
    assert {layer_of(name) for name in trained} == set(range(DEPTH + 2))


def test_create_optimizer__without_layer_decay_all_learn_alike() -> None:
    assert {group.get("lr_scale", 1.0) for group in adamw(hybrid(), None).param_groups} == {1.0}


def test_train__a_layers_step_is_as_long_as_its_scale_says() -> None:
    """The first step of Adam has the learning rate's length in every number, whatever the gradient."""
    model = hybrid().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adamw(model, DECAY, weight_decay=0.0)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    (step,) = train(
        ParallelModel(model, Ranks(torch.device("cpu"))),
        optimizer,
        iter([SimpleNamespace(skipped={})]),
        lambda model, batch: {"loss": F.cross_entropy(model(images), labels)},
        Plan(steps=1, batch_size=6, lr=0.01),
        start=0,
        lr=lambda step: 0.01,
        autocast=nullcontext,
    )
    assert step.lr == 0.01
    assert all(group["lr"] == pytest.approx(0.01 * group["lr_scale"]) for group in optimizer.param_groups)
    for name, value in model.named_parameters():
        if value.requires_grad:
            expected = 0.01 * DECAY ** (DEPTH + 1 - layer_of(name))
            moved = (value - before[name]).abs().max().item()
            assert math.isclose(moved, expected, rel_tol=0.02), name


def with_heads(model: nn.Module, heads: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer(
        model, name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=DECAY, heads=heads
    )


def test_layer_decay__heads_train_at_the_full_rate_and_their_vectors_do_not_decay():
    head = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))
    optimizer = with_heads(hybrid(num_classes=0), head)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert groups[id(head[0].weight)].get("lr_scale", 1.0) == 1.0
    assert groups[id(head[0].weight)]["weight_decay"] == 0.05
    assert groups[id(head[1].weight)]["weight_decay"] == groups[id(head[0].bias)]["weight_decay"] == 0
    assert min(group.get("lr_scale", 1.0) for group in optimizer.param_groups) == pytest.approx(DECAY ** (DEPTH + 1))


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_layer_decay__a_backbones_last_block_is_one_layer_below_the_heads(global_pool):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": DEPTH, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool=global_pool, **size)
    optimizer = with_heads(vit, nn.Linear(16, 4))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales = [groups[id(block.attn.proj.weight)]["lr_scale"] for block in vit.blocks]
    assert scales == pytest.approx([DECAY**above for above in (3, 2, 1)])
    assert groups[id(vit.patch_embed.proj.weight)]["lr_scale"] == pytest.approx(DECAY ** (DEPTH + 1))
    assert groups[id(vit.pos_embed)]["weight_decay"] == groups[id(vit.cls_token)]["weight_decay"] == 0


@pytest.mark.parametrize("fused", [(False, True), (True, False)])
def test_checkpoint__a_run_goes_on_with_the_kernels_of_the_device_that_it_is_on(tmp_path, fused):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first, then = (
        torch.optim.AdamW(each.parameters(), lr=rate, fused=kind)
        for each, rate, kind in ((model, 0.5, fused[0]), (other, 0.1, fused[1]))
    )
    model(torch.ones(1, 2)).sum().backward()
    first.step()
    path = checkpoint.save(tmp_path, checkpoint.collect(model, model, first), {"step": 1})
    checkpoint.load(path, model=other, trained=other, optimizer=then)
    assert then.param_groups[0]["fused"] == fused[1]
    assert then.param_groups[0]["lr"] == 0.5
    for optimizer, network in ((first, model), (then, other)):
        optimizer.zero_grad()
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, other.weight)


def test_warmup_poly__rises_then_falls_on_a_straight_line_to_zero():
    rate = warmup_poly(1.0, warmup=4.0, steps=14)
    assert [round(rate(step), 3) for step in (0, 1, 4, 9, 14)] == [0.2, 0.4, 1.0, 0.5, 0.0]
