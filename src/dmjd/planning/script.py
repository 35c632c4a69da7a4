"""A plan as a script: the run under torchrun, on one machine or by SLURM."""

import math
import shlex
from collections.abc import Sequence

from dmjd.errors import ConfigError
from dmjd.planning.estimate import IN_A_MACHINE

LONGEST = 24  # hours of a job, after which another one continues
MARGIN = 1.2  # job hours per planned hour
NOTICE = 300  # seconds before its end when a job is told to save
PORT = 29500
PORTS = 20000  # first of 10,000 ports for SLURM jobs, since two jobs may share a machine
MOST_WIDE = 110


def machines(devices: int) -> tuple[int, int]:
    """Distribute devices over machines: returns the number of machines, and of devices in each.

    Raises:
        ConfigError: If some machines would have more devices than others.
    """
    nodes = math.ceil(devices / IN_A_MACHINE)
    if devices % nodes:
        even = f"give a multiple of {nodes}, such as {devices - devices % nodes}"
        raise ConfigError(f"{devices} devices on {nodes} machines of {IN_A_MACHINE}; --devices; {even}")
    return nodes, devices // nodes


def torchrun(command: Sequence[str], devices: int, *, out: str) -> str:
    """Write the script for one machine, or to be started on each of several; arguments as in `slurm`."""
    nodes, each = machines(devices)
    launch = ["torchrun", "--nproc-per-node", str(each)]
    head = ["#!/bin/bash", "set -e", f"mkdir -p {shlex.quote(out)}  # --resume wants it"]
    if nodes > 1:
        head += [f"# Start this on each of {nodes} machines; FIRST is the name of one of them."]
        launch += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id", "dmjd"]
        launch += ["--rdzv-endpoint", f"${{FIRST:?}}:{PORT}"]
    else:
        launch.append("--standalone")  # at a port that is free: there may be another run on the machine
    return "\n".join([*head, folded([*launch, "-m", *map(shlex.quote, command)]), ""])


def slurm(command: Sequence[str], devices: int, *, hours: float, cores: int, out: str) -> str:
    """Write the script for SLURM, which requeues its job until the run is finished.

    Args:
        command: The command after `python -m`, with --resume.
        devices: Devices in total.
        hours: Hours of the run.
        cores: Cores of a machine.
        out: Directory of the run.
    """
    nodes, each = machines(devices)
    limit = max(min(math.ceil(hours * MARGIN), LONGEST), 1)
    launch = ["srun", "torchrun", "--nnodes", '"$SLURM_NNODES"', "--nproc-per-node", str(each), "--rdzv-backend"]
    launch += ["c10d", "--rdzv-endpoint", '"$first:$port"', "--rdzv-id", '"$SLURM_JOB_ID"']
    return f"""#!/bin/bash
#SBATCH --job-name=dmjd --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={each} --cpus-per-task={cores}
#SBATCH --time={limit}:00:00 --signal=B:USR1@{NOTICE} --requeue --open-mode=append
# What many clusters ask for beside that; take one of the two # away:
##SBATCH --account=ACCOUNT --partition=PARTITION
##SBATCH --mem=0  # all of a machine's memory
# source ENVIRONMENT/bin/activate  # where torchrun and dmjd are
mkdir -p {shlex.quote(out)}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({PORTS} + SLURM_JOB_ID % 10000))

# {NOTICE} s before its time is over, the job has the run save and asks for another job, which goes on: --resume.
again=
# The signal goes to the steps by SLURM: srun itself would kill them at once.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={NOTICE - 60} SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{folded([*launch, "-m", *map(shlex.quote, command)])} &
running=$!
wait "$running"  # until the run ends or the signal comes
code=$?
if [ -n "$again" ]; then
  wait "$running"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def folded(words: Sequence[str]) -> str:
    """Break a command into lines of readable length; words are already quoted, and a flag stays with its values."""
    lines: list[str] = []
    for word in words:
        if lines and (not word.startswith("-") or len(lines[-1]) + len(word) < MOST_WIDE - 20):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n  ".join(lines)
