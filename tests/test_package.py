"""What is published is whole: an sdist, the wheel made of it, and what the wheel installs."""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent


def build(kind, source, folder):
    """Build an sdist or a wheel as a frontend would."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is made of the sdist, which is made of a copy of the sources: building leaves files there."""
    folder = tmp_path_factory.mktemp("package")
    copytree(ROOT / "src", folder / "copy" / "src", ignore=ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        copy(ROOT / name, folder / "copy")
    (folder / "copy" / "tests").mkdir()
    copy(__file__, folder / "copy" / "tests")
    build("sdist", folder / "copy", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert not [name for name in file.getnames() if "/tests" in name]
        file.extractall(folder, filter="data")
    build("wheel", folder / archive.name.removesuffix(".tar.gz"), folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel__has_every_file_of_the_package_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = next(file.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "dmjd").rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".pyc")} == {name for name in names if "dist-info" not in name}
    assert {"dmjd/py.typed", "dmjd/presets/auto.yaml", "dmjd/reports/templates/pretrain.html"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_wheel__works_in_an_environment_of_its_own(wheel, tmp_path):
    new = tmp_path / "new"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", new], check=True)
    pip = [sys.executable, "-m", "pip", "--python", new / "bin" / "python", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    # The libraries of this environment, without its own dmjd: .pth files there are not read.
    (site,) = (new / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    def says(*words):
        return subprocess.run([new / "bin" / words[0], *words[1:]], cwd=tmp_path, capture_output=True, text=True).stdout

    assert Path(says("python", "-c", "import dmjd; print(dmjd.__file__)")).is_relative_to(new)
    assert says("dmjd", "--version").strip() == version("dmjd")
    assert "--masking.num_views" in says("dmjd", "pretrain", "--help")
    assert "preset: mae" in says("dmjd", "pretrain", "--preset", "mae", "--data", "photos", "--print_config")


def test_dockerfile__copies_what_is_there_and_is_not_ignored():
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    copied = {name for words in lines if words[:1] == ["COPY"] and "--from" not in words[1] for name in words[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert [name for name in copied if not (ROOT / name).exists()] == []
