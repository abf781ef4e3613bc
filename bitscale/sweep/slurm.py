"""The Slurm back end, through `submitit`: job arrays, one job a run, trunks before forks."""

import time
from pathlib import Path
from typing import Any

from bitscale.errors import ConfigError
from bitscale.sweep.progress import Progress
from bitscale.sweep.schedule import Schedule
from bitscale.sweep.trunks import Run
from bitscale.sweep.worker import FAILED, Task, work_as_job


def make_executor(folder: Path, cluster: str, parameters: dict[str, Any]) -> Any:
    """A submitit executor: `cluster` is slurm, or local or debug, which need no Slurm.

    Raises ConfigError without submitit, for another cluster and for a parameter it does not know.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "--backend slurm needs submitit, which is not installed; "
            "pip install 'bitscale[slurm]', or use --backend print"
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
        executor.update_parameters(**parameters)
    except (ValueError, RuntimeError, NameError, TypeError) as error:
        raise ConfigError(f"--backend slurm: {' '.join(str(error).split())}") from error
    return executor


def run_slurm(
    schedule: Schedule, progress: Progress, executor: Any, poll_seconds: float = 10.0
) -> bool:
    """Submit what can run as one array, and the next array when more can; wait for all of them.

    Stop it when you like: jobs go on; the same command later waits for those that are running and
    submits what is not done. (Cancel first what is still in the queue then: two jobs never train in
    one directory, the second to start ends with an error.)
    """
    schedule.prune()
    active: dict[str, tuple[Run, Any]] = {}
    while True:
        ready = []
        while (run := schedule.next_run()) is not None:
            ready.append((run, schedule.begin(run)))
        if ready:
            jobs = _submit(executor, [task for _, task in ready])
            for (run, _), job in zip(ready, jobs, strict=True):
                active[run.key] = run, job
                progress.begin(run)
            progress.say(f"submitted {len(jobs)} jobs: {jobs[0].job_id} to {jobs[-1].job_id}")
        if not active and not schedule.elsewhere:
            return True
        progress.wait_for_others()
        ended = [(run, job) for run, job in active.values() if job.done()]
        for run, job in ended:
            del active[run.key]
            progress.end(run, schedule.end(run, _exit_code(job)))
        progress.tick()
        if not ended:
            time.sleep(poll_seconds)


def _submit(executor: Any, tasks: list[Task]) -> list[Any]:
    with executor.batch():
        return [executor.submit(work_as_job, task) for task in tasks]


def _exit_code(job: Any) -> int:
    """What the job returned; FAILED for one that was killed or lost (its log says how)."""
    try:
        return int(job.result())
    except Exception:
        return FAILED
