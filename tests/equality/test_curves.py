"""Ten steps of every training verb give the losses they gave before the trainers became one."""

import json

import pytest
import runs

STORED = json.loads(runs.STORED.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.paint(folder)
    return folder


@pytest.mark.parametrize("name", runs.COMMANDS)
def test_losses__are_those_of_the_stored_run_to_the_last_bit(name, data, tmp_path):
    curve = runs.curve(name, data, tmp_path / name)
    if runs.machine() == STORED["machine"]:
        assert curve == STORED["curves"][name]
    else:  # another processor or torch: other last bits
        assert [line.keys() for line in curve] == [line.keys() for line in STORED["curves"][name]]
        for line, stored in zip(curve, STORED["curves"][name], strict=True):
            assert line == pytest.approx(stored, rel=1e-3)
