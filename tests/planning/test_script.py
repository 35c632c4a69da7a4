"""The run of a plan as a script."""

import pytest

from dmjd.errors import ConfigError
from dmjd.planning.script import machines, slurm


def test_machines__have_equally_many_devices():
    assert machines(5) == (1, 5)
    assert machines(12) == (2, 6)
    with pytest.raises(ConfigError, match="17 devices on 3 machines of 8; --devices; give a multiple of 3, such as 15"):
        machines(17)


def test_slurm__the_signal_goes_to_the_steps_and_the_cores_too():
    script = slurm(["dmjd", "pretrain"], 16, hours=10.0, cores=64, out="runs/a")
    assert 'scancel --signal=TERM "$SLURM_JOB_ID"' in script
    assert 'SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in script
