"""The depthwise convolution reads visible rows alone, by Triton, and equals the one on whole maps."""

import inspect
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from functorch.compile import make_boxed_func
from jaxtyping import config as shape_checks
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from dmjd.backbones import depthwise
from dmjd.backbones.convvit import create_convvit
from dmjd.backbones.depthwise import DepthwiseOnRows, Layout, layout_of
from dmjd.masking import disjoint_masks, token_ids

triton = pytest.importorskip("triton")
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as source_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

KERNELS = ("_convolve", "_correlate")
GRID = (2, 3)
TOKENS = {
    "two views": [[0, 2, 4], [1, 3, 5]],
    "in any order": [[5, 0, 4], [3, 2, 1]],
    "one of a map": [[4], [0]],
    "all": [[0, 1, 2, 3, 4, 5]],
}


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels on the CPU, program by program; rows are few, so that a part of them is made smaller, too."""
    for name in KERNELS:
        monkeypatch.setattr(depthwise, name, InterpretedFunction(getattr(depthwise, name).fn))
    monkeypatch.setattr(depthwise, "PARTS", 7)


def draw(count, dim, *, kernel=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count * dim)
    rows, gradient = torch.randn(2, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(dim, 1, kernel, kernel, generator=generator, dtype=exact)
    return rows, weight, torch.randn(dim, generator=generator, dtype=exact), gradient


def convolution(layout, rows, weight, bias, gradient):
    """Outputs, and gradients of rows, weight and bias."""
    given = [each.clone().requires_grad_() for each in (rows, weight, bias)]
    out = DepthwiseOnRows.apply(*given, layout)
    return out.detach(), *torch.autograd.grad(out, given, gradient)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("side", [2, 4])
def test_depthwise__on_rows_equals_on_maps(interpreted, tokens, side):
    layout = layout_of(torch.tensor(tokens), GRID, side)
    given = draw(len(layout.places), 6)
    for ours, theirs in zip(convolution(layout.on_rows(), *given), convolution(layout, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_depthwise__takes_any_odd_kernel_and_rows_and_channels_beside_blocks(interpreted, kernel):
    places = torch.randperm(3 * 5 * 7, generator=torch.Generator().manual_seed(0))[:37]
    layout, given = Layout(places, 3, 5, 7), draw(37, 70, kernel=kernel)
    on_rows = layout.on_rows(border=kernel // 2)
    torch.testing.assert_close(convolution(on_rows, *given), convolution(layout, *given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_depthwise__rounds_once_whatever_the_precision(interpreted, dtype, allowed):
    layout = layout_of(torch.tensor(TOKENS["two views"]), GRID, 4)
    given = draw(len(layout.places), 16, dtype=dtype)
    exact = convolution(layout, *(each.double() for each in given))
    found = convolution(layout.on_rows(), *given)
    for ours, theirs, like in zip(found, exact, (given[0], *given[:3]), strict=True):
        assert ours.dtype == like.dtype
        most = allowed if like.dtype == dtype else 1e-6
        assert (ours.double() - theirs).norm() <= most * theirs.norm()


def test_depthwise__takes_gradients_that_are_not_contiguous(interpreted):
    layout = layout_of(torch.tensor(TOKENS["two views"]), GRID, 2)
    rows, weight, bias, _ = draw(len(layout.places), 6)
    for gradient in (torch.ones(1).double().expand(rows.shape), rows.t().contiguous().t()):
        found = convolution(layout.on_rows(), rows, weight, bias, gradient)
        torch.testing.assert_close(found, convolution(layout, rows, weight, bias, gradient))


def test_hybrid__on_rows_has_the_latents_and_gradients_of_the_one_on_maps(interpreted, monkeypatch):
    torch.manual_seed(0)
    encoder = create_convvit("tiny", image_size=(32, 48), embed_dim=16, depth=1, num_heads=2).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens = token_ids(disjoint_masks(2, 6, num_views=2, mask_ratio=0.5))
    results = []
    for choose in (Layout.for_its_device, Layout.on_rows):
        monkeypatch.setattr(Layout, "for_its_device", choose)
        encoder.zero_grad()
        latents = encoder(images, tokens).visible
        latents.square().mul(torch.linspace(1, 2, 16)).sum().backward()
        gradients = [each.grad.clone() for each in encoder.parameters() if each.grad is not None]
        results.append((latents.detach(), gradients))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_depthwise__without_triton_there_are_maps(monkeypatch):
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    spec = spec_from_file_location("dmjd_without_triton", depthwise.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    places = torch.arange(6)
    layout = module.Layout(places, 1, 2, 3).for_its_device()
    given = draw(6, 4)
    found = module.DepthwiseOnRows.apply(*given[:3], layout)
    assert torch.equal(found, convolution(Layout(places, 1, 2, 3), *given)[0])


def test_for_its_device__is_maps_on_a_cpu():
    layout = layout_of(torch.tensor(TOKENS["all"]), GRID, 4)
    assert layout.for_its_device().table is None


def test_runs__is_true_where_kernels_run(interpreted, capsys):
    assert depthwise._runs.__wrapped__(torch.device("cpu"))
    assert not capsys.readouterr().err


def test_runs__is_false_where_they_compute_something_else(interpreted, monkeypatch, capsys):
    exact = depthwise.correlated
    monkeypatch.setattr(depthwise, "correlated", lambda *given: 1.1 * exact(*given))
    assert not depthwise._runs.__wrapped__(torch.device("cpu"))
    assert "not close" in capsys.readouterr().err


def test_runs__says_once_where_they_do_not(capsys):
    assert not depthwise._runs(torch.device("cpu"))
    assert not depthwise._runs(torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no Triton on cpu")


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the checks of shapes, which only tests have: they are no part of what is compiled."""
    shape_checks.update("jaxtyping_disable", True)
    for name in ("__init__", "on_rows"):
        monkeypatch.setattr(Layout, name, inspect.unwrap(getattr(Layout, name)))
    torch.compiler.reset()
    yield
    shape_checks.update("jaxtyping_disable", False)


class Hopper:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def test_depthwise__on_rows_is_one_graph_with_its_gradients(unchecked, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)  # as on a GPU
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.kwargs["kwargs"].keys() for node in graph.graph.nodes if "triton" in str(node.target)])
        return make_boxed_func(graph.forward)

    def step(rows, weight, bias, places):
        return DepthwiseOnRows.apply(rows, weight, bias, Layout(places, 2, 8, 12).on_rows())

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with FakeTensorMode():  # tensors without numbers: there is nothing to launch the kernels
        sizes = [(60, 70), (70, 1, 5, 5), (70,)]
        given = [torch.empty(size, requires_grad=True) for size in sizes]
        out = torch.compile(step, fullgraph=True, backend=backend)(*given, torch.empty(60, dtype=torch.long))
        out.sum().backward()
    assert [each.grad.shape for each in given] == [torch.Size(size) for size in sizes]
    assert [len(kernels) for kernels in graphs] == [1, 2]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels__are_whole_in_the_program_that_torch_compile_writes(name, tmp_path):
    written = source_of(getattr(depthwise, name))
    path = tmp_path / "kernel.py"
    path.write_text(f"import triton\nimport triton.language as tl\n@triton.jit\n{written}")  # all that it can name
    spec = spec_from_file_location("kernel", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, name)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels__compile_for_gpus_that_are_not_there(architecture, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"SIDE": 5, "ROWS": depthwise.ROWS, "BLOCK": depthwise.BLOCK, "LANES": 32}
    types = {"taps": "*fp32", "bias": "*fp32", "parts": "*fp32", "rows": "*i32", "places": "*i32"}
    types |= dict.fromkeys(("values", "grads", "out"), f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    for name in KERNELS:
        kernel = getattr(depthwise, name)
        signature = {each: types.get(each, "i32") for each in kernel.arg_names}
        used = {(kernel.arg_names.index(each),): value for each, value in constants.items() if each in signature}
        program = triton.compile(ASTSource(kernel, signature, used), target=GPUTarget("cuda", architecture, 32))
        assert program.asm["cubin"]
