"""The locked versions are those of one set that every range of pyproject.toml admits."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
GROUPS = (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
WANTED = {text for group in GROUPS for text in group if not text.startswith("dmjd[")}


@pytest.mark.parametrize("text", sorted(WANTED))
def test_lock__every_range_of_the_project_admits_the_locked_version(text: str) -> None:
    wanted = Requirement(text)
    assert wanted.specifier.contains(LOCKED[canonicalize_name(wanted.name)])


def test_lock__has_one_exact_version_of_each_package() -> None:
    assert len(LOCKED) == len(LINES) > len(WANTED)
    assert all(version and set(version) <= set("0123456789.") for version in LOCKED.values()), "no local builds"
