"""Set-up of all tests: shapes and types of every public signature are checked while they run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from jaxtyping import install_import_hook

install_import_hook("dmjd", "beartype.beartype")

import torch

torch.set_num_threads(1)
