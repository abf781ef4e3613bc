"""`bitscale prepare`, killed, interrupted, started twice: nothing half-made, and it resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prepare_sessions import TOKENIZER, digests, fail, run, start

from bitscale.data.prepare import load_corpus
from bitscale.errors import DataError

pytestmark = pytest.mark.e2e


def wait_until(process: subprocess.Popen[str], partial: Path, stage: str) -> None:
    """Until OUT.partial shows that the run has reached the stage."""
    reached = {
        "request": lambda: (partial / "request.json").exists(),
        "tokenizer": lambda: (partial / "tokenizer.model").exists(),
        "part begun": lambda: bool(list(partial.glob("parts/*.tmp/*"))),
        "part done": lambda: bool(list(partial.glob("parts/*/counts.json"))),
        "merging": lambda: (partial / "final").exists(),
        "merged": lambda: (
            (partial / "final" / "corpus.json.partial").exists()
            or (partial / "final" / "corpus.json").exists()
        ),
    }[stage]
    while not reached() and process.poll() is None:
        time.sleep(0.001)


def children_of(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


STAGES = ["request", "tokenizer", "part begun", "part done"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes(folder: Path, reference: Path, stage: str, workers: int) -> None:
    out = folder / f"killed-{STAGES.index(stage)}-{workers}"
    partial = Path(f"{out}.partial")
    args = ("in", "--out", out.name, *TOKENIZER, "--workers", workers)
    process = start(folder, *args)
    wait_until(process, partial, stage)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail(f"finished before the kill at stage {stage!r}")
    assert process.returncode == -signal.SIGKILL
    assert_nothing_looks_finished(out)

    done = {path.parent: path.stat().st_mtime_ns for path in partial.glob("parts/*/counts.json")}
    done = {part: time_ns for part, time_ns in done.items() if part.suffix != ".tmp"}
    assert done or stage != "part done"
    run_resumed(folder, args, done)
    assert digests(out) == digests(reference)
    assert not partial.exists()


@pytest.mark.parametrize("function", ["_tokenize", "_merge", "_versions", "_publish"])
def test_killed_at_an_exact_point(
    folder: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    out = folder / f"killed{function}"
    args = ("in", "--out", out.name, *TOKENIZER, "--workers", 1)
    monkeypatch.setenv("KILL_BEFORE", function)
    process = start(folder, *args)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_nothing_looks_finished(out)
    monkeypatch.delenv("KILL_BEFORE")
    stderr = run(folder, *args)
    assert ("resuming" in stderr) == (function != "_tokenize")
    assert digests(out) == digests(reference)
    assert not Path(f"{out}.partial").exists()


def test_killed_while_replacing_keeps_the_old_corpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("in/0.txt", "--out", "replaced", *TOKENIZER, "--workers", 1)
    run(folder, *args)
    before = digests(folder / "replaced")
    changed = (*args, "--section-bytes", 9000, "--overwrite")
    monkeypatch.setenv("KILL_BEFORE", "_publish")
    process = start(folder, *changed)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert digests(folder / "replaced") == before
    monkeypatch.delenv("KILL_BEFORE")
    run(folder, *changed)
    assert load_corpus(folder / "replaced", check_hashes=True)
    assert digests(folder / "replaced") != before


def assert_nothing_looks_finished(out: Path) -> None:
    assert not out.exists()
    with pytest.raises(DataError, match="is not a prepared corpus"):
        load_corpus(out)
    with pytest.raises(DataError, match="is not a prepared corpus"):
        load_corpus(f"{out}.partial")


def run_resumed(folder: Path, args: tuple[object, ...], done: dict[Path, int]) -> None:
    """Run to the end; parts in `done` must still be the same files while it runs."""
    process = start(folder, *args)
    while process.poll() is None:
        for part, time_ns in done.items():
            with suppress(FileNotFoundError):  # published, and the staging folder removed
                assert (part / "counts.json").stat().st_mtime_ns == time_ns
        time.sleep(0.02)
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    if done:
        assert f"resuming: {len(done)} of " in stderr


def test_workers_end_with_a_killed_parent(folder: Path) -> None:
    args = ("in", "--out", "orphans", *TOKENIZER, "--workers", 2)
    process = start(folder, *args)
    wait_until(process, folder / "orphans.partial", "part begun")
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the killed prepare"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_killed_worker(folder: Path, reference: Path) -> None:
    args = ("in", "--out", "worker", *TOKENIZER, "--workers", 2)
    process = start(folder, *args)
    wait_until(process, folder / "worker.partial", "part begun")
    for pid in children_of(process.pid):
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "error: a worker process was killed, perhaps for memory; run the same" in stderr
    assert_nothing_looks_finished(folder / "worker")
    run(folder, *args)
    assert digests(folder / "worker") == digests(reference)


def test_interrupt_ends_soon_and_resumes(folder: Path, reference: Path) -> None:
    for attempt in range(5):  # the rest of the work takes a moment only: it may win the race
        args = ("in", "--out", f"interrupted-{attempt}", *TOKENIZER, "--workers", 2)
        process = start(folder, *args)
        wait_until(process, folder / f"interrupted-{attempt}.partial", "part begun")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        if process.returncode != 0:
            break
    else:
        pytest.fail("five runs went on to their end in spite of an interrupt")
    out = folder / f"interrupted-{attempt}"
    assert_nothing_looks_finished(out)
    run(folder, *args)
    assert digests(out) == digests(reference)


def test_two_runs_at_once(folder: Path) -> None:
    args = ("in", "--out", "twice", *TOKENIZER, "--workers", 1)
    process = start(folder, *args)
    wait_until(process, folder / "twice.partial", "request")  # the lock is held, work is ahead
    process.send_signal(signal.SIGSTOP)
    try:
        message = fail(folder, *args)
        assert "another process is preparing" in message and "wait for it" in message
    finally:
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_interrupted_run_with_other_options(folder: Path) -> None:
    source = folder / "changing.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(200)))
    args = ("changing.jsonl", "--out", "other-options", "--workers", 1)
    process = start(folder, *args, *TOKENIZER)
    wait_until(process, folder / "other-options.partial", "request")
    process.kill()
    process.communicate()
    partial = folder / "other-options.partial"
    if not partial.exists():
        pytest.fail("finished before the kill")

    message = fail(folder, *args, *TOKENIZER[:-1], 100)
    assert "interrupted preparation made differently (section_bytes was 20000, now 100)" in message
    assert "repeat its options to resume it, or discard it with --overwrite" in message
    source.write_text(source.read_text() + '{"text": "more"}\n')
    assert "(input changing.jsonl changed" in fail(folder, *args, *TOKENIZER)
    run(folder, *args, *TOKENIZER, "--overwrite")
    assert not partial.exists()
