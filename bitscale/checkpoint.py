"""Layout-free checkpoints: fp32 masters and Adam moments as fragments in safetensors.

A checkpoint is a directory `step-00000200/`:

    state-00000-of-00002.safetensors   one a rank: flat fp32 fragments, see `_key`
    meta.json                          step, shapes, configuration, fingerprints, file checksums

Any number of ranks at any ZeRO stage can read what any other wrote: a reader takes the flat
ranges it needs out of whichever files hold them. 16-bit compute weights are not stored; they are
the rounded masters, exactly. Nothing in the directory is executable (no pickle).

A checkpoint comes into being by one rename after everything in it is durable; then `latest`
moves. A crash at any moment leaves the previous one in force.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitscale.engine.fragments import MOMENTS, Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh
from bitscale.model.collectives import ParameterShard

FORMAT = "bitscale-checkpoint-1"
_KINDS = ("master", *MOMENTS)
ANY = "any"  # in Meta.identity: what a run that starts from this checkpoint may choose


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    step: int  # optimizer steps completed
    tokens: int  # tokens consumed
    lambda_weight: float
    lambda_activation: float
    config: dict[str, Any]  # resolved configuration, as in config.yaml
    config_hash: str
    identity: dict[str, str]  # what a resumed run must share, see run.identity
    shapes: dict[str, list[int]]  # logical shape of every parameter
    world_size: int
    versions: dict[str, str]
    adam_steps: dict[str, int] = field(default_factory=dict)  # Adam's own count, by parameter
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {bytes, sha256}
    format: str = FORMAT


def save(
    root: Path,
    meta: Meta,
    fragments: Iterable[Fragment],
    mesh: Mesh,
    *,
    rng_state: Tensor,
) -> Path:
    """Write `root/step-N` from every rank (a collective) and move `latest` to it.

    Returns its path. Raises CheckpointError on every rank if one rank could not write.
    """
    final = root / f"step-{meta.step:08d}"
    staging = root / f".{final.name}.partial"
    _on_main(mesh, final, lambda: _make_empty(staging))
    name = f"state-{mesh.rank:05d}-of-{mesh.world_size:05d}.safetensors"
    shards = mesh.gather_objects(_write_shard(staging / name, fragments, rng_state))
    _refuse(final, [shard.error for shard in shards])
    adam_steps = {name: step for shard in shards for name, step in shard.adam_steps.items()}
    files = {shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
    whole = replace(meta, adam_steps=adam_steps, files=files)
    _on_main(mesh, final, lambda: _publish(staging, final, whole))
    return final


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


def prune(root: Path, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints beyond the last `keep_last`, but never multiples of `keep_every`."""
    for path in list_checkpoints(root)[:-keep_last]:
        if not (keep_every and _step_of(path) % keep_every == 0):
            # Renamed first: a kill in the middle leaves nothing that looks whole.
            doomed = root / f".{path.name}.deleted"
            path.rename(doomed)
            shutil.rmtree(doomed)
    for kind in ("deleted", "partial"):  # what a kill during prune or save has left
        for leftover in root.glob(f".step-*.{kind}"):
            shutil.rmtree(leftover)


def rewind(root: Path, checkpoint: Path) -> list[Path]:
    """Make `checkpoint`, one of `root`'s, the one in force before a run continues from it.

    Later ones are of a history that is being rewritten: they are kept as `superseded-step-...`.
    Returns them.
    """
    later = [path for path in list_checkpoints(root) if path.name > checkpoint.name]
    _point_latest(checkpoint)
    for path in later:
        _supersede(path)
    return later


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / "meta.json").is_file())


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint in force, or None if there is none yet.

    A crash between the rename and the move of `latest` leaves `latest` one behind; both are
    whole, and the older one is then in force.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        whole = list_checkpoints(root)
        return whole[-1] if whole else None
    path = root / pointer.read_text().strip()
    if not (path / "meta.json").is_file():
        raise CheckpointError(
            f"{pointer} names {path.name!r}, which is missing or incomplete; write the name of "
            f"one of {[p.name for p in list_checkpoints(root)]} into it, or delete it"
        )
    return path


def resolve(path: Path) -> Path:
    """The checkpoint directory that a user means: a checkpoint, a run, or its checkpoints/."""
    if (path / "meta.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = latest_checkpoint(root) if root.is_dir() else None
        if found is not None:
            return found
    raise CheckpointError(
        f"{path}: no checkpoint here; name a run directory, or a step-... directory with a "
        "meta.json in it"
    )


def read_meta(path: Path) -> Meta:
    """Parse `path/meta.json`."""
    file = path / "meta.json"
    try:
        tree = json.loads(file.read_text())
        if tree.get("format") != FORMAT:
            raise CheckpointError(
                f"{file}: format {tree.get('format')!r}, this version reads {FORMAT!r}"
            )
        return Meta(**tree)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing; the checkpoint is incomplete: use another checkpoint"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); use another checkpoint") from error


_Part = tuple[int, int, int]  # dimension, start and end of a tensor-parallel part


class _Piece(NamedTuple):
    """A flat range of a parameter, or of a part of it, and where it is."""

    start: int
    numel: int
    file: str
    key: str
    part: _Part | None


class Reader:
    """Reads flat ranges of any parameter's master or moments out of a checkpoint.

    Every file is verified against its checksum before its first byte is used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = read_meta(path)
        self._handles: dict[str, Any] = {}
        self._index: dict[tuple[str, str], list[_Piece]] = {}  # by parameter and kind
        self._whole: tuple[tuple[str, str], Tensor] | None = None  # the last one put together
        for name in self.meta.files:
            self._open(name)

    def read(
        self, name: str, kind: str, start: int, numel: int, shard: ParameterShard | None = None
    ) -> Tensor:
        """fp32 [numel]: elements [start, start + numel) of parameter `name`, or of its `shard`.

        `kind` is "master", "exp_avg" or "exp_avg_sq".
        """
        wanted = None if shard is None else (shard.dim, shard.start, shard.end)
        pieces = self._index.get((name, kind), [])
        if all(piece.part == wanted for piece in pieces):
            return self._read_flat(name, kind, wanted, start, numel)
        # Written by another number of tensor-parallel ranks.
        if self._whole is None or self._whole[0] != (name, kind):
            self._whole = ((name, kind), self._put_together(name, kind))
        whole = self._whole[1]
        return (whole if shard is None else shard.of(whole)).reshape(-1)[start : start + numel]

    def _put_together(self, name: str, kind: str) -> Tensor:
        shape = self.meta.shapes[name]
        whole = torch.empty(shape)
        num_rows = 0
        for part in sorted({piece.part for piece in self._index[name, kind]}, key=str):
            if part is None:
                return self._read_flat(name, kind, None, 0, whole.numel()).view(shape)
            dim, start, end = part
            place = whole.narrow(dim, start, end - start)
            flat = self._read_flat(name, kind, part, 0, place.numel())
            place.copy_(flat.view(place.shape))
            num_rows += end - start
            if num_rows == shape[dim]:
                return whole
        raise CheckpointError(
            f"{self.path}: {name} ({kind}) is not all there: parts of tensor-parallel ranks are "
            "missing; the checkpoint is incomplete: use another"
        )

    def _read_flat(
        self, name: str, kind: str, part: _Part | None, start: int, numel: int
    ) -> Tensor:
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for piece in self._index.get((name, kind), []):
            low = max(start, piece.start)
            high = min(start + numel, piece.start + piece.numel)
            if piece.part == part and low < high:
                values = self._handles[piece.file].get_slice(piece.key)
                out[low - start : high - start] = values[low - piece.start : high - piece.start]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self.path}: {name} ({kind}) has {filled} of the {numel} elements wanted; "
                "the checkpoint is of another model or incomplete"
            )
        return out

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 master in its logical shape), one at a time."""
        for name, shape in self.meta.shapes.items():
            yield name, self.read(name, "master", 0, math.prod(shape)).view(shape)

    def rng_state(self, rank: int) -> Tensor | None:
        """The CPU generator state that `rank` saved; None if there was no such rank."""
        name = f"state-{rank:05d}-of-{self.meta.world_size:05d}.safetensors"
        return self._handles[name].get_tensor("rng_state") if name in self._handles else None

    def restore(
        self,
        fragments: Iterable[Fragment],
        shapes: Mapping[str, Sequence[int]],
        optional: Collection[str] = (),
    ) -> None:
        """Fill this rank's fragments of a model with these parameter `shapes`, in place.

        Parameters in `optional` may be missing on either side: what the model has and the
        checkpoint has not stays as it was built, its Adam state new but for the step count.

        Raises CheckpointError if the checkpoint's parameters are others.
        """
        missing = {name for name in optional if (name in shapes) != (name in self.meta.shapes)}
        for name in sorted((shapes.keys() | self.meta.shapes.keys()) - missing):
            ours, theirs = shapes.get(name), self.meta.shapes.get(name)
            if ours is None or theirs is None or list(ours) != list(theirs):
                raise CheckpointError(
                    f"{self.path}: {name} has shape {_shown(theirs)} there and {_shown(ours)} "
                    "here; the checkpoint is of another model: use its model section"
                )
        for fragment in fragments:
            if fragment.name in missing:
                # The count that ZeRO's flat tensors share, and a gradient of 0 would have left.
                fragment.step.fill_(max(self.meta.adam_steps.values()))
                continue
            for kind, view in zip(_KINDS, _views(fragment), strict=True):
                start, numel, shard = fragment.start, fragment.numel, fragment.shard
                view.copy_(self.read(fragment.name, kind, start, numel, shard))
            fragment.step.fill_(self.meta.adam_steps[fragment.name])

    def _open(self, name: str) -> None:
        path, expected = self.path / name, self.meta.files[name]
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, though meta.json lists it; use another checkpoint"
            )
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes instead of {expected['bytes']}; truncated "
                "or foreign: use another checkpoint"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(
                f"{path}: checksum differs from meta.json; damaged or foreign: use another "
                "checkpoint"
            )
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a safetensors file ({error}); use another checkpoint"
            ) from error
        self._handles[name] = handle
        for key in handle.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
            if "|" in key:
                parameter, kind, start, *rest = key.split("|")
                numel = handle.get_slice(key).get_shape()[0]  # type: ignore[no-untyped-call]
                part = cast(_Part, tuple(map(int, rest[0].split(":")))) if rest else None
                piece = _Piece(int(start), numel, name, key, part)
                self._index.setdefault((parameter, kind), []).append(piece)


def _shown(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


@dataclass(frozen=True)
class _Shard:
    """What one rank wrote, or the error that kept it (so that no rank waits for ever)."""

    name: str
    bytes: int = 0
    sha256: str = ""
    adam_steps: dict[str, int] = field(default_factory=dict)
    error: str = ""


def _write_shard(path: Path, fragments: Iterable[Fragment], rng_state: Tensor) -> _Shard:
    tensors = {"rng_state": rng_state}
    adam_steps = {}
    for fragment in fragments:
        adam_steps[fragment.name] = int(fragment.step)
        if fragment.saved_here:
            for kind, view in zip(_KINDS, _views(fragment), strict=True):
                # A copy: safetensors refuses views that share a storage.
                tensors[_key(fragment, kind)] = view.detach().cpu().clone()
    try:
        save_file(tensors, path)
        give_ordinary_mode(path)
        _fsync(path)
        return _Shard(path.name, path.stat().st_size, _sha256(path), adam_steps)
    except (OSError, SafetensorError) as error:
        return _Shard(path.name, error=f"{path.name}: {error}")


def _views(fragment: Fragment) -> tuple[Tensor, Tensor, Tensor]:
    return fragment.master, fragment.exp_avg, fragment.exp_avg_sq


def _key(fragment: Fragment, kind: str) -> str:
    """`layers.0.attn.q.weight|exp_avg|4096`: parameter, kind, first flat element; and for a
    tensor-parallel part `|0:128:256`: of rows (0) or columns (1) 128 to 255, counted within it."""
    key, shard = f"{fragment.name}|{kind}|{fragment.start}", fragment.shard
    return key if shard is None else f"{key}|{shard.dim}:{shard.start}:{shard.end}"


def _make_empty(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _publish(staging: Path, final: Path, meta: Meta) -> None:
    meta_file = staging / "meta.json"
    meta_file.write_text(json.dumps(asdict(meta), indent=1) + "\n")
    _fsync(meta_file)
    _fsync(staging)
    if final.exists():  # left by a crash between the rename and the move of `latest`
        _supersede(final)
    staging.rename(final)
    _fsync(final.parent)
    _point_latest(final)


def _point_latest(checkpoint: Path) -> None:
    pointer = checkpoint.parent / ".latest.partial"
    pointer.write_text(checkpoint.name + "\n")
    _fsync(pointer)
    pointer.replace(checkpoint.parent / "latest")
    _fsync(checkpoint.parent)


def _supersede(checkpoint: Path) -> None:
    """Keep `checkpoint` under a name that is never resumed from."""
    aside = checkpoint.with_name(f"superseded-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def give_ordinary_mode(path: Path) -> None:
    """safetensors creates files for their owner only; a team reads each other's checkpoints."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
