"""Ranks under srun and mpirun get the variables that torchrun would have set."""

import sys

import pytest

from bitscale.errors import ConfigError
from bitscale.ranks import adopt_ranks

pytestmark = pytest.mark.unit

SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "8(x2)",
    "MASTER_ADDR": "node1",
}


def test_slurm_only_when_asked_for() -> None:
    variables = dict(SLURM)
    adopt_ranks(variables)
    assert variables == SLURM  # a lone process in a batch script
    variables["BITSCALE_RANKS"] = "slurm"
    adopt_ranks(variables)
    found = {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    assert variables["LOCAL_WORLD_SIZE"] == "8"


def test_what_slurm_leaves_out_is_named() -> None:
    variables = {**SLURM, "BITSCALE_RANKS": "slurm"}
    del variables["MASTER_ADDR"], variables["SLURM_LOCALID"]
    with pytest.raises(ConfigError, match="SLURM_LOCALID, MASTER_ADDR is not set; start with"):
        adopt_ranks(variables)


def test_another_launchers_ranks_stay() -> None:
    variables = {"RANK": "3", "OMPI_COMM_WORLD_SIZE": "2", "BITSCALE_RANKS": "slurm"}
    before = dict(variables)
    adopt_ranks(variables)
    assert variables == before


def test_mpirun_without_mpi4py_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"mpi4py, .* pip install 'bitscale\[mpi\]'"):
        adopt_ranks({"OMPI_COMM_WORLD_SIZE": "2"})
