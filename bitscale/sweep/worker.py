"""One run in a process of its own, all it prints in `log.txt`.

The exit code is the whole answer. Processes are forked from a server that has imported torch and
DeepSpeed and done nothing else (`multiprocessing`'s forkserver): as isolated as `bitscale train`
started anew, without its seconds of imports.
"""

import os
import signal
import subprocess
import sys
import threading
import traceback
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.config import parse_config, to_yaml
from bitscale.errors import BitscaleError, TrainingFault
from bitscale.sweep.store import DIVERGED, FINISHED, LOG_NAME, write_json

OK, FAILED, BAD_INPUT, FAULT, STOPPED = 0, 1, 2, 3, 75
_FAULT_BEGINS = "error: loss is "  # as every TrainingFault does (bitscale/guard.py)
# Imported by the fork server: what `bitscale train` imports, and on CPU also what PyTorch's
# optimizers and DeepSpeed import when they are first used (4 of 5 s).
PRELOAD = ["bitscale.train"]
PRELOAD_ON_CPU = [*PRELOAD, "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]


class Task(NamedTuple):
    """A run that is to be started now; plain values, so that it travels to any process."""

    key: str
    tree: dict[str, Any]  # of its configuration
    directory: str
    resume: str | None
    allow_change: tuple[str, ...]
    launcher: tuple[str, ...]  # before `-m bitscale.cli.main`; empty: in this process
    provenance: dict[str, Any]  # for done.json
    reaches_end: bool  # False: a trunk that stops where the last fork begins


def work(task: Task) -> None:
    """Entry point of the process: run `task` and exit with its code."""
    os.setpgid(0, 0)  # Ctrl-C is for the scheduler, which tells us by SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    directory = Path(task.directory)
    directory.mkdir(parents=True, exist_ok=True)
    log = os.open(directory / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = run_task(task)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DeepSpeed's exit handlers have nothing to say


def run_task(task: Task) -> int:
    """Train, and write done.json if the run has come to its end. Returns one of the codes above."""
    code, message = (_launch(task), "") if task.launcher else _train(task)
    return _conclude(task, code, message)


def _conclude(task: Task, code: int, message: str) -> int:
    if task.reaches_end and code in (OK, FAULT):
        status = FINISHED if code == OK else DIVERGED
        content = {"status": status, "message": message, **task.provenance}
        write_json(Path(task.directory) / "done.json", content)
    return code


def _train(task: Task) -> tuple[int, str]:
    try:
        from bitscale.train import train  # torch and DeepSpeed: seconds, unless preloaded

        cfg = parse_config(task.tree, where=task.directory)
        outcome = train(cfg, resume=task.resume, allow_change=task.allow_change)
        return (STOPPED if outcome.preempted else OK), ""
    except TrainingFault as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return FAULT, str(error)
    except BitscaleError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT, str(error)
    except Exception:
        traceback.print_exc()
        return FAILED, ""


def _launch(task: Task) -> int:
    """The run as a launcher's job; SIGTERM, of which launchers know, is passed on."""
    said = _log_size(task)
    process = subprocess.Popen([*task.launcher, *train_arguments(task)])
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    return _meaning(task, process.wait(), said)


def _log_size(task: Task) -> int:
    path = Path(task.directory) / LOG_NAME
    return path.stat().st_size if path.is_file() else 0


def _meaning(task: Task, exit_code: int, said: int) -> int:
    """The exit code of `bitscale train`, or of its launcher, as one of ours.

    Torchrun ends with 1 whatever the ranks ended with: what they printed, after the first `said`
    bytes of the log, tells a fault from bad input.
    """
    if exit_code in (OK, BAD_INPUT, STOPPED):
        return exit_code
    with (Path(task.directory) / LOG_NAME).open("rb") as log:
        log.seek(said)
        lines = log.read().decode(errors="replace").splitlines()
    return FAULT if any(line.startswith(_FAULT_BEGINS) for line in lines) else FAILED


def train_arguments(task: Task) -> list[str]:
    """`-m bitscale.cli.main train ...` for `task`, whose configuration is written for it."""
    path = Path(task.directory).parent.parent / "configs" / f"{task.key}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(parse_config(task.tree, where=task.directory)), encoding="utf-8")
    arguments = ["-m", "bitscale.cli.main", "train", str(path)]
    if task.resume is not None:
        arguments += ["--resume", task.resume]
    for key in task.allow_change:
        arguments += ["--allow-change", key]
    return arguments


def _end_with_parent() -> None:
    """A scheduler that was killed must not leave runs behind: save, stop."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def work_as_job(task: Task) -> int:
    """`task` in a process of a cluster's job, which is its own already."""
    directory = Path(task.directory)
    directory.mkdir(parents=True, exist_ok=True)
    said = _log_size(task)
    with (directory / LOG_NAME).open("a", encoding="utf-8") as log:
        command = [sys.executable, *train_arguments(task)]
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    return _conclude(task, _meaning(task, done.returncode, said), "")
