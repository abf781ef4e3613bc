"""The local back end: `workers` runs side by side on this machine."""

import multiprocessing
import os
import signal
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from types import FrameType

from bitscale.sweep.progress import Progress
from bitscale.sweep.schedule import Schedule
from bitscale.sweep.trunks import Run
from bitscale.sweep.worker import PRELOAD, PRELOAD_ON_CPU, work

_POLL_SECONDS = 0.5


class _Stop:
    """SIGINT and SIGTERM as a flag; a second one acts as it would have."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_local(schedule: Schedule, progress: Progress, workers: int) -> bool:
    """Run everything that remains. Returns False if a signal stopped it: saved, to be continued."""
    context = multiprocessing.get_context("forkserver")
    # Read by libraries when they are imported, so before the server starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if all(run.cfg.engine.device == "cpu" for run in schedule.runs.values()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context.set_forkserver_preload(PRELOAD_ON_CPU)
    else:  # DeepSpeed would look for the GPU, which a fork must not share
        context.set_forkserver_preload(PRELOAD)
    schedule.prune()
    stop = _Stop()
    active: dict[str, tuple[Run, ForkServerProcess]] = {}
    told = False
    try:
        while True:
            while not stop.requested and len(active) < workers:
                run = schedule.next_run()
                if run is None:
                    break
                process = context.Process(target=work, args=(schedule.begin(run),), daemon=False)
                if not _has_started(process, stop):
                    break
                active[run.key] = run, process
                progress.begin(run)
            if stop.requested and not told:
                told = True
                progress.say("stopping: the runs save and end; the same command goes on")
                for _, process in active.values():
                    process.terminate()
            if not active and (stop.requested or not schedule.elsewhere):
                return not stop.requested
            progress.wait_for_others()
            connection.wait([p.sentinel for _, p in active.values()], timeout=_POLL_SECONDS)
            for key, (run, process) in list(active.items()):
                if process.exitcode is not None:
                    process.join()
                    del active[key]
                    progress.end(run, schedule.end(run, process.exitcode))
            progress.tick()
    finally:
        stop.restore()
        for _, process in active.values():
            process.terminate()


def _has_started(process: ForkServerProcess, stop: _Stop) -> bool:
    """Start it; False if the signal that stops us has ended the fork server as well."""
    try:
        process.start()
    except (EOFError, OSError):
        if not stop.requested:
            raise
        return False
    return True


def default_workers() -> int:
    """One a core that this process may use."""
    return len(os.sched_getaffinity(0))
