"""Lines that a run begins with."""

import pytest

from bitscale.announcement import host_lines

pytestmark = pytest.mark.unit


def test_ranks_are_said_by_host() -> None:
    assert host_lines(["node1"] * 8) == []
    assert host_lines(["node1", "node2"]) == ["hosts: rank 0 on node1, rank 1 on node2"]
    eight = [name for name in ("node1", "node2", "node3") for _ in range(8)]
    assert host_lines(eight, per_line=2) == [
        "hosts: ranks 0 to 7 on node1, ranks 8 to 15 on node2",
        "hosts: ranks 16 to 23 on node3",
    ]
    # mpirun --map-by node deals them out.
    dealt = ["node1", "node2", "node1", "node2"]
    assert host_lines(dealt) == ["hosts: ranks 0 2 on node1, ranks 1 3 on node2"]
