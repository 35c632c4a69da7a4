"""What the tests of faults share: a few images, and a tiny run on them that nothing has disturbed."""

from pathlib import Path

import pytest
from test_faults import flags, write_images

from dmjd.cli import main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 64)


@pytest.fixture(scope="session")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main(flags(data, out)) == 0
    return out
