"""One run at a time in a run directory: an flock on `RUN/run.lock`.

The kernel releases it when the process ends, however it ends: what a dead run left never blocks.
The file's text (host, process, start) is for people; nothing is concluded from it.
"""

import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitscale.errors import ConfigError

LOCK_NAME = "run.lock"


@contextmanager
def hold(
    run_dir: Path, *, enabled: bool = True, name: str = LOCK_NAME, called: str = "run.dir"
) -> Iterator[None]:
    """Hold `run_dir`, which is made if it is not there (rank 0 only; the others pass False).

    `name` is the lock's file: a supervisor has one of its own beside the run's. `called` is what
    messages call the directory.

    Raises ConfigError if another process holds it, or if it is not writable. A file system without
    flock (Lustre mounted without `-o flock`) is said on stderr and nothing is held.
    """
    if not enabled:
        yield
        return
    path = run_dir / name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")  # closed on exec: no child can keep the lock
    except OSError as error:
        raise ConfigError(f"{called}={str(run_dir)!r} is not writable: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{called}={str(run_dir)!r} is in use by {_holder(file.read())}; wait for it, stop "
                f"it, or choose another {called}"
            ) from None
        except OSError as error:
            print(
                f"warning: {path} cannot be locked ({error.strerror}): nothing keeps a second run "
                "out of this directory",
                file=sys.stderr,
                flush=True,
            )
        file.truncate(0)
        file.write(json.dumps(_about_us()) + "\n")
        file.flush()
        yield


def is_held(run_dir: Path, *, name: str = LOCK_NAME) -> bool:
    """Whether a process holds `run_dir` now, as far as the file system says. Nothing is made.

    To find out it holds the lock for a moment itself, which `hold` may meet.
    """
    try:
        with (run_dir / name).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without flock
        return False
    return False


def _about_us() -> dict[str, str | int]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"  # which is writing this file at the moment
