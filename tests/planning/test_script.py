"""The run of a plan as a script."""

import subprocess

import pytest

from dmjd.errors import ConfigError
from dmjd.planning.script import machines, slurm, torchrun


def test_machines__have_equally_many_devices():
    assert machines(5) == (1, 5)
    assert machines(12) == (2, 6)
    with pytest.raises(ConfigError, match="17 devices on 3 machines of 8; --devices; give a multiple of 3, such as 15"):
        machines(17)


def test_torchrun__two_runs_on_a_machine_have_a_port_each_and_several_machines_the_one_that_is_said():
    one, two = (torchrun(["dmjd", "pretrain"], devices, out="runs/a") for devices in (4, 16))
    assert "torchrun --nproc-per-node 4 --standalone -m dmjd pretrain" in one
    assert "--standalone" not in two
    assert "${FIRST:?}:29500" in two


def test_slurm__the_signal_goes_to_the_steps_and_the_cores_too():
    script = slurm(["dmjd", "pretrain"], 16, hours=10.0, cores=64, out="runs/a")
    assert 'scancel --signal=TERM "$SLURM_JOB_ID"' in script
    assert 'SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in script


def test_slurm__two_jobs_on_a_machine_have_a_port_each_and_what_a_cluster_asks_for_has_a_line():
    script = slurm(["dmjd", "pretrain"], 16, hours=10.0, cores=64, out="runs/a")
    given = next(line for line in script.splitlines() if line.startswith("port="))
    ports = [
        int(subprocess.check_output(["bash", "-c", f"SLURM_JOB_ID={job}; {given}; echo $port"]))
        for job in (7, 81230008)
    ]
    assert ports == [20007, 20008]
    assert '--rdzv-endpoint "$first:$port"' in script
    comments = [line for line in script.splitlines() if line.startswith(("##SBATCH", "# source"))]
    for word in ("--account=", "--partition=", "--mem=", "activate"):
        assert any(word in line for line in comments)


@pytest.mark.parametrize(("hours", "asked"), [(0.1, 1), (10.0, 12), (300.0, 24)])
def test_slurm__a_job_asks_for_a_fifth_more_than_the_hours_planned_and_for_a_day_at_most(hours, asked):
    script = slurm(["dmjd", "pretrain"], 16, hours=hours, cores=64, out="runs/a")
    assert f"--nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64\n#SBATCH --time={asked}:00:00" in script
