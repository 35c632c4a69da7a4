"""Work and memory of one pre-training step of the hybrid: visible rows against the plain dense form.

    python benchmarks/work.py --size base

Counts FLOPs of forward and backward (torch's counter: two a multiply-add) and the bytes of saved activations, both for
an image with its two views; they depend on shapes alone, not on the machine.
"""

import argparse

import torch
from dense_convvit import dense_form
from torch.utils.flop_counter import FlopCounterMode

import dmjd


def measure(model: torch.nn.Module, images: torch.Tensor, masked: torch.Tensor) -> tuple[float, float]:
    """GFLOPs of a step, and MB (10^6 bytes) of activations saved for the backward pass."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images, masked).total
        megabytes = sum(saved.values()) / 1e6
        loss.backward()
    return counter.get_total_flops() / 1e9, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--images", type=int, default=1)
    arguments = parser.parse_args()
    images = torch.randint(0, 256, (arguments.images, 3, 224, 224), dtype=torch.uint8)
    print(f"ConvViT {arguments.size}, 224 px, 2 views, decoder of 8 blocks, forward + backward, an image\n")
    print("| masks | form | GFLOP | saved activations, MB |")
    print("|---|---|---|---|")
    for name, block, mask_ratio in (("block 0.6", 2, 0.6), ("random 0.75", 1, 0.75)):
        masked = dmjd.block_masks(arguments.images, (14, 14), block=block, num_views=2, mask_ratio=mask_ratio)
        for form in ("visible rows", "dense"):
            model = dmjd.build("dmjd", arguments.size)
            flops, megabytes = measure(dense_form(model) if form == "dense" else model, images, masked)
            print(
                f"| {name} | {form} | {flops / arguments.images:.0f} | {megabytes / arguments.images:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
