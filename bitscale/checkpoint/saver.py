"""Saving while training goes on.

    begin()           every rank copies its state to host memory            (the training waits)
    a thread          writes, hashes and syncs this rank's shard            (the training goes on)
    poll() or finish()  once every rank's shard is durable, rank 0 publishes by one rename

The threads only write files. All communication is in `begin`, `poll` and `finish`, which every rank
calls from its main thread at the same step: it cannot interleave with the training's, and a rank
that writes slowly holds nobody up.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bitscale.checkpoint.directory import make_empty, prune, publish
from bitscale.checkpoint.format import Meta
from bitscale.checkpoint.write import Shard, Snapshot, take_snapshot, write_shard
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh


class Saved(NamedTuple):
    """A checkpoint that has just come into force."""

    path: Path
    meta: Meta
    seconds: float  # from the copy to publication
    blocked_seconds: float  # of these, what the training waited
    unpruned: str  # why an older checkpoint could not be deleted; "" if nothing kept it


@dataclass
class _Pending:
    """A save whose shards are being written."""

    final: Path
    staging: Path
    meta: Meta
    begun: float  # by the monotonic clock
    shard_name: str
    blocked_seconds: float = 0.0
    shard: Shard | None = None  # set by the thread, as its last act
    thread: threading.Thread | None = None

    def write(self, snapshot: Snapshot) -> None:
        self.shard = write_shard(self.staging / self.shard_name, snapshot)

    def written(self, *, wait: bool) -> Shard | None:
        """What this rank's thread has written, or its error; None while it still does."""
        assert self.thread is not None
        if wait:
            self.thread.join()
        if self.shard is None and not self.thread.is_alive():
            # Anything but an OSError is a bug; it must not leave the other ranks waiting.
            dead = f"{self.shard_name}: the writing thread has died, see its traceback"
            return self.shard or Shard(self.shard_name, error=dead)
        return self.shard


# What a rank says of its shard; the largest of all ranks counts.
_DURABLE, _BUSY, _FAILED = 0, 1, 2


class Saver:
    """Saves the checkpoints of one run, one at a time, and deletes old ones."""

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        keep_at: Collection[int] = (),
    ) -> None:
        """Into `root`; what stays there besides is up to `prune` (`keep_last` 0: everything)."""
        self._root = root
        self._mesh = mesh
        self._keep_last, self._keep_every, self._keep_at = keep_last, keep_every, keep_at
        self._pending: _Pending | None = None

    def begin(self, meta: Meta, fragments: Iterable[Fragment], rng_state: Tensor) -> None:
        """Copy this rank's part of a checkpoint and write it in the background (a collective).

        The save before has to be finished. Raises CheckpointError, on every rank, if the
        directory cannot be made.
        """
        assert self._pending is None, "finish() the save before"
        begun = time.perf_counter()
        final = self._root / f"step-{meta.step:08d}"
        staging = self._root / f".{final.name}.partial"
        _on_main(self._mesh, final, lambda: make_empty(staging))
        name = f"state-{self._mesh.rank:05d}-of-{self._mesh.world_size:05d}.safetensors"
        snapshot = take_snapshot(fragments, rng_state)
        pending = _Pending(final, staging, meta, begun, name)
        # A daemon: nobody publishes what it writes once this process is on its way out.
        pending.thread = threading.Thread(target=pending.write, args=(snapshot,), daemon=True)
        pending.thread.start()
        pending.blocked_seconds = time.perf_counter() - begun
        self._pending = pending

    def poll(self) -> Saved | None:
        """Publish the pending save if every rank's shard is durable (a collective).

        Raises CheckpointError, on every rank, as soon as one has failed to write.
        """
        if self._pending is None:
            return None
        shard = self._pending.written(wait=False)
        state = _BUSY if shard is None else _FAILED if shard.error else _DURABLE
        worst = self._mesh.max(state)
        if worst == _FAILED:
            final, self._pending = self._pending.final, None
            _refuse(final, self._mesh.gather_objects(shard.error if shard else ""))
        return self.finish() if worst == _DURABLE else None

    def finish(self) -> Saved | None:
        """Wait for the pending save, if there is one, and publish it (a collective).

        Raises CheckpointError, on every rank, if one could not write.
        """
        if self._pending is None:
            return None
        begun = time.perf_counter()
        pending, self._pending = self._pending, None
        mesh, final = self._mesh, pending.final
        shards = mesh.gather_objects(pending.written(wait=True))
        written = [shard for shard in shards if shard is not None]
        _refuse(final, [shard.error for shard in written])
        meta = replace(
            pending.meta,
            adam_steps={name: step for s in written for name, step in s.adam_steps.items()},
            files={shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in written},
        )
        _on_main(mesh, final, lambda: publish(pending.staging, final, meta))
        unpruned = self._prune() if mesh.is_main and self._keep_last else ""
        now = time.perf_counter()
        blocked_seconds = pending.blocked_seconds + now - begun
        return Saved(final, meta, now - pending.begun, blocked_seconds, unpruned)

    def _prune(self) -> str:
        try:
            prune(self._root, self._keep_last, self._keep_every, self._keep_at)
        except OSError as error:
            return str(error)  # the run is safe, only the disk is fuller than it should be
        return ""


def save(
    root: Path, meta: Meta, fragments: Iterable[Fragment], mesh: Mesh, *, rng_state: Tensor
) -> Path:
    """Write `root/step-N` from every rank (a collective), wait for it, and move `latest` to it.

    Returns its path. Raises CheckpointError on every rank if one rank could not write.
    """
    saver = Saver(root, mesh)
    saver.begin(meta, fragments, rng_state)
    saved = saver.finish()
    assert saved is not None
    return saved.path


def _on_main(mesh: Mesh, final: Path, action: Callable[[], None]) -> None:
    """Rank 0 acts, all wait; what the file system refuses it is an error on every rank, since
    the others would wait for ever for a rank that has gone."""
    error = ""
    if mesh.is_main:
        try:
            action()
        except OSError as refusal:
            error = str(refusal)
    _refuse(final, mesh.gather_objects(error))


def _refuse(final: Path, errors: list[str]) -> None:
    for error in filter(None, errors):
        raise CheckpointError(
            f"{final}: not saved, {error}; the previous checkpoint remains in force: make room, "
            "or make the directory writable, and resume from it"
        )
