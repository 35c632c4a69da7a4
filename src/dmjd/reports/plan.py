"""The page of a plan, in plain text: the cost of a run, and the assumptions behind it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
MANY_TIMES = 3  # multiple of the recipe's steps from which the page warns of a long run
MANY_READS = 1000  # files a second that a shared file system (Lustre, NFS) may not be able to open; a judgement


def write_plan(found: Mapping[str, Any]) -> str:
    """Write the page of a plan."""
    return "\n\n".join(
        "\n".join(part)
        for part in (
            _run(found),
            _network(found["work"]),
            _memory(found),
            _time(found),
            *([_measured(found)] if found["measured"] else []),
            _surroundings(found),
            _scaling(found),
            _gpus(found),
            _assumptions(found),
        )
    )


def _run(found: Mapping[str, Any]) -> list[str]:
    recipe = found["recipe"]
    longer = (
        f"That is {short(recipe['times'])} times the {recipe['steps']:,} steps of {found['preset']} on ImageNet; "
        f"--epochs {recipe['epochs']:.3g} has as many."
    )
    return [
        f"{found['preset']}: {found['network']}, {found['image_size']} px, {found['views']} views that hide "
        f"{found['mask_ratio']:.0%}, target {found['target']}",
        f"{found['images']:,} images, {found['epochs']:.4g} epochs, batch {found['batch_size']}: "
        f"{found['steps']:,} steps on {found['plan']['devices']} x {found['device']['name']}, {found['precision']}",
        *([longer] if recipe["times"] >= MANY_TIMES else []),
    ]


def _network(work: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {number / 1e6:.1f} M" for name, number in work["parameters"].items())
    return [
        "NETWORK",
        f"  parameters  {work['trained'] / 1e6:.1f} M are trained: {parts}",
        f"  an image    {work['flops'] / 1e9:.1f} GFLOP forward and backward, of them forward and targets "
        f"{work['forward'] / 1e9:.1f}",
    ]


def _memory(found: Mapping[str, Any]) -> list[str]:
    work, plan, device = found["work"], found["plan"], found["device"]
    footprint = work["footprint"]
    at_a_time = plan["images"] // plan["accumulation"]
    rows = {
        "weights": work["weights"],
        "gradients": work["gradients"],
        "optimizer": work["states"],
        "teachers": work["teachers"],
        "weight copies": footprint["fixed"],  # mostly in bf16
        "an image": footprint["image"] + footprint["passing"],
    }
    fits = f"{plan['largest']} images at a time fit" if plan["largest"] else "not one image fits"
    return [
        "MEMORY of a device",
        *(f"  {name:<16}{size / MIB:>9,.0f} MiB" for name, size in rows.items() if size > MIB / 2),
        f"  {fits}, with {1 - device['usable'] / device['memory']:.0%} of {device['memory'] / GIB:.0f} GiB to spare",
        f"  {plan['images']} images a step and device, {at_a_time} at a time (--optim.accumulation "
        f"{plan['accumulation']}): {plan['memory'] / GIB:.1f} GiB",
    ]


def _time(found: Mapping[str, Any]) -> list[str]:
    plan, speed = found["plan"], found["speed"]
    how = "measured" if speed["measured"] else "assumed; --measure SECONDS tries it on this machine's device"
    share = "unknown" if speed["utilisation"] is None else f"{speed['utilisation']:.0%} of the peak"
    cost = "" if plan["cost"] is None else f", cost {plan['cost']:,.2f}"
    return [
        "TIME",
        f"  utilisation {share} ({how})",
        f"  a device    {short(plan['images_per_second'])} images/s; a step {plan['step_seconds']:.3g} s",
        f"  the run     {short(plan['hours'])} h, {short(plan['device_hours'])} device-hours{cost}",
    ]


def _measured(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{each['batch']}",
            f"{each['seconds']:.3g}",
            f"{each['flops'] / 1e12:.3g}",
            "" if each["utilisation"] is None else f"{each['utilisation']:.0%}",
            "" if each["memory"] is None else f"{each['memory'] / MIB:,.0f}",
            f"{each['counted'] / MIB:,.0f}",
        )
        for each in found["measured"]["steps"]
    ]
    heads = ("images", "s a step", "TFLOP/s", "of peak", "MiB", "counted MiB")
    return [f"MEASURED here; {found['measured']['largest']} images at a time were tried", *table(heads, rows)]


def _surroundings(found: Mapping[str, Any]) -> list[str]:
    plan = found["plan"]
    cores, disk, reads = plan["cores"], found["disk"], plan["devices"] * plan["images_per_second"]
    storage = {
        kind: f"{each / 1e6:,.0f} MB/s" + f" (above {found['storage'] / 1e9:g} GB/s)" * (each > found["storage"])
        for kind, each in plan["storage"].items()
    }
    shards = "; on a shared file system rather from tar shards than from files" if reads >= MANY_READS else ""
    lines = [
        "AROUND THE DEVICES: from files as they are; after dmjd prepare --size " + str(found["prepared_size"]),
        f"  storage     {storage['files']}, by {found['image_bytes'] / 1e3:,.0f} kB an image; {storage['prepared']}",
        f"  on disk     {short(disk['files'] / 1e9)} GB; {short(disk['prepared'] / 1e9)} GB",
        f"  decoding    {cores['files']:,.1f} cores; {cores['prepared']:,.1f} cores",
        f"  reads       {reads:,.0f} a second, in random order{shards}",
    ]
    if plan["sent"] is None:
        lines.append("  between     no link is known")
    elif plan["sent"]:
        share = f"{plan['hidden']:.0%} of it hidden"
        lines.append(f"  between     {plan['sent'] * 1e3:,.1f} ms a step ({found['parallel']}), {share}")
    return lines


def _scaling(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{each['devices']:,}",
            f"{each['images']}",
            f"{each['accumulation']}",
            short(each["hours"]),
            short(each["device_hours"]),
            next(iter(each["breaks"]), ""),
        )
        for each in found["scaling"]
    ]
    heads = ("devices", "images each", "parts", "hours", "device-hours", "breaks first")
    return [f"MORE DEVICES, batch {found['batch_size']}", *table(heads, rows)]


def _gpus(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            each["name"],
            each["precision"],
            f"{each['largest']}",
            f"{each['images_per_second']:,.0f}",
            short(each["hours"]),
            short(each["device_hours"]),
            next(iter(each["breaks"]), ""),
        )
        for each in found["gpus"]
    ]
    heads = ("device", "precision", "images fit", "images/s", "hours", "device-hours", "breaks first")
    return [f"OTHER DEVICES, {found['plan']['devices']} of each, by their data sheets", *table(heads, rows)]


def _assumptions(found: Mapping[str, Any]) -> list[str]:
    hides = "all passes" if found["parallel"] == "fsdp" else "the backward pass of the last part"
    return [
        "Counted: FLOP by torch's counter (two a multiply-add; products, convolutions, attention) and memory, on the",
        "network itself, uncompiled, with tensors that have no memory. Assumed: utilisation, where not measured; eight",
        f"devices a machine, {found['network_bandwidth'] / 1e9:g} GB/s a device between machines; they send in rings,",
        f"and {hides} hides it. Not counted: evaluations, checkpoints, the start, waiting for images.",
    ]


def short(number: float) -> str:
    """Format a number with two digits, or with all digits before the decimal point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Format a table; all columns except the first and the last are right-aligned, since they are numbers."""
    cells = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    last = len(heads) - 1
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
