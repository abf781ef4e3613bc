"""What a configuration will hold, send and take on a cluster, reckoned before anything starts."""

from bitscale.plan.gpus import GPUS, find_gpu
from bitscale.plan.layout import Cluster, make_layout
from bitscale.plan.memory import checkpoint_bytes
from bitscale.plan.report import DEFAULT_EFFICIENCY, DEFAULT_USABLE, Plan, make_plan, to_tree
from bitscale.plan.search import Found, search
from bitscale.plan.show import show, show_ranking

__all__ = [
    "DEFAULT_EFFICIENCY",
    "DEFAULT_USABLE",
    "GPUS",
    "Cluster",
    "Found",
    "Plan",
    "checkpoint_bytes",
    "find_gpu",
    "make_layout",
    "make_plan",
    "search",
    "show",
    "show_ranking",
    "to_tree",
]
