"""Ranks that mpirun or srun started, in the terms of other launchers (RANK, WORLD_SIZE, ...)."""

import importlib
import os
import re
import socket
from collections.abc import MutableMapping

from bitscale.errors import ConfigError

# Of Open MPI, and of MPICH, Intel MPI and their relatives.
_STARTED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# SLURM_PROCID alone says nothing: it is also there for a lone process in a batch script.
_SLURM_VARIABLE = "BITSCALE_RANKS"
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def adopt_ranks(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what torchrun would have set, under mpirun, or under srun with BITSCALE_RANKS=slurm; else
    do nothing.

    Raises ConfigError if what started this process does not say enough.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables:
        return
    if variables.get(_SLURM_VARIABLE) == "slurm":
        _adopt_slurm(variables)
    elif any(name in variables for name in _STARTED_BY_MPI):
        _adopt_mpi(variables)


def _adopt_slurm(variables: MutableMapping[str, str]) -> None:
    missing = [name for name in (*_SLURM.values(), "MASTER_ADDR") if name not in variables]
    if missing:
        raise ConfigError(
            f"{_SLURM_VARIABLE}=slurm, but {', '.join(missing)} is not set; start with "
            "launch/slurm.sbatch, or with srun --ntasks-per-node and MASTER_ADDR"
        )
    for ours, its in _SLURM.items():
        # Slurm writes "8(x4)" for 8 tasks on each of 4 nodes.
        variables[ours] = re.sub(r"\(x\d+\)$", "", variables[its])
    variables.setdefault("MASTER_PORT", "29500")


def _adopt_mpi(variables: MutableMapping[str, str]) -> None:
    """Ranks, ranks of this host, and the first rank's name and a free port there come from MPI
    itself; MASTER_ADDR and MASTER_PORT win if they are set."""
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"mpirun started this, and mpi4py, by which ranks find each other, fails: {error}; "
            "pip install 'bitscale[mpi]', or use launch/torchrun.sh"
        ) from None
    world = mpi.COMM_WORLD
    host = world.Split_type(mpi.COMM_TYPE_SHARED)
    meeting_point = world.bcast((socket.gethostname(), _free_port()))
    variables["RANK"], variables["WORLD_SIZE"] = str(world.rank), str(world.size)
    variables["LOCAL_RANK"], variables["LOCAL_WORLD_SIZE"] = str(host.rank), str(host.size)
    variables.setdefault("MASTER_ADDR", str(meeting_point[0]))
    variables.setdefault("MASTER_PORT", str(meeting_point[1]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
