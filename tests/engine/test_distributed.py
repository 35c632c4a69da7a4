"""One rank or two, copied or shared out: the same run."""

import json
import os
import signal
import socket
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from prefork import start_ranks
from ranks import Case, run
from safetensors.torch import load_file

from dmjd.cli import main
from dmjd.engine.device import choose_device
from dmjd.engine.distributed import Ranks, device_of, join_ranks
from dmjd.errors import ConfigError

SCRIPT = Path(__file__).with_name("ranks.py")
CASES = [("vit", "hog", "ddp"), ("convvit", "ema", "fsdp")]
ALL_CASES = list(product(("vit", "convvit"), ("hog", "ema"), ("ddp", "fsdp")))  # `make test-all`
RESUMED = [(0, "ddp"), (0, "fsdp")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(22):
        pixels = np.random.default_rng(number).integers(0, 255, (34, 38, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return str(folder)


def train(root, alone, together):
    """Train some cases on one rank, in this process, and others on two."""
    file = root / f"cases-{len([*root.glob('cases-*')])}.json"
    file.write_text(json.dumps(together))
    ranks = start_ranks([file], SCRIPT)
    for case in alone:
        run(Case(**case), Ranks(choose_device("cpu")))
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said


def equal_cases(root, images, chosen):
    """The same runs on one rank and on two."""
    alone, together = {}, []
    for (backbone, target, parallel), (dtype, steps) in product(chosen, (("float64", 20), ("float32", 10))):
        name = f"{backbone}-{target}-{dtype}"
        case = {"data": images, "backbone": backbone, "target": target, "dtype": dtype, "steps": steps}
        alone[name] = case | {"out": f"{root}/1-{name}"}
        together.append(case | {"out": f"{root}/2-{name}-{parallel}", "parallel": parallel})
    return [*alone.values()], together


def train_and_resume(root, images, chosen, alone=(), together=()):
    """Break runs off on one rank and take them up on two, and the other way round; beside them, train other cases."""
    stops = {"data": images, "target": "hog+ema", "steps": 14, "saves": 2}
    one, two = [*alone, stops | {"out": f"{root}/1-unbroken"}], [*together]
    one_again, two_again = [], []
    for workers, parallel in chosen:
        broken = stops | {"workers": workers, "parallel": parallel, "crash_after": 9}
        whole = stops | {"workers": workers, "parallel": parallel, "resume": True}
        there, back = {"out": f"{root}/1-2-{workers}-{parallel}"}, {"out": f"{root}/2-1-{workers}-{parallel}"}
        one.append(broken | there)
        two.append(broken | back)
        two_again.append(whole | there)
        one_again.append(whole | back)
    train(root, one, two)
    train(root, one_again, two_again)
    return root


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """All runs of `make test`."""
    root = tmp_path_factory.mktemp("runs")
    one, two = equal_cases(root, images, CASES)
    parts = {"data": images, "steps": 6, "accumulation": 2, "clip_grad": 0.5}
    one.append(parts | {"out": f"{root}/1-parts"})
    two += [parts | {"out": f"{root}/2-parts-{parallel}", "parallel": parallel} for parallel in ("ddp", "fsdp")]
    return train_and_resume(root, images, RESUMED, one, two)


@pytest.fixture(scope="module")
def all_runs(images, tmp_path_factory):
    """Every backbone with every target, spread in every way, and runs with workers."""
    root = tmp_path_factory.mktemp("all-runs")
    return train_and_resume(root, images, [(2, "ddp"), (2, "fsdp")], *equal_cases(root, images, ALL_CASES))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "loss_masked", "loss_visible", "grad_norm")
    return torch.tensor([[line[key] for key in keys] for line in lines if "loss" in line], dtype=torch.float64)


def sample_ids(folder, world_size):
    """The images of every step from the first of the process on, over all ranks."""
    files = [folder / f"ids-{world_size}-{rank}.json" for rank in range(world_size)]
    (start, *_), parts = zip(*(json.loads(file.read_text()) for file in files), strict=True)
    return start, [[index for part in step for index in part] for step in zip(*parts, strict=True)]


def assert_equal(folder, other, tolerance):
    torch.testing.assert_close(losses(folder), losses(other), rtol=tolerance, atol=tolerance)


def assert_equal_weights(folder, other, tolerance):
    weights, others = (load_file(each / "weights.safetensors") for each in (folder, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        found = others[name]
        if name.endswith("qkv.bias"):
            # A bias of the keys shifts all scores of a query alike: its gradient is nothing but rounding, and Adam
            # divides it by itself. Queries and values have to agree.
            value, found = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, found))
        torch.testing.assert_close(value, found, rtol=tolerance, atol=tolerance, msg=name)


def assert_equal_runs(root, backbone, target, parallel):
    name = f"{backbone}-{target}-float64"
    assert len(losses(root / f"1-{name}")) == 20
    assert_equal(root / f"1-{name}", root / f"2-{name}-{parallel}", 1e-12)
    assert_equal_weights(root / f"1-{name}", root / f"2-{name}-{parallel}", 1e-12)
    name = f"{backbone}-{target}-float32"
    one, two = (losses(root / each)[:, :3] for each in (f"1-{name}", f"2-{name}-{parallel}"))
    assert len(one) == 10
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


@pytest.mark.long
@pytest.mark.parametrize(("backbone", "target", "parallel"), CASES)
def test_two_ranks__give_the_losses_and_weights_of_one(runs, backbone, target, parallel):
    assert_equal_runs(runs, backbone, target, parallel)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "target", "parallel"), ALL_CASES)
def test_two_ranks__give_the_losses_and_weights_of_one_whatever_is_trained(all_runs, backbone, target, parallel):
    assert_equal_runs(all_runs, backbone, target, parallel)


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks__with_accumulation_and_clipping_give_the_losses_of_one(runs, parallel):
    assert_equal(runs / "1-parts", runs / f"2-parts-{parallel}", 1e-12)
    assert_equal_weights(runs / "1-parts", runs / f"2-parts-{parallel}", 1e-12)


def assert_resumed(root, first, then, workers, parallel):
    folder, unbroken = root / f"{first}-{then}-{workers}-{parallel}", root / "1-unbroken"
    start, ids = sample_ids(folder, then)
    assert start == 7, "in the middle of an epoch, since 21 images are no whole number of steps of 8"
    assert ids == sample_ids(unbroken, 1)[1][start:]
    assert sample_ids(folder, first)[1][:start] == sample_ids(unbroken, 1)[1][:start]
    assert_equal(folder, unbroken, 1e-12)
    assert_equal_weights(folder, unbroken, 1e-12)


@pytest.mark.long
@pytest.mark.parametrize(("workers", "parallel"), RESUMED)
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_resume__on_another_number_of_ranks_goes_on_alike(runs, first, then, workers, parallel):
    assert_resumed(runs, first, then, workers, parallel)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "parallel"), [(2, "ddp"), (2, "fsdp")])
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_resume__with_workers_it_goes_on_alike(all_runs, first, then, workers, parallel):
    assert_resumed(all_runs, first, then, workers, parallel)


@pytest.mark.long
def test_fsdp__a_rank_holds_half_of_the_weights_and_ddp_all(runs):
    shares = {
        name: [json.loads((runs / name / f"share-{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("2-vit-hog-float64-ddp", "2-convvit-ema-float64-fsdp")
    }
    assert shares["2-vit-hog-float64-ddp"] == [1.0, 1.0]
    assert shares["2-convvit-ema-float64-fsdp"] == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_synchronized__ranks_average_gradients_in_the_last_part_of_a_step_alone(runs, parallel):
    assert json.loads((runs / f"accumulation-{parallel}.json").read_text()) == [False, True]


@pytest.mark.long
def test_checkpoints__have_the_same_tensors_whatever_the_ranks(runs):
    for one, two in (("1-vit-hog-float64", "2-vit-hog-float64-ddp"), ("1-parts", "2-parts-fsdp")):
        for file in ("model.safetensors", "optimizer.safetensors"):
            (first, second) = (load_file(max((runs / each / "checkpoints").iterdir()) / file) for each in (one, two))
            assert first.keys() == second.keys()
            for name, value in first.items():
                torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-9)
        assert {"encoder.backbone.blocks.0.attn.qkv.weight:exp_avg", "decoder.mask_token:step"} <= first.keys()


def test_join_ranks__without_torchrun_there_is_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks("cpu") as ranks:
        assert not torch.distributed.is_initialized()
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        assert ranks.agree(True, False) == [True, False]
        assert ranks.gather("it") == ["it"]
        assert list(ranks.share([1, 2, 3])) == [1, 2, 3]


def test_join_ranks__several_tasks_of_srun_without_torchrun_are_refused(monkeypatch, capsys, images, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    words = ["pretrain", "--preset", "quick", "--data", images, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: srun has started 8 processes that are not connected; ")
    assert "torchrun" in said
    assert "dmjd plan --script slurm" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(words) == 2
    assert "WORLD_SIZE is 2, but MASTER_ADDR or MASTER_PORT is not set; start by torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_ranks("cpu") as ranks:
        assert ranks.world_size == 1


def test_join_ranks__ranks_that_cannot_meet_are_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"^the processes do not meet .*variable RANK"), join_ranks("cpu"):
            pass
        monkeypatch.setenv("RANK", "0")
        with (
            pytest.raises(ConfigError, match=r"^the processes do not meet .*address already in use"),
            join_ranks("cpu"),
        ):
            pass


@pytest.mark.long
def test_two_ranks__the_first_walks_a_folder_and_the_other_takes_its_listing(images, tmp_path, monkeypatch):
    os.utime(images, (1e9, 1e9))
    monkeypatch.setenv("DMJD_DATA", str(tmp_path / "kept"))
    ranks = start_ranks([images, str(tmp_path)], Path(__file__).with_name("walks.py"))
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["1 21", "0 21"]


def test_join_ranks__without_memory_a_verb_ends_with_a_line():
    with pytest.raises(ConfigError, match=r"^out of memory .*; give a smaller --batch_size"), join_ranks("cpu"):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_join_ranks__a_gpu_that_is_named_is_the_current_one_meanwhile(monkeypatch, device, current):
    found = []

    @contextmanager
    def noted(device):
        found.append(str(device))
        yield
        found.clear()

    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=torch.device(device)))  # all GPUs
    monkeypatch.setattr(torch.cuda, "device", noted)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks(device) as ranks:
        assert ranks.device == torch.device(device)
        assert found == current
    assert not found


@pytest.mark.parametrize(
    ("kind", "device", "said"),
    [
        ("cuda", "auto", "more processes than GPUs on this machine, which has 4; --device auto; start one process for"),
        ("mps", "auto", "8 processes cannot communicate on mps; --device auto; choose cpu"),
        ("cuda", "cuda:1", "8 processes cannot share a device; --device cuda:1"),
    ],
)
def test_device_of__ranks_that_have_no_device_of_their_own_are_told_so(monkeypatch, kind, device, said):
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=torch.device(kind)))  # a GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match=f"^{said}"):
        device_of(4, 8, device)


def test_device_of__every_rank_has_the_gpu_of_its_place_on_the_machine(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of(11, 16, "auto") == torch.device("cuda:3")
    assert device_of(0, 1, "auto") == torch.device("cuda:0")


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(7, 1, 2), (6, 2, 2), (10, 4, 1)])
def test_micro_batch__a_batch_that_ranks_do_not_divide_is_a_configuration_error(batch_size, accumulation, world_size):
    ranks = Ranks(torch.device("cpu"), world_size=world_size)
    with pytest.raises(ConfigError, match=f"batch_size {batch_size}"):
        ranks.micro_batch(batch_size, accumulation)
    assert ranks.micro_batch(8 * accumulation * world_size, accumulation) == 8


@pytest.mark.long
@pytest.mark.parametrize("signalled", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_rank__all_save_and_leave_with_143(images, tmp_path, signalled):
    arguments = [
        "pretrain",
        "--preset",
        "quick",
        "--data",
        images,
        "--epochs",
        "100000",
        "--batch_size",
        "8",
        "--device",
        "cpu",
    ]
    arguments += ["--workers", "0", "--out", str(tmp_path / "run"), "--monitor.saves", "20000"]
    ranks = start_ranks(arguments)
    try:
        next(line for line in ranks[0].stderr if line.endswith("saved\n"))
        ranks[signalled].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [143, 143], outputs
    assert "go on with --resume" in outputs[0][1]
    assert outputs[1] == ("", "")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("broken", "code", "message"),
    [
        pytest.param(["--batch_size", "7"], 2, "batch_size 7 is no multiple of 2 processes", marks=pytest.mark.slow),
        (["--batch_size", "8", "--resume"], 4, "no checkpoint is intact"),  # rank 0 finds it, every rank is told
    ],
)
def test_two_ranks__an_error_ends_both_with_its_code_and_a_line(images, tmp_path, broken, code, message):
    if "--resume" in broken:
        (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    arguments = [
        "pretrain",
        "--preset",
        "quick",
        "--data",
        images,
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        *broken,
    ]
    ranks = start_ranks(arguments)
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [code, code], errors
    assert errors[0].startswith(f"error: {message}")
    assert errors[1].startswith(f"error (process 1): {message}")
    assert all(len(text.splitlines()) == 1 for text in errors)
