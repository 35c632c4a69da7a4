"""Hours, parts of a step and communication follow from the work by rules that are written down."""

from dataclasses import replace

import pytest

from dmjd.planning.estimate import Job, Pace, assume, look_ahead, send, split
from dmjd.planning.gpus import Device, find_device
from dmjd.planning.trial import Timed, Trial
from dmjd.planning.work import Footprint, Work

WORK = Work(
    parameters={"encoder": 90_000_000, "decoder": 10_000_000},
    teachers=0,
    forward=1e11,
    flops=3e11,
    weights=400_000_000,
    gradients=400_000_000,
    states=800_000_000,
    stepping=0,
    footprint=Footprint(image=100e6, fixed=0.0, passing=0.0),
)
JOB = Job(
    steps=1000,
    batch_size=1024,
    accumulation=1,
    image_bytes={"files": 1e5, "prepared": 2e5},
    parallel="ddp",
    network=25e9,
    storage=2e9,
    price=2.0,
)
SPEED = Pace(image=1e-3, step=0.01, utilisation=0.3)
H100 = find_device("h100")


def test_look_ahead__hours_and_cost_follow_from_images_and_steps() -> None:
    found = look_ahead(JOB, WORK, H100, SPEED, 1)
    assert found.step_seconds == pytest.approx(1.024 + 0.01)
    assert found.hours == pytest.approx(1000 * 1.034 / 3600)
    assert (found.device_hours, found.cost) == (found.hours, 2 * found.hours)
    assert found.images_per_second == pytest.approx(1024 / 1.034)
    assert found.storage["files"] == pytest.approx(1e5 * found.images_per_second)
    assert found.storage["prepared"] == pytest.approx(2e5 * found.images_per_second)
    assert found.cores["files"] == pytest.approx(found.images_per_second / 538)
    four = look_ahead(JOB, WORK, H100, SPEED, 4)
    assert four.device_hours == pytest.approx(4 * four.hours)
    assert found.hours / 4 < four.hours < found.hours / 3.8
    assert look_ahead(replace(JOB, price=None), WORK, H100, SPEED, 4).cost is None


def test_assume__is_the_share_of_the_peak_and_the_memory_that_the_optimizer_moves() -> None:
    speed = assume(WORK, H100, "bf16", 0.5)
    assert speed == Pace(image=3e11 / (0.5 * 989e12), step=32e8 / 3.35e12, utilisation=0.5)
    assert assume(WORK, Device(name="another", memory=1e9), "bf16", 0.5) is None


def test_split__takes_the_fewest_parts_that_fit_and_divide() -> None:
    room = WORK.memory(200, accumulation=2) / 0.85
    small = replace(H100, memory=room)
    share, largest, parts = split(JOB, WORK, small, 1)
    assert (share, largest, parts) == (1024, 200, 8)  # 6 parts would fit and do not divide
    assert split(JOB, WORK, small, 8) == (128, 200, 1)  # of DDP the copy to send, instead of the sum of parts
    assert split(replace(JOB, accumulation=16), WORK, small, 1)[2] == 16


def test_send__is_the_ring_over_the_slower_link() -> None:
    assert send(JOB, WORK, H100, 1, 1) == 0
    assert send(JOB, WORK, H100, 8, 1) == pytest.approx(2 * 7 / 8 * 4e8 / 450e9)
    assert send(JOB, WORK, H100, 16, 1) == pytest.approx(2 * 15 / 16 * 4e8 / 200e9)  # eight networks of a machine
    fsdp = replace(JOB, parallel="fsdp")
    assert send(fsdp, WORK, H100, 8, 2) == pytest.approx(5 * 7 / 8 * 4e8 / 450e9)
    assert send(JOB, WORK, Device(name="another", memory=1e9), 8, 1) is None


def test_look_ahead__what_the_backward_pass_does_not_hide_is_waited_for() -> None:
    slow = replace(H100, link=1e9)
    found = look_ahead(JOB, WORK, slow, SPEED, 8)
    backward = 128e-3 * 2 / 3
    assert found.sent == pytest.approx(0.7)
    assert found.hidden == pytest.approx(backward / 0.7)
    assert found.step_seconds == pytest.approx(0.128 + 0.01 + 0.7 - backward)
    assert found.breaks[0] == "communication is not fully hidden"


@pytest.mark.parametrize(
    ("devices", "device", "first"),
    [
        (2048, H100, "fewer images than devices"),
        (3, H100, "the batch is not divisible"),
        (1, replace(H100, memory=1e9), "out of memory"),
        (256, H100, "fewer than 8 images at a time"),
    ],
)
def test_look_ahead__says_what_breaks_first(devices: int, device: Device, first: str) -> None:
    outlook = look_ahead(JOB, WORK, device, SPEED, devices)
    assert outlook.breaks[0] == first
    assert outlook.fits == (first != "out of memory")


def test_look_ahead__storage_that_is_too_slow_is_named() -> None:
    assert look_ahead(replace(JOB, storage=1e6), WORK, H100, SPEED, 1).breaks == ["storage above 0.001 GB/s"]
    assert look_ahead(JOB, WORK, H100, SPEED, 1).breaks == []


def test_trial__tells_the_time_of_an_image_from_that_of_a_step() -> None:
    trial = Trial(Timed(2, 1.0, None), Timed(8, 2.5, None), largest=8)
    assert (trial.image, trial.step) == (0.25, 0.5)
    alone = Trial(Timed(1, 3.0, None), Timed(1, 3.0, None), largest=1)
    assert (alone.image, alone.step) == (3.0, 0.0)
