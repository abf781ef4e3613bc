"""Heartbeats: what is written, what is believed, and that nothing about them ends a training."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from bitscale.heartbeat import (
    Heartbeat,
    HeartbeatWriter,
    Place,
    heartbeat_path,
    missing_ranks,
    read_heartbeats,
)

pytestmark = pytest.mark.unit


def writer(
    run_dir: Path, rank: int = 0, world_size: int = 1, interval_seconds: float = 5.0
) -> HeartbeatWriter:
    return HeartbeatWriter(
        run_dir,
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        interval_seconds=interval_seconds,
        place=lambda: Place("all_reduce", "bitscale/mesh.py:1 in max"),
    )


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_heartbeat_tells_who_where_and_how_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    before = time.time()
    beats = writer(tmp_path, rank=1, world_size=2)
    beats.mark("evaluate", 7)
    beats.write()
    (heartbeat,) = read_heartbeats(tmp_path)
    assert (heartbeat.rank, heartbeat.local_rank, heartbeat.world_size) == (1, 1, 2)
    assert (heartbeat.pid, heartbeat.host) == (os.getpid(), os.uname().nodename)
    assert (heartbeat.phase, heartbeat.step, heartbeat.attempt) == ("evaluate", 7, 2)
    assert heartbeat.started < before <= heartbeat.phase_since <= heartbeat.time
    assert (heartbeat.waiting_for, heartbeat.place) == ("all_reduce", "bitscale/mesh.py:1 in max")
    assert missing_ranks([heartbeat]) == [0]
    monkeypatch.setenv("BITSCALE_ATTEMPT", "5")  # a supervisor of ours knows better
    writer(tmp_path, rank=1, world_size=2).write()
    assert read_heartbeats(tmp_path)[0].attempt == 5


def test_a_thread_writes_on_while_the_training_hangs(tmp_path: Path) -> None:
    beats = writer(tmp_path, interval_seconds=0.01)
    beats.start()
    beats.mark("step", 3)
    deadline = time.monotonic() + 30
    while not (found := read_heartbeats(tmp_path)) or found[0].step != 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beats.end("hang")
    (last,) = read_heartbeats(tmp_path)
    assert (last.phase, last.failure, last.step) == ("failed", "hang", 3)
    assert list(tmp_path.glob("ranks/.*")) == []


def test_ranks_of_an_earlier_larger_world_are_not_taken_for_living(tmp_path: Path) -> None:
    for rank in range(4):
        writer(tmp_path, rank, world_size=4).write()
    assert [heartbeat.rank for heartbeat in read_heartbeats(tmp_path)] == [0, 1, 2, 3]
    later = time.time() + 60
    for rank in range(2):
        writer(tmp_path, rank, world_size=2).write()
        edit(heartbeat_path(tmp_path, rank), started=later, time=later)
    assert [heartbeat.rank for heartbeat in read_heartbeats(tmp_path)] == [0, 1]


def test_an_earlier_launch_of_the_same_size_does_not_count(tmp_path: Path) -> None:
    """Rank 1 has not been started yet: what stands there is the dead run's."""
    for rank in range(2):
        writer(tmp_path, rank, world_size=2).write()
    later = time.time() + 60
    edit(heartbeat_path(tmp_path, 0), started=later, time=later)
    heartbeats = read_heartbeats(tmp_path)
    assert [heartbeat.rank for heartbeat in heartbeats] == [0]
    assert missing_ranks(heartbeats) == [1]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"rank": 0}', '{"rank": "0"}', "\0\0\0"], ids=repr
)
def test_a_damaged_file_is_as_good_as_missing(tmp_path: Path, text: str) -> None:
    writer(tmp_path, 0, world_size=2).write()
    writer(tmp_path, 1, world_size=2).write()
    heartbeat_path(tmp_path, 0).write_text(text)
    assert [heartbeat.rank for heartbeat in read_heartbeats(tmp_path)] == [1]


def test_fields_of_the_wrong_type_are_not_believed(tmp_path: Path) -> None:
    for field, value in (
        ("pid", -1),
        ("phase", "dancing"),
        ("time", "now"),
        ("step", 1.5),
        ("host", "a; reboot"),
        ("host", "-oProxyCommand=x"),
        ("place", "\x1b[2J"),
    ):
        writer(tmp_path).write()
        edit(heartbeat_path(tmp_path, 0), **{field: value})
        assert read_heartbeats(tmp_path) == [], field


def test_a_directory_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks").write_text("a file where the directory belongs")
    beats = writer(tmp_path)
    beats.write()
    beats.write()
    error = capsys.readouterr().err
    assert error.count("rank-00000.json: no heartbeat can be written (") == 1
    assert "training goes on" in error


def test_a_file_of_another_living_run_is_left_alone_until_the_ranks_have_met(
    tmp_path: Path,
) -> None:
    """Rank 0 finds the directory locked; rank 1 of that launch must not disturb its owner."""
    path = heartbeat_path(tmp_path, 1)
    writer(tmp_path, 1, world_size=2).write()
    edit(path, pid=1, host="another-host")
    intruder = writer(tmp_path, 1, world_size=2)
    intruder.write()
    assert read_heartbeats(tmp_path)[0].pid == 1
    edit(path, time=time.time() - 60)  # long dead
    intruder.write()
    assert read_heartbeats(tmp_path)[0].pid == os.getpid()
    edit(path, pid=1)  # on this host, where process 1 is none of ours: as good as dead
    writer(tmp_path, 1, world_size=2).write()
    assert read_heartbeats(tmp_path)[0].pid == os.getpid()
    edit(path, pid=1, host="another-host")
    joined = writer(tmp_path, 1, world_size=2)
    joined.joined()
    joined.write()
    assert read_heartbeats(tmp_path)[0].pid == os.getpid()


def test_turned_off_it_leaves_no_old_heartbeat_behind(tmp_path: Path) -> None:
    writer(tmp_path).write()
    beats = writer(tmp_path, interval_seconds=0)
    beats.start()
    beats.end()
    assert read_heartbeats(tmp_path) == []


def test_a_recycled_process_id_is_not_the_rank(tmp_path: Path) -> None:
    writer(tmp_path).write()
    (heartbeat,) = read_heartbeats(tmp_path)
    found = heartbeat.process()
    assert found is not None and found.pid == os.getpid()
    earlier = dataclasses.replace(heartbeat, started=heartbeat.started - 100)
    assert earlier.process() is None
    assert dataclasses.replace(heartbeat, host="another-host").process() is None


def test_freshness_follows_the_writer_s_own_interval() -> None:
    heartbeat = Heartbeat(0, 0, 1, "h", 1, 0.0, 100.0, 0, "step", 0.0, 0, interval_seconds=5.0)
    assert heartbeat.is_fresh(100.0 + 17.0)
    assert not heartbeat.is_fresh(100.0 + 17.1)
    assert heartbeat.age_seconds(90.0) == 0.0  # the other host's clock is ahead
