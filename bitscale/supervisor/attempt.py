"""One launch over hosts, from the agents' first word to the last rank's end."""

import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from bitscale.heartbeat import Heartbeat, read_heartbeats
from bitscale.hostfile import Host
from bitscale.supervisor.hosts import rank_variables
from bitscale.supervisor.link import Link, Message, SshOptions, open_link

Say = Callable[[str], None]
Kind = Literal["done", "stopped", "bad input", "rank", "host", "stall"]

EXIT_BAD_INPUT = 2
EXIT_PEER_LOST = 4
EXIT_PREEMPTED = 75
_POLL_SECONDS = 0.2
_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 1.0  # between two readings of the heartbeats
_SETTLE_SECONDS = 3.0  # after the first failure, for the one that caused it to show
_END_SECONDS = 20.0  # for an agent to end its ranks
_QUIET_SECONDS = 3.0  # a host that says nothing for so long may be the cause of another's failure


class Bounds(NamedTuple):
    """No wait is longer."""

    heartbeat_seconds: float  # a rank's file may stay as it is
    stall_seconds: float  # no rank takes a step
    save_seconds: float  # from a request to stop to the last rank's end


class Failure(NamedTuple):
    """How an attempt ended, and through whom."""

    kind: Kind
    text: str  # names host and rank
    host: str = ""
    rank: int | None = None
    exit_code: int | None = None


@dataclass
class RankEnd:
    host: str
    rank: int
    pid: int
    code: int  # negative: the signal that killed it
    at: float


@dataclass
class Attempt:
    """Ranks of one launch, as far as the supervisor knows of them."""

    links: dict[str, Link]
    inbox: "queue.Queue[Message]"
    silence_seconds: float
    say: Say
    host_of: dict[int, str] = field(default_factory=dict)
    ends: dict[int, RankEnd] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # host: why
    unkilled: list[str] = field(default_factory=list)  # hosts with ranks that would not die
    ended: set[str] = field(default_factory=set)  # hosts whose agents have said "end"
    last_words: dict[int, str] = field(default_factory=dict)

    def pump(self, seconds: float = _POLL_SECONDS) -> None:
        """Take in what agents have said within `seconds`, and who has fallen silent."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._take(self.inbox.get(timeout=left))
            except queue.Empty:
                break
        now = time.monotonic()
        for name, link in self.links.items():
            quiet = now - link.last_heard
            if name in self.ended or name in self.lost:
                continue
            if quiet > self.silence_seconds:
                self.lost[name] = f"has not been heard of for {quiet:.0f} s"

    def beat(self) -> None:
        for name, link in self.links.items():
            if name not in self.lost and name not in self.ended:
                link.send("beat")

    def _take(self, message: Message) -> None:
        link = self.links.get(message.host)
        if link is None:
            return
        fields = message.fields
        link.last_heard = time.monotonic()
        match message.event:
            case "ready":
                link.ready = fields
            case "started":
                link.pids = fields["pids"]
            case "alive":
                link.states = fields["states"]
            case "noise":
                self.say(f"[{message.host}] {fields['text']}")
            case "output":
                self._show(message.host, fields["rank"], fields["text"])
            case "exit":
                self.ends[fields["rank"]] = RankEnd(
                    message.host, fields["rank"], fields["pid"], fields["code"], time.monotonic()
                )
            case "end":
                self.ended.add(message.host)
                if fields["alive"]:
                    self.unkilled.append(message.host)
            case "closed" if message.host not in self.ended:
                said = f": {link.said[-1]}" if link.said else ""
                self.lost.setdefault(message.host, f"closed the ssh connection{said}")

    def _show(self, host: str, rank: int, text: str) -> None:
        if text.strip():
            self.last_words[rank] = text.strip()
        self.say(text if rank == 0 else f"[rank {rank} on {host}] {text}")


def connect(hosts: Sequence[Host], ssh: SshOptions, say: Say) -> Attempt:
    """Start an agent on every host; those that do not answer in time are in `lost`."""
    inbox: queue.Queue[Message] = queue.Queue()
    links = {host.name: open_link(host, ssh, inbox) for host in hosts}
    attempt = Attempt(links, inbox, ssh.silence_seconds, say)
    deadline = time.monotonic() + ssh.connect_seconds
    while time.monotonic() < deadline:
        if all(link.ready or name in attempt.lost for name, link in links.items()):
            break
        attempt.pump()
    for name, link in links.items():
        if link.ready is None:
            attempt.lost.setdefault(name, f"did not answer in {ssh.connect_seconds:.0f} s")
    return attempt


def start(
    attempt: Attempt,
    hosts: Sequence[Host],
    command: Sequence[str],
    environment: dict[str, str],
    address: str,
    port: int | None,
) -> None:
    """Start the ranks on `hosts`, whose agents have answered; those of others are sent home."""
    first = attempt.links[hosts[0].name]
    assert first.ready is not None
    variables = rank_variables(hosts, address, port or first.ready["port"])
    chosen = {host.name for host in hosts}
    for name in [name for name in attempt.links if name not in chosen]:
        attempt.links.pop(name).drop()
        attempt.lost.pop(name, None)
    for name, ranks in variables.items():
        attempt.host_of.update({int(own["RANK"]): name for own in ranks})
        link = attempt.links[name]
        link.send("start", command=list(command), environment=environment, ranks=ranks)


def watch(
    attempt: Attempt,
    run_dir: Path,
    bounds: Bounds,
    stop_requested: Callable[[], bool],
    on_step: Callable[[int], None],
) -> Failure:
    """Until every rank has ended, or one failure has shown itself; the ranks are then still there.

    `on_step` hears of every new number of steps done (of the slowest rank).
    """
    eyes = _Eyes(run_dir, bounds, attempt)
    next_beat = next_look = 0.0
    asked_at: float | None = None
    while True:
        attempt.pump()
        now = time.monotonic()
        if now >= next_beat:
            attempt.beat()
            next_beat = now + _BEAT_SECONDS
        if stop_requested() and asked_at is None:
            asked_at = now
            attempt.say("supervisor: stopping; every rank saves first")
            for link in attempt.links.values():
                link.send("signal", number=int(signal.SIGTERM))
        if asked_at is not None and now - asked_at > bounds.save_seconds:
            waiting = _named(attempt, sorted(set(attempt.host_of) - set(attempt.ends)))
            text = f"{waiting} did not end within {bounds.save_seconds:.0f} s of the signal"
            return Failure("stopped", text, exit_code=1)
        failed = [end for end in attempt.ends.values() if end.code not in (0, EXIT_PREEMPTED)]
        if failed or attempt.lost:
            _settle(attempt)
            return find_cause(attempt)
        if len(attempt.ends) == len(attempt.host_of):
            codes = {end.code for end in attempt.ends.values()}
            if codes == {0}:
                return Failure("done", "every rank has ended with 0", exit_code=0)
            return Failure("stopped", "every rank has saved and stopped", exit_code=EXIT_PREEMPTED)
        if now >= next_look:
            next_look = now + _LOOK_SECONDS
            if (stall := eyes.look(on_step)) is not None:
                return stall


def finish(attempt: Attempt) -> None:
    """End every rank on every host that answers, and wait (bounded) for its agent's word."""
    for name, link in attempt.links.items():
        if name not in attempt.lost:
            link.send("end")
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline and _unfinished(attempt):
        attempt.pump()
    for name in _unfinished(attempt):
        attempt.lost[name] = f"did not end its ranks in {_END_SECONDS:.0f} s"
    for link in attempt.links.values():
        link.drop()


def _unfinished(attempt: Attempt) -> set[str]:
    return attempt.links.keys() - attempt.ended - attempt.lost.keys()


def _settle(attempt: Attempt) -> None:
    """The first failure to be seen is often not the first: when a rank dies its peers do, too. A
    host that has gone is known to have only when it has been silent for long."""
    begin = time.monotonic()
    while time.monotonic() - begin < attempt.silence_seconds + _SETTLE_SECONDS:
        attempt.pump()
        attempt.beat()
        now = time.monotonic()
        suspects = [
            name
            for name, link in attempt.links.items()
            if name not in attempt.lost and now - link.last_heard > _QUIET_SECONDS
        ]
        if now - begin > _SETTLE_SECONDS and not suspects:
            return


def find_cause(attempt: Attempt) -> Failure:
    """A host before a rank; a rank that was killed before one that gave up by itself, and those
    that only missed another last."""
    for name, why in attempt.lost.items():
        ranks = [rank for rank, host in attempt.host_of.items() if host == name]
        return Failure("host", f"host {name} (ranks {_span(ranks)}) {why}", host=name)
    ends = sorted(
        attempt.ends.values(),
        key=lambda end: (end.code >= 0, end.code == EXIT_PEER_LOST, end.at),
    )
    failed = [end for end in ends if end.code not in (0, EXIT_PREEMPTED)]
    first = failed[0]
    where = f"rank {first.rank} on {first.host} (pid {first.pid})"
    if first.code < 0:
        names = {number.value: number.name for number in signal.Signals}  # but of real-time ones
        what = f"{where} was killed by {names.get(-first.code, f'signal {-first.code}')}"
        return Failure("rank", what, first.host, first.rank, first.code)
    told = attempt.last_words.get(first.rank, "it said nothing")
    kind: Kind = "bad input" if first.code == EXIT_BAD_INPUT else "rank"
    text = f"{where} ended with exit code {first.code}: {told}"
    # One that missed another says which in its message; its own host is not to blame.
    host = "" if first.code == EXIT_PEER_LOST else first.host
    return Failure(kind, text, host, first.rank, first.code)


class _Eyes:
    """Progress by the ranks' heartbeats, judged by this host's clock alone."""

    def __init__(self, run_dir: Path, bounds: Bounds, attempt: Attempt) -> None:
        self.run_dir = run_dir
        self.bounds = bounds
        self.attempt = attempt
        self.seen: dict[int, tuple[float, float]] = {}  # rank: what it wrote, when it was new here
        self.newest = 0.0  # of the times at which ranks came to what they do now
        self.steps_done = -1
        self.progress_at = time.monotonic()

    def look(self, on_step: Callable[[int], None]) -> Failure | None:
        now = time.monotonic()
        beats = [beat for beat in read_heartbeats(self.run_dir) if self._is_ours(beat)]
        for beat in beats:
            if self.seen.get(beat.rank, (0.0, 0.0))[0] != beat.time:
                self.seen[beat.rank] = (beat.time, now)
        newest = max((beat.phase_since for beat in beats), default=0.0)
        if newest != self.newest:  # a batch of an evaluation and a rollback are progress, too
            self.newest, self.progress_at = newest, now
        if len(beats) == len(self.attempt.host_of):
            done = min(beat.step for beat in beats)
            if done > self.steps_done and any(beat.phase != "start" for beat in beats):
                on_step(done)
                self.steps_done = done
        old = [
            beat
            for beat in beats
            if beat.rank not in self.attempt.ends
            and now - self.seen[beat.rank][1] > self.bounds.heartbeat_seconds
        ]
        # All at once is the file system's doing, or a full disk's, unless they are stopped.
        stopped = [beat for beat in old if self._state(beat) == "T"]
        if stopped or (old and len(old) < len(self.attempt.host_of)):
            late = stopped or old
            seconds = now - self.seen[late[0].rank][1]
            return self._blame(late, "has not written its heartbeat", seconds)
        if now - self.progress_at > self.bounds.stall_seconds:
            behind = min(beats, key=lambda beat: (beat.step, beat.phase_since), default=None)
            if behind is None:
                text = f"no rank has written a heartbeat in {now - self.progress_at:.0f} s"
                return Failure("stall", text)
            seconds = now - self.progress_at
            return self._blame([behind], "and all others made no progress", seconds)
        return None

    def _is_ours(self, beat: Heartbeat) -> bool:
        """Whether a rank of this attempt wrote it, and not one whose file is still there."""
        link = self.attempt.links.get(self.attempt.host_of.get(beat.rank, ""))
        return link is not None and link.pids.get(str(beat.rank)) == beat.pid

    def _state(self, beat: Heartbeat) -> str:
        """What the kernel of its host says of it."""
        return self.attempt.links[self.attempt.host_of[beat.rank]].states.get(str(beat.rank), "")

    def _blame(self, beats: list[Heartbeat], what: str, seconds: float) -> Failure:
        first = beats[0]
        host = self.attempt.host_of[first.rank]
        state = _STATES.get(self._state(first), "")
        doing = f"last in phase {first.phase} of step {first.step}"
        if first.waiting_for:
            doing += f", waiting for {first.waiting_for}"
        text = (
            f"{_named(self.attempt, [beat.rank for beat in beats])} (pid {first.pid}{state}) "
            f"{what} for {seconds:.0f} s, {doing}"
        )
        return Failure("stall", text, host, first.rank)


_STATES = {
    "T": ", stopped by a signal",
    "D": ", waiting for a device or file server",
    "Z": ", ended",
}


def _named(attempt: Attempt, ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank} on {attempt.host_of.get(rank, '?')}" for rank in ranks)


def _span(ranks: Sequence[int]) -> str:
    """Ranks of a host are neighbours."""
    return f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else ", ".join(map(str, ranks))
