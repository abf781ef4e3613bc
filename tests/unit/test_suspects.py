"""Who is named when ranks wait: pure judgements on heartbeats and on what torch says."""

import dataclasses
import os
import socket
import time
from pathlib import Path

import psutil
import pytest

import bitscale
from bitscale.errors import PeerLost
from bitscale.heartbeat import Heartbeat, HeartbeatWriter, Place, Progress
from bitscale.watch.lost_peers import explain, is_lost_peer
from bitscale.watch.stragglers import INTERVALS, STEPS, Stragglers, comparable_units
from bitscale.watch.suspects import find_suspect
from bitscale.watch.whereabouts import _place, place_of_error, place_of_main_thread

pytestmark = pytest.mark.unit

NOW = 1000.0
WAITS = "all_reduce"
INTERVAL_STEPS = STEPS // INTERVALS + 1


def beat(rank: int, **changes: object) -> Heartbeat:
    """A rank on another host that waits in a collective of step 7."""
    waiting = Heartbeat(
        rank=rank,
        local_rank=0,
        world_size=4,
        host=f"host-{rank}",
        pid=100 + rank,
        started=0.0,
        time=NOW - 1,
        step=7,
        phase="step",
        phase_since=NOW - 30,
        attempt=0,
        waiting_for=WAITS,
        place="a.py:1 in f",
    )
    return dataclasses.replace(waiting, **changes)  # type: ignore[arg-type]


def blamed(*beats: Heartbeat, own_rank: int = 0, own_place: Place | None = None) -> tuple[int, str]:
    suspect = find_suspect(beats, NOW, own_rank=own_rank, own_place=own_place)
    assert suspect is not None
    return (-1 if suspect.rank is None else suspect.rank), suspect.text


def test_a_rank_that_failed_by_itself_comes_before_its_victims() -> None:
    victims = [beat(rank, phase="failed", failure="peer") for rank in (1, 2)]
    assert blamed(beat(0), *victims, beat(3, phase="failed", failure="error")) == (
        3,
        "rank 3 on host-3 failed at step 7",
    )


def test_a_silent_host_is_named() -> None:
    rank, text = blamed(beat(0), beat(1), beat(2, time=NOW - 60), beat(3))
    assert rank == 2
    assert text.startswith("rank 2 on host-2 has not been heard of: its host or its network is")
    assert "(last heartbeat 1m00s ago, phase step, step 7)" in text


def test_a_process_that_is_gone_is_known_at_once_on_this_host() -> None:
    gone = beat(1, host=socket.gethostname(), pid=os.getpid(), started=1.0)
    rank, text = blamed(beat(0), gone, beat(2), beat(3))
    assert (rank, f"there is no process {os.getpid()} any more" in text) == (1, True)
    living = dataclasses.replace(gone, started=psutil.Process().create_time())
    assert blamed(beat(0), living, beat(2), beat(3))[0] == -1


def test_a_rank_that_never_started_is_named() -> None:
    assert blamed(beat(0), beat(1), beat(3)) == (2, "rank 2 has not started")


def test_the_rank_that_is_in_no_collective_holds_up_the_others() -> None:
    rank, text = blamed(
        beat(0), beat(1), beat(2, waiting_for=None, place="x.py:9 in hang"), beat(3)
    )
    assert rank == 2
    assert text == (
        "furthest behind is rank 2 on host-2: phase step, step 7 for 30s, is not in a collective, "
        "at x.py:9 in hang"
    )


def test_a_rank_that_its_own_watchdog_has_ended_is_furthest_behind() -> None:
    hung = beat(2, waiting_for=None, phase="failed", failure="hang", place="x.py:9 in hang")
    assert blamed(beat(0), beat(1), hung, beat(3)) == (
        2,
        "furthest behind is rank 2 on host-2: hung at step 7, is not in a collective, "
        "at x.py:9 in hang",
    )


def test_the_lowest_step_is_furthest_behind() -> None:
    assert blamed(beat(0), beat(1), beat(2, step=6), beat(3, waiting_for=None))[0] == 2


def test_this_rank_s_own_place_is_newer_than_its_heartbeat() -> None:
    beats = [beat(0, waiting_for=None), beat(1), beat(2), beat(3)]
    assert blamed(*beats)[0] == 0
    assert blamed(*beats, own_place=Place(WAITS, "a.py:1 in f"))[0] == -1


def test_ranks_that_all_wait() -> None:
    network = (
        "every rank waits in all_reduce at a.py:1 in f: look at the network between "
        "rank 0 on host-0 and rank 1 on host-1 and rank 2 on host-2 and rank 3 on host-3"
    )
    assert blamed(*map(beat, range(4))) == (-1, network)
    assert blamed(*map(beat, range(6))) == (-1, f"{network} and others")
    together = [beat(rank, host="host-0") for rank in range(4)]
    assert blamed(*together)[1].endswith("f: look at the network")
    rank, text = blamed(beat(0), beat(1), beat(2, waiting_for="broadcast"), beat(3))
    assert rank == -1
    assert text == (
        "ranks wait in different places: rank 0, 1, 3 in all_reduce at a.py:1 in f; "
        "rank 2 in broadcast at a.py:1 in f"
    )


def test_nobody_to_blame() -> None:
    assert find_suspect([], NOW, own_rank=0) is None
    assert find_suspect([beat(0)], NOW, own_rank=0) is None


# What torch says

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer "
    "[127.0.1.1]:4711"
)
LATE = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms "
    "for recv operation to complete"
)
ABSENT = "Timed out after 6 seconds waiting for clients. 1/2 clients joined."


@pytest.mark.parametrize("text", [CLOSED, LATE, ABSENT])
def test_what_torch_says_of_other_ranks_is_known(text: str) -> None:
    assert is_lost_peer(RuntimeError(text))
    assert not is_lost_peer(ValueError(text))


def test_other_errors_stay_what_they_are() -> None:
    for text in ("shape mismatch", "CUDA out of memory", "operation timed out of range"):
        assert not is_lost_peer(RuntimeError(text))
    for text in (
        "[enforce fail at /gloo/transport/tcp/device.cc:84] Unable to find address for: eth9",
        "The server socket has failed to listen on any local network address. port: 29500",
    ):  # this rank's own
        assert not is_lost_peer(RuntimeError(text))


def test_one_line_names_collective_step_and_rank(tmp_path: Path) -> None:
    for rank, failure in ((0, None), (1, "error")):
        writer = HeartbeatWriter(
            tmp_path, rank=rank, local_rank=rank, world_size=2, interval_seconds=5.0
        )
        writer.joined()
        writer.mark("step", 7)
        writer.end("error") if failure else writer.write()
    began = Progress("step", 7, time.time() - 3, time.monotonic() - 3)
    lost = explain(
        RuntimeError(f"{CLOSED}\nframe #0: c10"),
        tmp_path,
        began,
        Place("all_reduce", "bitscale/mesh.py:1 in max"),
        rank=0,
        timeout_seconds=60.0,
    )
    assert isinstance(lost, PeerLost)
    assert str(lost) == (
        "all_reduce failed in phase step, step 7, 3s after it began, at bitscale/mesh.py:1 in max: "
        f"rank 1 on {socket.gethostname()} failed at step 7; mend that and continue with --resume "
        f"auto [{CLOSED}]"
    )


def test_without_heartbeats_it_says_so(tmp_path: Path) -> None:
    began, place = Progress.now("start", 0), Place("init_process_group", "bitscale/mesh.py:1 in f")
    lost = explain(RuntimeError(ABSENT), tmp_path, began, place, rank=0, timeout_seconds=6.0)
    assert "init_process_group timed out (watch.collective_timeout_seconds=6)" in str(lost)
    assert "no heartbeat tells which rank" in str(lost)


# Where a thread is


def test_the_main_thread_s_place_names_file_line_and_function() -> None:
    place = place_of_main_thread()
    assert place.waiting_for is None
    assert "in place_of_main_thread" in place.line


def test_an_error_s_place_is_where_it_was_raised() -> None:
    def raising() -> None:
        raise ValueError

    with pytest.raises(ValueError) as caught:
        raising()
    place = place_of_error(caught.value.__traceback__)
    assert place.line.endswith("in raising")
    assert "test_suspects.py:" in place.line


def test_a_wait_is_told_by_its_outermost_collective_and_both_callers() -> None:
    """Also where the virtual environment lies in a folder of our name."""
    packages = "/home/me/bitscale/.venv/lib/python3.11/site-packages"
    c10d = f"{packages}/torch/distributed/distributed_c10d.py"
    ours = f"{Path(bitscale.__file__).parent}/mesh.py"
    frames = [
        (c10d, 10, "all_gather"),
        (f"{packages}/torch/distributed/c10d_logger.py", 81, "wrapper"),
        (c10d, 20, "all_gather_object"),
        (f"{packages}/typing_extensions.py", 3140, "wrapper"),  # around what is deprecated
        (f"{packages}/deepspeed/comm/torch.py", 30, "all_gather_object"),
        (ours, 94, "gather_objects"),
        ("/home/me/bitscale/run.py", 1, "<module>"),
    ]
    assert _place(frames) == Place(
        "all_gather_object",
        "deepspeed/comm/torch.py:30 in all_gather_object, called from "
        "bitscale/mesh.py:94 in gather_objects",
    )
    assert _place(frames[-1:]) == Place(None, "bitscale/run.py:1 in <module>")
    assert _place([]) == Place(None, "")


def test_waiting_for_the_device_or_an_asynchronous_collective(tmp_path: Path) -> None:
    source = tmp_path / "lines.py"
    source.write_text("handle.wait()\nlosses.tolist()\nx = y\n")
    found = [_place([(str(source), line, "f")]).waiting_for for line in (1, 2, 3)]
    assert found == ["an asynchronous collective", "the device", None]


# Stragglers


def test_a_rank_is_named_once_and_once_more_when_it_is_over() -> None:
    stragglers = Stragglers(comparable_units(4, tp=1, pp=1), 1.2)
    slow, even = [1.0, 1.0, 1.3, 1.1], [1.0, 1.0, 1.1, 1.1]
    named = [stragglers.judge(slow, INTERVAL_STEPS) for _ in range(INTERVALS + 2)]
    assert [len(found) for found in named] == [0] * (INTERVALS - 1) + [1, 0, 0]
    (straggler,) = named[INTERVALS - 1]
    assert straggler == ((2,), 1.3, 1.0, False)
    ((ranks, own, _, is_over),) = stragglers.judge(even, INTERVAL_STEPS)
    assert (ranks, own, is_over) == ((2,), 1.1, True)
    assert stragglers.judge(even, INTERVAL_STEPS) == []


def test_one_even_interval_begins_the_count_anew() -> None:
    stragglers = Stragglers(comparable_units(2, tp=1, pp=1), 1.2)
    for _ in range(3):
        for _ in range(INTERVALS - 1):
            assert stragglers.judge([2.0, 1.0], 100) == []
        assert stragglers.judge([1.0, 1.0], 100) == []


def test_intervals_of_few_steps_do_not_name_anybody() -> None:
    stragglers = Stragglers(comparable_units(2, tp=1, pp=1), 1.2)
    found = [stragglers.judge([2.0, 1.0], 1) for _ in range(STEPS)]
    assert [len(one) for one in found] == [0] * (STEPS - 1) + [1]


def test_pipeline_stages_are_not_compared_and_tensor_ranks_count_together() -> None:
    assert comparable_units(8, tp=2, pp=2) == [[(0, 1), (2, 3)], [(4, 5), (6, 7)]]
    stragglers = Stragglers(comparable_units(8, tp=2, pp=2), 1.2)
    stages = [1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 20.0]
    found = [stragglers.judge(stages, 100) for _ in range(INTERVALS)]
    assert [(one.ranks, one.others_seconds) for one in found[-1]] == [((6, 7), 9.0)]
    alone = Stragglers(comparable_units(1, tp=1, pp=1), 1.2)
    assert all(alone.judge([1.0], 100) == [] for _ in range(INTERVALS))
