"""HOG targets against the plain formulation: seconds in turns, and peak memory over the images' own in float32.

python benchmarks/hog.py [--threads 2] [--batch_size 64] [--image_size 224] [--pairs 9]

The plain formulation has every intermediate result at the size of the batch, as the official program has: gradients,
magnitudes and angles in degrees, for each of the nine bins the magnitudes that belong there, and then the cells' means.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dmjd.targets.hog import hog_cells


@torch.no_grad()
def plain_cells(images: Tensor) -> Tensor:
    """Compute the cells (B, C, h, w, 9) of `hog_cells`, step by step over the whole batch."""
    pixels = images.float()
    rows, columns = torch.zeros_like(pixels), torch.zeros_like(pixels)
    rows[..., 1:-1, :] = pixels[..., 2:, :] - pixels[..., :-2, :]
    columns[..., 1:-1] = pixels[..., 2:] - pixels[..., :-2]
    magnitude = torch.hypot(rows, columns)
    degrees = torch.rad2deg(torch.atan2(rows, columns)) % 180
    of_bins = [torch.where((degrees >= 20 * n) & (degrees < 20 * (n + 1)), magnitude, 0) for n in range(9)]
    return F.avg_pool2d(torch.stack(of_bins, dim=2).flatten(1, 2), 8).unflatten(1, (-1, 9)).movedim(2, -1)


def peak_memory(function: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Measure the most that torch's allocator holds beside the images, over the size of the images in float32."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(images)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / (4 * images.numel())


def seconds(function: Callable[[Tensor], Tensor], images: Tensor) -> float:
    began = time.perf_counter()
    function(images)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("batch_size", 64), ("image_size", 224), ("pairs", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    images = torch.randint(0, 256, (settings.batch_size, 3, settings.image_size, settings.image_size)).byte()
    torch.testing.assert_close(hog_cells(images), plain_cells(images))
    pairs = [(seconds(hog_cells, images), seconds(plain_cells, images)) for _ in range(settings.pairs)]
    ours, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    print("| HOG | seconds, median | memory, times the images |\n|---|---|---|")
    print(f"| here | {ours:.3f} | {peak_memory(hog_cells, images):.1f} |")
    print(f"| plain | {plain:.3f} | {peak_memory(plain_cells, images):.1f} |")
    print(f"\nratio: {statistics.median(ratios):.1f} ({ratios[0]:.1f} .. {ratios[-1]:.1f}), {settings.pairs} pairs")


if __name__ == "__main__":
    main()
