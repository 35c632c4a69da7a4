"""Devices are found by name, and what is listed is whole."""

from pathlib import Path

import pytest

from dmjd.errors import ConfigError
from dmjd.planning import gpus
from dmjd.planning.gpus import SHEETS, find_device, listed


def test_listed__every_gpu_has_its_numbers_and_a_source() -> None:
    assert {
        "t4",
        "v100",
        "a10",
        "l4",
        "a100-40",
        "a100-80",
        "rtx4090",
        "l40s",
        "h100",
        "h200",
        "b200",
        "mi300x",
    } == set(listed())
    for device in listed().values():
        assert device.source.startswith("https://")
        assert device.memory >= 16 * 2**30
        assert device.fp32
        assert device.bandwidth
        assert device.link
        assert device.bf16 is None or device.bf16 > device.fp32
        assert device.usable < device.memory
    assert SHEETS.is_file()


def test_find_device__without_units_for_bf16_products_are_those_of_float32() -> None:
    assert (find_device("T4").has_bf16, find_device("h100").has_bf16) == (False, True)
    assert find_device("t4").peak("bf16") == find_device("t4").fp32
    assert find_device("h100").peak("fp32") == find_device("h100").fp32 < find_device("h100").peak("bf16")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_find_device__a_cpu_has_the_memory_of_its_container(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "LIMITS", tmp_path)
    (tmp_path / "memory").mkdir()
    whole = find_device("cpu").memory
    for limit, memory in (("max", whole), (f"{2**63 - 4096}", whole), (f"{2**28}", 2**28)):
        (tmp_path / name).write_text(f"{limit}\n")
        assert find_device("cpu").memory == memory


def test_find_device__a_cpu_is_timed() -> None:
    cpu = find_device("cpu")
    assert cpu.kind == "cpu"
    assert cpu.fp32
    assert cpu.fp32 > 1e8


@pytest.mark.parametrize(
    ("name", "meant"),
    [("h10", "did you mean h100?"), ("A100", "did you mean a100-40 or a100-80?"), ("xyz", "mi300x, cpu")],
)
def test_find_device__another_name_is_refused_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match="--device") as raised:
        find_device(name)
    assert meant in str(raised.value)
