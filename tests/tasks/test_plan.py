"""`dmjd plan` says what a run costs, in numbers, on a page, and as a script that a shell can run."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import dmjd
from dmjd.cli import main
from dmjd.errors import ConfigError
from dmjd.planning.gpus import listed
from dmjd.reports.plan import write_plan

TINY = shlex.split(
    "--preset dm --model.image_size 32 --model.patch_size 8 --model.embed_dim 32 --model.depth 1 --model.num_heads 2 "
    "--decoder.embed_dim 16 --decoder.num_heads 2 --decoder.depth 1 --batch_size 256"
)


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is printed."""
    assert main(["plan", *TINY, *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_plan__prints_a_page_with_all_that_a_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    page = plan(capsys, "--images", 12_800, "--epochs", 3, "--device", "h100", "--devices", 8, "--price", 2)
    assert "12,800 images, 3 epochs, batch 256: 150 steps on 8 x h100, bf16" in page
    for word in ("NETWORK", "MEMORY", "TIME", "AROUND", "MORE DEVICES", "OTHER DEVICES", "assumed", "cost"):
        assert word in page
    assert "times the" not in page
    assert all(re.search(rf"^  {name} ", page, flags=re.MULTILINE) for name in listed())
    assert re.search(r"^  1,024 .* fewer images than devices$", page, flags=re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 120


def test_plan__a_backbone_of_its_own_shape_has_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "mae", "--model.backbone", "timm:test_vit", "--model.image_size", "160", "--images", "9"]
    assert main(["plan", *words, "--device", "t4"]) == 0
    assert capsys.readouterr().out.startswith("mae: timm:test_vit, 160 px, ")


def test_plan__its_line_of_json_is_what_python_returns(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(plan(capsys, "--images", 1000, "--device", "a100-40", "--json", "--price", 3))
    given = dict(zip([word[2:].replace(".", "__") for word in TINY[::2]], TINY[1::2], strict=True))
    returned = dmjd.plan(1000, device="a100-40", price=3, json=True, **given)
    assert returned.out is None
    capsys.readouterr()
    assert json.loads(json.dumps(returned.numbers)) == printed
    assert printed["plan"]["cost"] == pytest.approx(3 * printed["plan"]["device_hours"])
    assert printed["steps"] == 1562  # 400 epochs of 1000 images, 256 in a step
    same = next(row for row in printed["gpus"] if row["name"] == "a100-40")
    assert same["hours"] == printed["plan"]["hours"]


def test_plan__counts_and_weighs_the_images_of_a_folder(colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(plan(capsys, "--data", colours, "--device", "l4", "--json"))
    sizes = [file.stat().st_size for file in (colours / "train").rglob("*.png")]
    assert printed["images"] == len(sizes) == 24
    assert printed["image_bytes"] == pytest.approx(sum(sizes) / len(sizes))
    per_second = printed["plan"]["images_per_second"]
    assert printed["plan"]["storage"]["files"] == pytest.approx(printed["image_bytes"] * per_second)
    assert printed["disk"]["files"] == pytest.approx(sum(sizes))


def test_plan__of_a_large_set_says_its_steps_beside_the_recipes_and_what_storage_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large = ["--images", 50_000_000, "--device", "h100", "--devices", 8]
    printed = json.loads(plan(capsys, *large, "--json"))
    recipe = printed["recipe"]
    assert recipe["steps"] == round(400 * 1_281_167 / 512)
    assert recipe["times"] == pytest.approx(400 * 50_000_000 / 256 / recipe["steps"])
    assert printed["prepared_size"] == round(32 * 256 / 224)
    assert printed["disk"] == pytest.approx({"files": 50e6 * 110e3, "prepared": 50e6 * 37**2 * 4 / 3 * 3})
    page = write_plan(printed)
    assert "That is 78.1 times the 1,000,912 steps of dm on ImageNet; --epochs 5.12 has as many." in page
    assert re.search(r"^  storage .* MB/s \(above 2 GB/s\), by 110 kB an image; ", page, flags=re.MULTILINE)
    assert re.search(r"^  on disk     5,500 GB; ", page, flags=re.MULTILINE)
    assert re.search(r"^  reads .* a second, .* tar shards", page, flags=re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 120


def test_plan__for_a_cpu_a_teacher_of_the_visible_branch_is_not_read_to_choose_a_precision(
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = Path(__file__).parents[1] / "fixtures" / "vit.safetensors"
    visible = ["--visible.weight", 1, "--visible.target", teacher]
    printed = json.loads(plan(capsys, "--images", 1000, "--device", "cpu", *visible, "--json"))
    assert printed["precision"] in ("bf16", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "hours"), [([], 101), (["--model.backbone", "vit", "--epochs", "800"], 132)])
def test_plan__published_hours_are_near_those_at_the_default_utilisation(
    flags: list[str], hours: float, capsys: pytest.CaptureFixture[str]
) -> None:
    of_imagenet = ["--images", "1281167", "--device", "a100-40", "--devices", "8", "--json"]
    assert main(["plan", *flags, *of_imagenet]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["hours"] == pytest.approx(hours, rel=0.15)


def test_plan__with_measure_it_trains_here_and_plans_with_that(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(plan(capsys, "--images", 1000, "--device", "cpu", "--measure", 0.5, "--json"))
    small, large = (printed["measured"]["steps"] * 2)[:2]
    assert large["batch"] >= small["batch"] >= 1
    assert printed["measured"]["largest"] <= 256
    assert printed["speed"]["measured"]
    assert printed["speed"]["utilisation"] > 0
    step = printed["speed"]["step"] + large["batch"] * printed["speed"]["image"]
    assert step == pytest.approx(large["seconds"], rel=0.01)
    page = write_plan(printed)
    assert "MEASURED here" in page
    assert "of the peak (measured)" in page


def test_plan__the_device_of_another_machine_is_not_measured() -> None:
    with pytest.raises(ConfigError, match="h100 is not the device of this machine"):
        dmjd.plan(1000, preset="quick", device="h100", measure=1)


OWN = "--crop.scale 0.3 0.9 --crop.no-flip --model.reg_tokens 2 --optim.blr 1e-3 --teacher.layers 1 --teacher.layers 2"


@pytest.mark.parametrize("kind", ["slurm", "torchrun"])
def test_plan__a_script_has_the_run_as_it_was_planned(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*OWN.split(), "--parallel", "fsdp", "--data", "a set", "--out", str(tmp_path / "run")]
    around = ["--images", 9000, "--device", "h100", "--devices", 16, "--script", kind]
    script = plan(capsys, *flags, *around)
    found = re.search(r"-m dmjd pretrain ((?:.*\\\n)*.*)", script)
    assert found
    assert main(["pretrain", *shlex.split(found[1].removesuffix(" &").replace("\\\n", "")), "--print_config"]) == 0
    of_script = capsys.readouterr().out
    assert main(["pretrain", *TINY, *flags, "--resume", "--print_config"]) == 0
    assert of_script == capsys.readouterr().out
    assert "--nproc-per-node 8" in script
    assert f"\nmkdir -p {tmp_path}/run" in script, "without it, there is nothing to resume"
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    if kind == "slurm":
        assert all(words in script for words in ("--nodes=2", "B:USR1@", 'scontrol requeue "$SLURM_JOB_ID"'))


def test_plan__a_batch_that_does_not_fit_is_split_in_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(TINY).replace("image_size 32", "image_size 256").replace("batch_size 256", "batch_size 65536")
    large = ["plan", *words.split(), "--images", "1000000", "--device", "t4"]
    assert main([*large, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["plan"]
    assert printed["accumulation"] > 1
    assert printed["images"] // printed["accumulation"] <= printed["largest"]
    assert main([*large, "--script", "torchrun"]) == 0
    assert f"--optim.accumulation {printed['accumulation']} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--images"),
        ({"images": 9, "device": "h10"}, "did you mean h100"),
        ({"images": 9, "preset": "auto"}, "--config"),
        ({"images": 9, "devices": 3}, "batch_size 512 is no multiple of 3 devices"),
        ({"images": 9, "masking__mask_ratio": 0.999, "device": "h100"}, "mask_ratio"),
        ({"images": 9, "utilisation": 2}, "utilisation 2.0"),
    ],
)
def test_plan__a_mistake_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        dmjd.plan(**given)
    assert "\n" not in str(raised.value)
