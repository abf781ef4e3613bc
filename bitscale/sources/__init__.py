"""Resuming from elsewhere: other programs' checkpoints as a `StateSource`.

`locate` says what a path means, `open_state` opens it. Formats and limits: docs/checkpoints.md.
"""

from pathlib import Path

from bitscale import checkpoint
from bitscale.checkpoint.source import StateSource
from bitscale.config import Config
from bitscale.sources.foreign import ForeignSource, Tensors
from bitscale.sources.huggingface import is_huggingface, open_huggingface
from bitscale.sources.megatron import is_megatron, open_megatron
from bitscale.sources.universal import is_universal, open_universal
from bitscale.sources.zero import is_zero, open_zero

__all__ = [
    "ForeignSource",
    "StateSource",
    "Tensors",
    "holds_training_state",
    "locate",
    "open_state",
]

# Asked in this order: is it this format, and its reader.
_FORMATS = (
    (is_universal, open_universal),
    (is_zero, open_zero),
    (is_megatron, open_megatron),
)
# Files with which a program says where its newest checkpoint is.
_POINTERS = ("latest", "latest_universal")


def locate(path: Path) -> Path:
    """The checkpoint directory that a user means by `path`: a checkpoint, or a directory of them.

    Raises CheckpointError if there is none in a known format.
    """
    candidates = [path, *(path / name for name in _named_by(path))]
    for candidate in candidates:
        if is_huggingface(candidate) or any(is_format(candidate) for is_format, _ in _FORMATS):
            return candidate
    return checkpoint.resolve(path)


def holds_training_state(path: Path) -> bool:
    """Whether `path` is, or leads to, a checkpoint with optimizer state of another program."""
    candidates = [path, *(path / name for name in _named_by(path))]
    return any(is_format(c) for c in candidates for is_format, _ in _FORMATS)


def open_state(path: Path, cfg: Config, *, verify: tuple[int, int] = (0, 1)) -> StateSource:
    """The state at `path`, a result of `locate`, by the names of `cfg`'s model.

    `cfg.model.vocab_size` is set; `verify` is checkpoint.Reader's.

    Raises CheckpointError for a damaged checkpoint, for one of another model, and for a pickle
    that holds code.
    """
    for is_format, reader in _FORMATS:
        if is_format(path):
            return ForeignSource(reader(path), cfg)
    if is_huggingface(path):
        return ForeignSource(open_huggingface(path, cfg.data.seq_len), cfg)
    return checkpoint.Reader(path, verify=verify)


def _named_by(root: Path) -> list[str]:
    files = (root / pointer for pointer in _POINTERS)
    names = [file.read_text().strip() for file in files if file.is_file()]
    megatron = root / "latest_checkpointed_iteration.txt"
    if megatron.is_file():
        iteration = megatron.read_text().strip()
        names.append(f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
    return names
