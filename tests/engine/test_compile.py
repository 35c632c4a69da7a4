"""A step compiles as one graph, once in a run, and a run goes on where torch cannot compile."""

import inspect
import json

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from jaxtyping import config as shape_checks
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import dmjd
from dmjd.backbones.convvit import Layout
from dmjd.cli import main, settings_of
from dmjd.engine.distributed import REPAID, ParallelModel, Ranks, cause
from dmjd.masking import disjoint_masks, token_ids

SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
HEADS = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
ONE = Ranks(torch.device("cpu"))


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the checks of shapes, which only tests have: they are no part of what is compiled."""
    shape_checks.update("jaxtyping_disable", True)
    for name in ("__init__", "for_its_device", "to_map", "to_rows"):
        monkeypatch.setattr(Layout, name, inspect.unwrap(getattr(Layout, name)))
    torch.compiler.reset()
    yield
    shape_checks.update("jaxtyping_disable", False)


def draw(step):
    generator = torch.Generator().manual_seed(step)
    return disjoint_masks(4, 16, num_views=2, mask_ratio=0.5, generator=generator)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("dmjd", {"backbone": "convvit", **HEADS}),
        ("dmjd", {"backbone": "vit", "masked_target": "hog+ema", **HEADS}),
        ("mae", {"class_token": True, **HEADS}),
        ("maskfeat", {}),
    ],
    ids=str,
)
def test_step__is_one_graph_that_is_made_once_whatever_is_hidden(unchecked, preset, overrides):
    torch.manual_seed(0)
    model = dmjd.build(preset, "tiny", **SHAPE, **overrides).train()
    ParallelModel(model, ONE, checkpointing=preset == "mae")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for step in range(2):
        losses = compiled(images, token_ids(draw(step), 8))
        plain = model(images, draw(step))
        assert losses.total == plain.total
        assert torch.equal(losses.masked, plain.masked)
        found, expected = gradients(model, losses.total), gradients(model, plain.total)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        model.update_targets(step / 2)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")  # torch.jit is on its way out, and says so
@torch.no_grad()
def test_hybrid__torch_jit_and_vmap_take_it_without_gradients(unchecked):
    model = timm.create_model("convvit_tiny", img_size=32, num_classes=3).eval()
    images = torch.randn(3, 3, 32, 32)
    traced = torch.jit.trace(model, images[:2])
    torch.testing.assert_close(traced(images), model(images))
    torch.testing.assert_close(torch.vmap(model)(images[:, None])[:, 0], model(images))


def test_begin__compiles_when_asked_to_and_by_itself_where_it_pays():
    def compiled(mode, device, steps):
        model = ParallelModel(nn.Linear(2, 2), Ranks(torch.device(device)), compile=mode)
        model.begin(steps)
        return model.compiled

    assert compiled("on", "cpu", 1)
    assert compiled("auto", "cuda", REPAID)
    assert not compiled("auto", "cuda", REPAID - 1)
    assert not compiled("auto", "cpu", REPAID)
    assert not compiled("off", "cuda", REPAID)


def test_model__without_a_compiler_it_says_so_once_and_goes_on_plain(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing was compiled before
    network, inputs = nn.Sequential(nn.Linear(3, 5), nn.GELU()), torch.randn(2, 3)
    expected = network(inputs)
    model = ParallelModel(network, ONE, compile="on")
    model.begin(2)
    assert model.compiled
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        assert torch.equal(model(inputs), expected)
        assert torch.equal(model(inputs), expected)
    assert not model.compiled
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: torch cannot compile")
    assert "--compile" in line


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("no lowering of roll\n\nSet TORCHDYNAMO_VERBOSE=1", "no lowering of roll"),
        (
            "SubprocException: An exception occurred in a subprocess:\n\nTraceback (most recent call last):\n"
            "  File 'kernel.py', line 1\nNameError: name 'constexpr' is not defined\n\n\nSet TORCHDYNAMO_VERBOSE=1",
            "NameError: name 'constexpr' is not defined",
        ),
        (
            "triton.compiler.errors.CompilationError: at 3:8:\ndef kernel(x):\n        ^\nNameError('y')\n\nSet it",
            "triton.compiler.errors.CompilationError: at 3:8: NameError('y')",
        ),
    ],
)
def test_cause__is_the_last_error_that_a_compiler_names(said, why):
    assert cause(RuntimeError(said)) == why


def test_model__a_backward_pass_that_does_not_compile_is_plain_too(capsys):
    def fail(graph, inputs):
        raise RuntimeError("no backward pass")

    network, inputs = nn.Sequential(nn.Linear(3, 5), nn.GELU()), torch.randn(2, 3)
    expected = gradients(network, network(inputs).sum())
    model = ParallelModel(network, ONE, compile="on")
    model.begin(1)
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=fail)
    network.compile(backend=backend)
    found = gradients(network, model(inputs).sum())
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert not model.compiled
    assert "no backward pass" in capsys.readouterr().err


def test_plainly__batches_of_other_sizes_are_not_compiled():
    network, sizes = nn.Linear(3, 3), []

    def keep(graph, inputs):
        sizes.append(len(inputs[-1]))
        return graph.forward

    model = ParallelModel(network, ONE, compile="on")
    model.begin(1)
    network.compile(backend=keep)
    model(torch.zeros(4, 3))
    with model.plainly():
        network(torch.zeros(7, 3))
    model(torch.zeros(4, 3))
    assert len(sizes) == 1


@pytest.mark.parametrize(("written", "meant"), [("false", "off"), ("true", "on"), ("on", "on"), ("auto", "auto")])
def test_compile__files_of_earlier_runs_and_yamls_own_words_are_understood(tmp_path, written, meant):
    (tmp_path / "run.yaml").write_text(f"compile: {written}\n")
    settings = settings_of("pretrain", data="shapes", preset="quick", config=str(tmp_path / "run.yaml"))
    assert settings.run.compile == meant


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler, about itself
@pytest.mark.parametrize("preset", ["quick", "quick-convmae"])
def test_compile__a_run_has_the_losses_of_the_plain_one_and_is_compiled_once(unchecked, tmp_path, colours, preset):
    losses = {}
    counters = torch._dynamo.utils.counters
    for mode in ("off", "on"):
        counters.clear()
        line = ["pretrain", "--preset", preset, "--data", str(colours), "--out", str(tmp_path / mode)]
        line += ["--steps", "6", "--batch_size", "8", "--device", "cpu", "--workers", "0", "--compile", mode]
        assert main([*line, "--monitor.log_every", "1", "--monitor.evals", "2", "--model.depth", "1"]) == 0
        lines = [json.loads(text) for text in (tmp_path / mode / "metrics.jsonl").read_text().splitlines()]
        losses[mode] = [line["loss"] for line in lines if "loss" in line]
        assert counters["stats"]["unique_graphs"] == (mode == "on")
        assert not counters["graph_break"]
        assert (tmp_path / mode / "backbone.safetensors").is_file()
    assert len(losses["on"]) == 6
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)
