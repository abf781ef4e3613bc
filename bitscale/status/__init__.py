"""The state of runs, from what they leave on disk: metrics, heartbeats, checkpoints. No torch."""

from bitscale.status.read import RankStatus, RunStatus, find_runs, read_status
from bitscale.status.show import as_json, show_runs, show_status
from bitscale.status.stacks import write_stacks

__all__ = [
    "RankStatus",
    "RunStatus",
    "as_json",
    "find_runs",
    "read_status",
    "show_runs",
    "show_status",
    "write_stacks",
]
