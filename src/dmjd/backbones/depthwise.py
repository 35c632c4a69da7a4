"""Depthwise convolution of sparse maps, whose present positions are the rows of a matrix, in two implementations.

On maps: rows are scattered into maps of zeros, which are convolved; the result is gathered at the same positions.
On rows, with Triton on a GPU: a table maps each place to its row, and only rows that exist are read.

The second accumulates in float32 (float64 for float64 input), in the same order at every call.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from dmjd.errors import one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # on a Mac, or with torch for CPUs alone
    triton = None

BORDER = 2  # around each map in a table: the reach of a 5 x 5 window
ROWS, BLOCK = 32, 64  # rows and channels per Triton program; 64 channels of bf16 fill one cache line
PARTS = 512  # maximum number of partial sums over the rows, for the gradient of the weights


class Table(NamedTuple):
    """A look-up from places to rows, for kernels that read the neighbours of a row.

    Every map has an empty border; without it, a window that leaves a map would wrap to its other edge or the next map.
    """

    rows: Int[Tensor, " P"]  # index of the row at each place, or -1
    places: Int[Tensor, " S"]  # place of each row
    width: int  # of a map, including the border


@dataclass(frozen=True)
class Layout:
    """Where the rows of a stage lie in the maps of N views; map positions without a row are zero."""

    places: Int[Tensor, " S"]
    num_maps: int | torch.SymInt  # symbolic while the network is exported or compiled
    height: int
    width: int
    table: Table | None = None  # present for the implementation on rows

    def for_its_device(self) -> "Layout":
        """Choose the implementation: on rows if Triton works, which needs less memory traffic at any mask ratio.

        The choice does not depend on timings: the two round differently, so runs of one command could differ.
        """
        device = self.places.device
        if triton is None or device.type != "cuda":  # exports to other formats are traced on a CPU
            return self
        runs = torch.compiler.is_compiling() or _runs(device)  # torch.compile itself needs Triton on a GPU
        return self.on_rows() if runs else self

    def on_rows(self, border: int = BORDER) -> "Layout":
        """Add the table, for windows that reach no further than the border."""
        height, width = self.height + 2 * border, self.width + 2 * border
        line = self.places // self.width  # numbered across all maps
        places = (line + line // self.height * 2 * border + border) * width + self.places % self.width + border
        rows = torch.arange(len(places), dtype=torch.int32, device=places.device)
        rows = rows.new_full((self.num_maps * height * width,), -1).index_copy(0, places, rows)
        return replace(self, table=Table(rows, places.int(), width))

    def to_map(self, rows: Float[Tensor, "S D"]) -> Float[Tensor, "N D H W"]:
        """Scatter rows into maps of zeros (channels last in memory)."""
        empty = rows.new_zeros(self.num_maps * self.height * self.width, rows.shape[1])
        full = empty.index_copy(0, self.places, rows)
        return full.view(self.num_maps, self.height, self.width, -1).permute(0, 3, 1, 2)

    def to_rows(self, maps: Float[Tensor, "N D H W"]) -> Float[Tensor, "S D"]:
        """Gather the rows from maps."""
        return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).index_select(0, self.places)


def nested_positions(grid: tuple[int, int], side: int, device: torch.device | None = None) -> Int[Tensor, "L s"]:
    """Return the raster index, in the whole map, of each token's side x side positions in nested order."""
    rows, columns = grid
    numbers = torch.arange(rows * columns * side * side, device=device).view(rows, side, columns, side).transpose(1, 2)
    if side == 4:  # (half row, row, half column, column) -> (half row, half column, row, column)
        numbers = numbers.reshape(rows, columns, 2, 2, 2, 2).transpose(3, 4)
    return numbers.reshape(rows * columns, side * side)


def layout_of(tokens: Int[Tensor, "N K"], grid: tuple[int, int], side: int) -> Layout:
    """Lay out the positions of the given tokens of every map, token by token."""
    height, width = grid[0] * side, grid[1] * side
    positions_NKs = nested_positions(grid, side, tokens.device)[tokens]
    maps_N = height * width * torch.arange(tokens.shape[0], device=tokens.device)
    places = (positions_NKs + maps_N[:, None, None]).flatten()
    return Layout(places, tokens.shape[0], height, width)


def depthwise(rows: Tensor, weight: Tensor, bias: Any, layout: Layout) -> Float[Tensor, "S D"]:
    """Convolve rows; without gradients, use only torch's own operators, because torch.jit and vmap know no others."""
    form = DepthwiseOnRows.apply if torch.is_grad_enabled() else convolve
    return form(rows, weight, bias, layout)


def convolve(rows: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Float[Tensor, "S D"]:
    """Convolve with the layout's implementation; the padding preserves the size of the maps."""
    if layout.table:
        return convolved(rows, weight, bias, layout.table)
    weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
    padding = [side // 2 for side in weight.shape[2:]]
    return layout.to_rows(F.conv2d(layout.to_map(rows), weight, bias, padding=padding, groups=len(weight)))


class DepthwiseOnRows(torch.autograd.Function):
    """A depthwise convolution of the maps that the rows lie in, evaluated at those rows.

    On maps, the backward pass rebuilds the maps instead of saving them, and computes the gradient of the weights in
    the weights' own precision: that is more accurate, and on CPUs twice as fast as the bf16 kernel.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(rows, weight)
        ctx.layout = layout
        return convolve(rows, weight, bias, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Compute the gradients of rows, weight and bias."""
        (rows, weight), layout = ctx.saved_tensors, ctx.layout
        flipped, of_bias = weight.flip(2, 3), gradient.sum(0, dtype=weight.dtype)
        if layout.table:
            of_weight = correlated(rows, gradient, weight, layout.table)
            return convolved(gradient, flipped, None, layout.table), of_weight, of_bias, None
        padding, groups = [side // 2 for side in weight.shape[2:]], len(weight)
        full, gradient_map = layout.to_map(rows), layout.to_map(gradient)
        of_map = F.conv2d(gradient_map, flipped.to(rows.dtype), padding=padding, groups=groups)
        of_weight = conv2d_weight(
            full.to(weight.dtype), weight.shape, gradient_map.to(weight.dtype), padding=padding, groups=groups
        )
        of_weight = of_weight.clone(memory_format=torch.contiguous_format)  # DDP compares even the stride of size 1
        return layout.to_rows(of_map), of_weight, of_bias, None


@cache
def _runs(device: torch.device) -> bool:
    """Test whether Triton works on a GPU (it needs a C compiler) and agrees with the implementation on maps."""
    wave = torch.arange(300, dtype=torch.float32, device=device).sin()
    maps = Layout(torch.arange(0, 40, 3, device=device), 2, 4, 5)  # 14 rows
    found = []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for layout in (maps, maps.on_rows()):
                given = [each.clone().requires_grad_() for each in (wave[:42].view(14, 3), wave[-75:].view(3, 1, 5, 5))]
                out = DepthwiseOnRows.apply(*given, wave[:3], layout)
                found.append([out, *torch.autograd.grad(out.square().sum(), given)])
        torch.testing.assert_close(*found, rtol=0.02, atol=0.02)  # maps are rounded to TF32
    except Exception as error:  # Triton raises many types
        reason = one_line(error, 200)
        print(f"warning: no Triton on {device} ({reason}); convolutions compute hidden tokens, too", file=sys.stderr)
        return False
    return True


def convolved(rows: Tensor, weight: Tensor, bias: Tensor | None, table: Table) -> Tensor:
    """Convolve rows (S, D) with weights (D, 1, side, side), in Triton."""
    rows, (count, dim), side = rows.contiguous(), rows.shape, weight.shape[-1]
    taps = weight.flatten(1).t().to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
    out, grid = torch.empty_like(rows), (-(-count // ROWS), -(-dim // BLOCK))
    with torch.cuda.device(rows.get_device()):  # Triton launches on the current device, wherever the tensors are
        _convolve[grid](
            rows, taps, bias, table.rows, table.places, out, count, dim, table.width, SIDE=side, ROWS=ROWS, BLOCK=BLOCK
        )
    return out


def correlated(rows: Tensor, gradient: Tensor, weight: Tensor, table: Table) -> Tensor:
    """Compute the gradient of weights (D, 1, side, side) from rows and the output gradient (S, D), in Triton."""
    rows, gradient, (count, dim), side = rows.contiguous(), gradient.contiguous(), rows.shape, weight.shape[-1]
    each, lanes = -(-count // PARTS), 1 << (side * side - 1).bit_length()
    parts = rows.new_empty(-(-count // each), side * side, dim, dtype=torch.promote_types(weight.dtype, torch.float32))
    with torch.cuda.device(rows.get_device()):
        _correlate[len(parts), -(-dim // BLOCK)](
            rows, gradient, *table[:2], parts, count, dim, table.width, each, SIDE=side, LANES=lanes, BLOCK=BLOCK
        )
    return parts.sum(0).t().contiguous().view_as(weight).to(weight.dtype)


if triton:

    @no_type_check
    @triton.jit
    def _convolve(  # 12 parameters: a kernel takes no objects
        values,
        taps,
        bias,
        rows,
        places,
        out,
        count,
        dim,
        width,
        SIDE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Sum all taps for a block of rows and channels."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_row, is_channel = row < count, channel < dim
        place = tl.load(places + row, is_row, other=0)
        total = tl.full((ROWS, BLOCK), 0, taps.dtype.element_ty)
        if bias is not None:
            total += tl.load(bias + channel, is_channel, other=0)
        for y in range(SIDE):  # not unrolled: the loads of 25 taps would use up the registers
            for x in tl.static_range(SIDE):
                at = place + (y - SIDE // 2) * width + x - SIDE // 2
                near = tl.load(rows + at, is_row, other=-1).to(tl.int64)[:, None]  # times dim it may exceed 2^31
                value = tl.load(values + near * dim + channel, (near >= 0) & is_channel, other=0)
                total += value.to(total.dtype) * tl.load(taps + (y * SIDE + x) * dim + channel, is_channel, other=0)
        tl.store(out + row.to(tl.int64)[:, None] * dim + channel, total, is_row[:, None] & is_channel)

    @no_type_check
    @triton.jit
    def _correlate(  # 12 parameters: a kernel takes no objects
        values,
        grads,
        rows,
        places,
        parts,
        count,
        dim,
        width,
        each,
        SIDE: tl.constexpr,
        LANES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Sum one part of the rows, row by row, for all taps of a block of channels: no reduction across threads."""
        part, channel = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tap = tl.arange(0, LANES)[:, None]  # LANES is a power of two, so some lanes are idle
        is_tap, is_channel = tap < SIDE * SIDE, channel < dim
        away = (tap // SIDE - SIDE // 2) * width + tap % SIDE - SIDE // 2
        total = tl.full((LANES, BLOCK), 0, parts.dtype.element_ty)
        first = part.to(tl.int64) * each
        for row in tl.range(first, tl.minimum(first + each, count), loop_unroll_factor=4):
            near = tl.load(rows + tl.load(places + row) + away, is_tap, other=-1).to(tl.int64)
            value = tl.load(values + near * dim + channel, (near >= 0) & is_channel, other=0)
            grad = tl.load(grads + row * dim + channel, is_channel, other=0)
            total += value.to(total.dtype) * grad.to(total.dtype)
        tl.store(parts + (part * SIDE * SIDE + tap) * dim + channel, total, is_tap & is_channel)
