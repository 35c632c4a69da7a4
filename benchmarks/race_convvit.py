"""Seconds of one pre-training step of the hybrid: visible rows against the plain dense form, in turns.

    python benchmarks/race_convvit.py --size base --batch_size 8 --precision fp32
    python benchmarks/race_convvit.py --size base --batch_size 8 --precision bf16 --profile

The two forms share their weights and see the same images and masks; the table gives the medians over the pairs and the
median and spread of the ratio. `--profile` adds where the time of a step on visible rows goes.
"""

import argparse
import statistics
import time

import torch
from dense_convvit import dense_form
from torch.profiler import ProfilerActivity, profile

import dmjd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--masks", default="block", choices=("block", "random"), help="block 0.6 or random 0.75")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    model = dmjd.build("dmjd", arguments.size).to(device)
    models = {"visible": model, "dense": dense_form(model)}
    images = torch.randint(0, 256, (arguments.batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
    block, mask_ratio = (2, 0.6) if arguments.masks == "block" else (1, 0.75)
    masked = dmjd.block_masks(arguments.batch_size, (14, 14), block=block, num_views=2, mask_ratio=mask_ratio)

    def step(form: str) -> float:
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = models[form](images, masked).total
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    pairs = []
    for turn in range(arguments.pairs + 1):
        forms = ("visible", "dense") if turn % 2 else ("dense", "visible")
        seconds = {form: step(form) for form in forms}
        if turn:  # the first turn warms up
            pairs.append((seconds["visible"], seconds["dense"]))
    ratios = sorted(dense / visible for visible, dense in pairs)
    visible, dense = (statistics.median(column) for column in zip(*pairs, strict=True))
    print("| model | masks | precision | threads | visible rows | dense | ratio, median (min .. max) |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.size}, batch {arguments.batch_size} | {arguments.masks} {mask_ratio} | {arguments.precision} "
        f"| {torch.get_num_threads()} | {visible:.2f} s | {dense:.2f} s "
        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}) |"
    )
    if arguments.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step("visible")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


if __name__ == "__main__":
    main()
