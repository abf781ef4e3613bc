"""Of several files: the CPU's kernels and what makes their faults show; pretended sweeps."""

from collections.abc import Iterator
from pathlib import Path

import pretended_runs
import pytest
import torch

from bitscale.quant import kernels


@pytest.fixture(scope="module")
def cpu() -> kernels.Kernels:
    return kernels.get_kernels("cpu", "cpu")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, and the largest value of an integer dtype."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def make(tmp_path: Path) -> pretended_runs.Make:
    return pretended_runs.maker(tmp_path)
