"""Faults injected into real small runs: what the user reads, and that nothing is lost.

A fault is a function of the `Bench`: it damages or ambushes a run, lets a session meet that, mends
it as the message says, and returns `Seen`. "Nothing lost" is asserted, not judged: the mended run
ends bitwise equal to the uninterrupted one (`runs.differences`), or the run was not touched.
"""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ambush import (
    SAVE_POINTS,
    Operation,
    Point,
    Strike,
    io_error,
    jump_clock,
    lay,
    sigkill,
    sigterm,
)

from bitscale.checkpoint import Reader, latest_checkpoint
from bitscale.heartbeat import RANKS_DIR
from kill_points import wait_for_step
from preloaded import Session
from runs import checkpoint_dirs, differences, events

SAVE_EVERY = 5  # steps, as in runs.CONFIG
HALF = 20  # the last save of the run that faults are done to; the one before was at 15
SHARD = "state-00000-of-00001.safetensors"
_SECONDS = 240.0
Prepare = Callable[[int], None]


class Seen(NamedTuple):
    """A row of docs/results/faults.md."""

    what: str  # the message, or what was found
    exit_code: int
    lost: str = "nothing"


@dataclass
class Bench:
    """A place to run: one corpus and configuration, one uninterrupted run, one half run."""

    folder: Path
    config: Path
    ranks: int = 1
    overrides: Sequence[str] = ()
    num_runs: int = field(default=0, init=False)

    @property
    def reference(self) -> Path:
        return self.folder / f"reference-{self.ranks}"

    @property
    def half(self) -> Path:
        return self.folder / f"half-{self.ranks}"

    def make_runs(self) -> None:
        self.expect(0, self.reference)
        # Killed when it begins its next save: not stopped, which would end with an evaluation.
        point = Point(Operation("os.mkdir", f".step-{HALF + SAVE_EVERY:08d}.partial"))
        code, output = self.run(self.half, prepare=lambda _: lay(point, sigkill))
        assert abs(code) == signal.SIGKILL, output

    def copy(self) -> Path:
        """A copy of the half run, to be damaged."""
        run_dir = self.fresh()
        shutil.copytree(self.half, run_dir)
        return run_dir

    def fresh(self) -> Path:
        self.num_runs += 1
        return self.folder / f"run-{self.ranks}-{self.num_runs}"

    def begin(
        self, run_dir: Path, *overrides: str, resume: str = "auto", prepare: Prepare | None = None
    ) -> tuple[Session, Path]:
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        more = [*self.overrides, *overrides, "--resume", resume] if resume else [*overrides]
        arguments = [str(self.config), f"run.dir={run_dir}", *more]
        return Session(arguments, self.ranks, log, prepare), log

    def run(
        self, run_dir: Path, *overrides: str, resume: str = "auto", prepare: Prepare | None = None
    ) -> tuple[int, str]:
        """Exit code and output of a session."""
        session, log = self.begin(run_dir, *overrides, resume=resume, prepare=prepare)
        code = session.wait(_SECONDS)
        return code, log.read_text(errors="replace")

    def expect(
        self,
        exit_code: int,
        run_dir: Path,
        *overrides: str,
        resume: str = "auto",
        prepare: Prepare | None = None,
    ) -> str:
        """The error line (else the last line) of a session that ends with `exit_code`."""
        code, output = self.run(run_dir, *overrides, resume=resume, prepare=prepare)
        assert code == exit_code, f"exit code {code}, not {exit_code}:\n{output}"
        assert exit_code == 1 or "Traceback" not in output, output
        lines = output.strip().splitlines() or [""]
        found = [line for line in lines if line.startswith("error")]
        return (found or lines[-1:])[0].replace(f"{self.folder}/", "")

    def assert_mended(self, run_dir: Path) -> None:
        """`--resume auto` ends it as if nothing had happened."""
        self.expect(0, run_dir)
        found = differences(self.reference, run_dir)
        assert found == [], found


Fault = Callable[[Bench], Seen]


# In a save


def struck_in_saves(bench: Bench, asynchronous: bool) -> dict[str, Seen]:
    """SIGKILL at every point of a save; one run suffers them all, and ends as if none had been."""
    run_dir, mode = bench.copy(), f"checkpoint.asynchronous={str(asynchronous).lower()}"
    seen = {}
    for name, point in SAVE_POINTS.items():
        code, output = bench.run(run_dir, mode, prepare=lambda _, point=point: lay(point, sigkill))
        assert code == -signal.SIGKILL, f"{name}: {code}: {output}"
        path = latest_checkpoint(run_dir / "checkpoints")
        assert path is not None
        assert Reader(path).meta.step >= HALF
        left = sorted(p.name for p in (run_dir / "checkpoints").glob(".*"))
        rest = f"; ignored: {', '.join(f'`{name}`' for name in left)}" if left else ""
        seen[name] = Seen(f"in force and whole: `{path.name}`{rest}", code)
    bench.assert_mended(run_dir)
    return seen


def sigterm_in_a_save(bench: Bench, *overrides: str) -> Seen:
    """It is remembered, the save is finished, one of the step reached follows."""
    run_dir, point = bench.copy(), SAVE_POINTS["in the middle of the shard"]
    seen = bench.expect(75, run_dir, *overrides, prepare=lambda _: lay(point, sigterm))
    step = events(run_dir, "preempted")[-1]["step"]
    assert checkpoint_dirs(run_dir)[-1].name == f"step-{step:08d}"
    bench.assert_mended(run_dir)
    return Seen(seen, 75)


def sigterm_twice_in_a_save(bench: Bench) -> Seen:
    """The second does not wait for the save that the first has asked for."""
    run_dir, point = bench.copy(), SAVE_POINTS["in the middle of the shard"]
    strike: Strike = lambda: (sigterm(), time.sleep(1), sigterm(), time.sleep(60))  # noqa: E731
    code, _ = bench.run(run_dir, prepare=lambda _: lay(point, strike))
    path = latest_checkpoint(run_dir / "checkpoints")
    assert code == -signal.SIGTERM and path == half_checkpoint(run_dir)
    bench.assert_mended(run_dir)
    return Seen(f"in force and whole: `{path.name}`", code)


def write_error_in_a_save(bench: Bench, *overrides: str) -> Seen:
    """The last rank's disk fails; every rank stops with the error."""
    run_dir, point = bench.copy(), SAVE_POINTS["in the middle of the shard"]
    last = bench.ranks - 1
    prepare: Prepare = lambda rank: lay(point, io_error) if rank == last else None  # noqa: E731
    seen = bench.expect(2, run_dir, *overrides, prepare=prepare)
    assert "not saved, state-" in seen and "Input/output error" in seen, seen
    bench.assert_mended(run_dir)
    return Seen(seen, 2)


def file_size_limit(bench: Bench) -> Seen:
    """As a quota: no file may grow beyond 64 KiB."""
    run_dir = bench.copy()
    limit = (65536, 65536)
    seen = bench.expect(
        2, run_dir, prepare=lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert "not saved" in seen and "File too large" in seen, seen
    bench.assert_mended(run_dir)
    return Seen(seen, 2)


def one_rank_killed_in_a_save(bench: Bench) -> Seen:
    run_dir, point = bench.copy(), SAVE_POINTS["in the middle of the shard"]
    code, _ = bench.run(run_dir, prepare=lambda rank: lay(point, sigkill) if rank == 1 else None)
    path = latest_checkpoint(run_dir / "checkpoints")
    assert code != 0 and path is not None
    bench.assert_mended(run_dir)
    return Seen(f"the launcher ends the other rank; in force and whole: `{path.name}`", code)


# What is on disk


def half_checkpoint(run_dir: Path) -> Path:
    """The newest of a half run."""
    return run_dir / "checkpoints" / f"step-{HALF:08d}"


def refused_until(
    damage: Callable[[Bench, Path], None], *expected: str, exit_code: int = 2
) -> Fault:
    """Damage the newest checkpoint, read the refusal, go back to the one before as it says."""

    def fault(bench: Bench) -> Seen:
        run_dir = bench.copy()
        damage(bench, run_dir)
        before = _tree(run_dir)
        seen = bench.expect(exit_code, run_dir)
        assert all(text in seen for text in expected), seen
        assert _tree(run_dir) == before, "a refused session has changed the run"
        (run_dir / "checkpoints" / "latest").write_text(f"step-{HALF - SAVE_EVERY:08d}\n")
        bench.assert_mended(run_dir)
        return Seen(seen, exit_code, "nothing: from the checkpoint before")

    return fault


def _tree(run_dir: Path) -> dict[str, str]:
    """Every file and its digest, but the lock's text and the ranks' heartbeats."""
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name != "run.lock" and path.parent.name != RANKS_DIR
    }


# Around the run


def wrong(*overrides: str, expected: str) -> Fault:
    """A configuration that is not the checkpoint's; the run stays as it is."""

    def fault(bench: Bench) -> Seen:
        before = _tree(bench.half)
        seen = bench.expect(2, bench.half, *overrides)
        assert expected in seen, seen
        assert _tree(bench.half) == before
        return Seen(seen, 2)

    return fault


def no_checkpoint_there(bench: Bench) -> Seen:
    seen = bench.expect(2, bench.fresh(), resume=str(bench.folder / "nowhere"))
    assert "nowhere: no checkpoint here; name a run directory" in seen
    return Seen(seen, 2)


def not_resumed(bench: Bench) -> Seen:
    """The same command again, without --resume."""
    before = _tree(bench.half)
    seen = bench.expect(2, bench.half, resume="")
    assert "already holds a run" in seen and _tree(bench.half) == before
    return Seen(seen, 2)


def two_runs(bench: Bench) -> Seen:
    """A second session while the first trains; the first does not notice."""
    run_dir = bench.copy()
    done = bench.folder / "the other is done"

    def wait() -> None:
        while not done.exists():
            time.sleep(0.01)

    point = SAVE_POINTS["before its directory is made"]
    first, log = bench.begin(run_dir, prepare=lambda _: lay(point, wait))
    wait_for_step(first, run_dir, HALF + 1)
    first_log = log.rename(bench.folder / "first-log")
    seen = bench.expect(2, run_dir)
    assert f"is in use by process {first.pid} on " in seen, seen
    done.touch()
    assert first.wait(_SECONDS) == 0, first_log.read_text()
    done.unlink()
    assert differences(bench.reference, run_dir) == []
    return Seen(seen, 2)


def clock_jumps(bench: Bench) -> Seen:
    run_dir = bench.copy()
    bench.expect(0, run_dir, prepare=lambda _: jump_clock())
    assert differences(bench.reference, run_dir) == []
    stamps = [event["unix_seconds"] for event in events(run_dir, "checkpoint")]
    assert max(stamps) - min(stamps) > 1e8, stamps
    return Seen("nothing: names, order and durations do not come from the clock", 0)


def mended(damage: Callable[[Path], None], what: str) -> Fault:
    """A fault that the next session mends by itself."""

    def fault(bench: Bench) -> Seen:
        run_dir = bench.copy()
        damage(run_dir)
        bench.assert_mended(run_dir)
        return Seen(what, 0)

    return fault


def torn_metrics(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 21, "lo')


def garbled_metrics(bench: Bench) -> Seen:
    run_dir = bench.copy()
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"kind"', b'"ki\x00d"', 1))
    seen = bench.expect(2, run_dir)
    assert "metrics.jsonl:1: not a JSON object with a kind and a step" in seen, seen
    path.write_bytes(whole)
    bench.assert_mended(run_dir)
    return Seen(seen, 2)


def link_run(run_dir: Path) -> None:
    elsewhere = run_dir.with_name(run_dir.name + "-on-another-disk")
    run_dir.rename(elsewhere)
    run_dir.symlink_to(elsewhere)


def link_checkpoint(run_dir: Path) -> None:
    """It is deleted in due course: the link, that is."""
    path = half_checkpoint(run_dir)
    elsewhere = run_dir.with_name(run_dir.name + "-moved")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def back_to_an_older_one(bench: Bench) -> Seen:
    run_dir = bench.copy()
    older = run_dir / "checkpoints" / f"step-{HALF - SAVE_EVERY:08d}"
    bench.expect(0, run_dir, resume=str(older))
    assert differences(bench.reference, run_dir) == []
    assert (run_dir / "checkpoints" / f"superseded-step-{HALF:08d}").is_dir()
    return Seen(f"the later one is kept as `superseded-step-{HALF:08d}`", 0)


# What the file system refuses


def _as_nobody(_: int) -> None:
    """root reads and writes everything: train as somebody who cannot."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def _give_to_nobody(run_dir: Path) -> None:
    if os.getuid() == 0:
        for path in (run_dir, *run_dir.rglob("*")):
            os.chown(path, 65534, 65534)


def forbidden(name: str, mode: int, *expected: str) -> Fault:
    """`name` in the run directory gets a mode (and root as its owner, if we are root)."""

    def fault(bench: Bench) -> Seen:
        run_dir = bench.copy()
        _give_to_nobody(run_dir)
        path = run_dir / name
        if os.getuid() == 0:
            os.chown(path, 0, 0)
        before = path.stat().st_mode
        path.chmod(mode)
        seen = bench.expect(2, run_dir, prepare=_as_nobody)
        assert all(text in seen for text in expected), seen
        path.chmod(before)
        bench.assert_mended(run_dir)
        return Seen(seen, 2)

    return fault


def turns_read_only(bench: Bench) -> Seen:
    """Between two saves of a run."""
    run_dir, point = bench.copy(), SAVE_POINTS["before its directory is made"]
    _give_to_nobody(run_dir)
    checkpoints = run_dir / "checkpoints"

    def prepare(rank: int) -> None:
        _as_nobody(rank)
        lay(point, lambda: checkpoints.chmod(0o555))

    seen = bench.expect(2, run_dir, prepare=prepare)
    assert "not saved, [Errno 13] Permission denied" in seen, seen
    checkpoints.chmod(0o755)
    bench.assert_mended(run_dir)
    return Seen(seen, 2)


def disk_full(bench: Bench) -> Seen:
    """A disk with room for two and a half checkpoints. Needs root (mount)."""
    disk = bench.folder / "disk"
    disk.mkdir()
    one = sum(path.stat().st_size for path in half_checkpoint(bench.half).iterdir())
    _mount("-t", "tmpfs", "-o", f"size={one * 5 // 2}", "tmpfs", disk)
    try:
        run_dir = disk / "run"
        seen = bench.expect(2, run_dir, "checkpoint.keep_last=9")
        assert "No space left on device" in seen, seen
        path = latest_checkpoint(run_dir / "checkpoints")
        assert path is not None and Reader(path).meta.step > 0
        _mount("-o", f"remount,size={one * 20}", disk)
        bench.assert_mended(run_dir)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return Seen(seen, 2)


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)
