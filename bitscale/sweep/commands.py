"""The printed back end: the commands that train what remains, in an order that works."""

import shlex
from collections.abc import Sequence

from bitscale.config import to_tree
from bitscale.sweep.schedule import Schedule
from bitscale.sweep.trunks import run_config
from bitscale.sweep.worker import Task, train_arguments


def command_list(schedule: Schedule, launcher: Sequence[str] = ("python",)) -> list[str]:
    """Shell lines; a run that another begins at comes before it. Configurations are written.

    `bitscale sweep ... --report` collects what the commands have trained.
    """
    lines = []
    # Trunks never begin at other runs: two waves.
    for run in sorted(schedule.remaining(), key=lambda run: run.fork is not None):
        directory = str(schedule.store.run_dir(run.key))
        begun = run.fork is None or schedule.has_own(run)
        resume = "auto" if begun else str(schedule.store.checkpoint(*run.fork))  # type: ignore[misc]
        trunk = None if run.fork is None else schedule.runs[run.fork.trunk]
        other = trunk is not None and trunk.cfg.quant != run.cfg.quant
        tree = to_tree(run_config(run, directory))
        allow = ("quant",) if other else ()
        task = Task(run.key, tree, directory, resume, allow, (), {}, True)
        lines.append(shlex.join([*launcher, *train_arguments(task)]))
    return lines
