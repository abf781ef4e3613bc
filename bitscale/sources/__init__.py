"""Resuming from elsewhere: other programs' checkpoints as a `StateSource`.

`locate` says what a path means, `open_state` opens it. Formats and limits: docs/checkpoints.md.
"""

from pathlib import Path

from bitscale import checkpoint
from bitscale.checkpoint.source import StateSource
from bitscale.config import Config
from bitscale.errors import CheckpointError
from bitscale.names_in_files import is_plain
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
    "open_tensors",
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

    Optimizer state comes first: transformers' Trainer puts DeepSpeed's beside weights of its own.

    Raises CheckpointError if there is none in a known format.
    """
    state = _training_state(path)
    if state is not None:
        return state
    return path if is_huggingface(path) else checkpoint.resolve(path)


def holds_training_state(path: Path) -> bool:
    """Whether `path` is, or leads to, a checkpoint with optimizer state of another program."""
    return _training_state(path) is not None


def _training_state(path: Path) -> Path | None:
    for candidate in (path, *(path / name for name in _named_by(path))):
        if any(is_format(candidate) for is_format, _ in _FORMATS):
            return candidate
    return None


def open_state(path: Path, cfg: Config, *, verify: tuple[int, int] = (0, 1)) -> StateSource:
    """The state at `path`, a result of `locate`, by the names of `cfg`'s model.

    `cfg.model.vocab_size` is set; `verify` is checkpoint.Reader's.

    Raises CheckpointError for a damaged checkpoint, for one of another model, and for a pickle
    that holds code.
    """
    if any(is_format(path) for is_format, _ in _FORMATS):
        return ForeignSource(open_tensors(path), cfg)
    if is_huggingface(path):
        return ForeignSource(open_huggingface(path, cfg.data.seq_len), cfg)
    return checkpoint.Reader(path, verify=verify)


def open_tensors(path: Path) -> Tensors:
    """What a checkpoint with optimizer state of another program holds, under its own names.

    Raises CheckpointError for a damaged one, and for a pickle that holds code.
    """
    readers = [reader for is_format, reader in _FORMATS if is_format(path)]
    if not readers:
        raise CheckpointError(f"{path}: neither DeepSpeed's nor Megatron-core's checkpoint")
    return readers[0](path)


def _named_by(root: Path) -> list[str]:
    files = (root / pointer for pointer in _POINTERS)
    names = [file.read_text().strip() for file in files if file.is_file()]
    megatron = root / "latest_checkpointed_iteration.txt"
    if megatron.is_file():
        iteration = megatron.read_text().strip()
        names.append(f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
    for name in names:
        if not is_plain(name):
            raise CheckpointError(
                f"{root}: its newest checkpoint is said to be {name[:60]!a}, which is not a "
                "directory in it; name the checkpoint itself"
            )
    return names
