"""What is in a checkpoint: `meta.json`, its checksum, and the keys of the state files' tensors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.names_in_files import is_plain

FORMAT = "bitscale-checkpoint-2"
_FORMATS = ("bitscale-checkpoint-1", FORMAT)  # 1 has no SHA256SUMS
META_NAME = "meta.json"
SUMS_NAME = "SHA256SUMS"
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
    # What the run's guard had changed before the save, see config/amendments.py.
    amendments: list[dict[str, Any]] = field(default_factory=list)
    adam_steps: dict[str, int] = field(default_factory=dict)  # Adam's own count, by parameter
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {bytes, sha256}
    format: str = FORMAT


def read_meta(path: Path) -> Meta:
    """Parse `path/meta.json` and hold it to the checksum in `path/SHA256SUMS`.

    Raises CheckpointError if either is missing, unreadable or damaged, or of another format.
    """
    file = path / META_NAME
    try:
        content = file.read_bytes()
        tree = json.loads(content.decode("utf-8"))
        # Before the checksum: a later format may keep it elsewhere.
        if tree.get("format") not in _FORMATS:
            raise CheckpointError(
                f"{file}: format {tree.get('format')!r}, this version reads "
                f"{' and '.join(map(repr, _FORMATS))}; use the bitscale that wrote it"
            )
        _verify_meta(path, content, required=tree["format"] == FORMAT)
        meta = Meta(**tree)
        strange = [name for name in meta.files if not is_plain(name)]
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing; the checkpoint is incomplete: use another checkpoint"
        ) from None
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); use another checkpoint") from error
    if strange:
        raise CheckpointError(
            f"{file}: names {strange[0]!a}, which is not a file of its own directory; do not use a "
            "checkpoint of unknown origin"
        )
    return meta


def _verify_meta(path: Path, content: bytes, *, required: bool) -> None:
    sums = path / SUMS_NAME
    if not sums.is_file():
        if required:
            raise CheckpointError(
                f"{sums}: missing; the checkpoint is incomplete: use another checkpoint"
            )
        return
    lines = sums.read_text(errors="replace").splitlines()
    if f"{hashlib.sha256(content).hexdigest()}  {META_NAME}" not in lines:
        raise CheckpointError(
            f"{path / META_NAME}: checksum differs from {SUMS_NAME}; damaged, or edited by hand: "
            "use another checkpoint"
        )


def sums_text(digests: Mapping[str, str]) -> str:
    """SHA256SUMS for these files (name -> hex digest): what `sha256sum -c` reads."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The file system refuses `path`, which may well be sound."""
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror or error}); give this user the permission, or "
        "mend the file system"
    )


def views(fragment: Fragment) -> dict[str, Tensor]:
    """What is saved of a fragment, by kind: the master, and the moments that the optimizer has."""
    return {"master": fragment.master, **fragment.moments()}


def key_of(fragment: Fragment, kind: str) -> str:
    """`layers.0.attn.q.weight|exp_avg|4096`: parameter, kind, first flat element; and for a
    tensor-parallel part `|0:128:256`: of rows (0) or columns (1) 128 to 255, counted within it."""
    key, shard = f"{fragment.name}|{kind}|{fragment.start}", fragment.shard
    return key if shard is None else f"{key}|{shard.dim}:{shard.start}:{shard.end}"
