"""Training over hosts that are network namespaces of this machine, with real faults.

The others of its kind, all launchers and all faults, are measured by tools/inject_host_faults.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from host_faults import (
    FAULT_STEP,
    WATCH,
    end,
    launch,
    rank_killed,
    ranks_left,
    supervisor_record,
    wait_all,
    wait_for_step,
)
from netns_hosts import Hosts, make_hosts, why_not
from runs import KEEP_ALL, differences

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts here: {why_not()}"),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with make_hosts(2, tmp_path / "hosts") as made:
        yield made


def test_a_killed_rank_is_named_and_the_run_goes_on(
    hosts: Hosts, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    """On the same hosts, from the last checkpoint, to the very bits of a run without a fault."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [config_file, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3", *WATCH]
    processes = launch(hosts, "supervise", hosts.nodes, arguments, log)
    try:
        wait_for_step(processes, run_dir, FAULT_STEP, 120)
        with rank_killed(hosts, "node2", run_dir, 1):
            assert wait_all(processes, 240) == [0], log.read_text()
        assert ranks_left(hosts) == []
    finally:
        end(hosts, processes)
    record = supervisor_record(run_dir)
    (failure,) = [line for line in record if line["event"] == "end of attempt"][:-1]
    assert failure["kind"] == "rank" and failure["host"] == "node2" and failure["rank"] == 1
    assert "rank 1 on node2 (pid " in str(failure["text"])
    assert "was killed by SIGKILL" in str(failure["text"])
    assert f"supervisor: {failure['text']}" in log.read_text()
    assert [line["world_size"] for line in record if line["event"] == "attempt"] == [2, 2]
    assert differences(finished_run_2_ranks, run_dir) == []
