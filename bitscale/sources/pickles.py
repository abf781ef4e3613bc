"""Reading files of torch.save and torch's distributed checkpoints without running what is in them.

A pickle names classes and functions that its reader imports and calls. Here nothing is imported:
of the names a file holds, those of tensors are PyTorch's own, those in the caller's list become
`Inert` (a record of what the file says of the object), and any other name refuses the file.
"""

import contextlib
import fnmatch
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, NoReturn, Self

import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from bitscale.errors import CheckpointError


class Inert:
    """An object of a foreign class: arguments of its constructor and attributes, no behaviour."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Self:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute that the object had."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


def plain(value: Any) -> Any:
    """`value`, or for a foreign Enum the value of its member."""
    if isinstance(value, Inert) and len(value.arguments) == 1:
        return value.arguments[0]
    return value


def load_tensors(file: Path | BinaryIO, where: Path, harmless: Collection[str] = ()) -> Any:
    """What torch.save wrote into `file`, on the CPU; a path is mapped, not read.

    Args:
        where: the file's name in errors.
        harmless: patterns of names of classes that become `Inert`.

    Raises CheckpointError for anything else in it than tensors and plain values.
    """
    try:
        with _no_safe_globals():
            found = get_unsafe_globals_in_checkpoint(file)
            for name in found:
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless):
                    _refuse(where, name)
            if not isinstance(file, Path):
                file.seek(0)
            add_safe_globals([(_inert_class(name), name) for name in found])
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path) or None
            )
    except UnpicklingError as error:
        # torch.load wraps the reason into advice on how to run the code after all.
        reason = " ".join(str(error.__context__ or error).split())
        raise CheckpointError(
            f"{where}: refused, its pickle holds more than tensors ({reason[:200]}); "
            "use a checkpoint of plain tensors"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the decoder stumble over
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{where}: not a readable torch.save file ({reason}); truncated or foreign: "
            "use another checkpoint"
        ) from error


@contextlib.contextmanager
def _no_safe_globals() -> Iterator[None]:
    """Without the classes that other libraries have declared safe in this process; as before
    afterwards."""
    kept = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(kept)


def _refuse(where: Path, name: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: refused, its pickle names {name}, which is code, not a tensor; nothing of it "
        "was run: save plain tensors, numbers and text only"
    )


def _inert_class(name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {})


# What torch.distributed.checkpoint's `.metadata` is made of. Read as what they are: plain
# dataclasses of torch, of which one is the key of a dict and must hash.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}
# What megatron-core adds to it, of which nothing is needed.
_METADATA_INERT = (
    "megatron.core.dist_checkpointing.strategies.*",
    "torch.distributed.checkpoint.planner.*",
    "pathlib.*",
)


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, where: Path) -> None:
        super().__init__(file)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if full in ("torch.Size", "collections.OrderedDict"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full == "torch.serialization._get_layout":
            return super().find_class(module, name)
        if any(fnmatch.fnmatchcase(full, pattern) for pattern in _METADATA_INERT):
            return _inert_class(full)
        _refuse(self._where, full)


def load_metadata(file: Path) -> Any:
    """The `torch.distributed.checkpoint.metadata.Metadata` in `file`, by an explicit list of
    classes; CheckpointError for any other."""
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream, file).load()
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(
            f"{file}: not the index of a torch distributed checkpoint ({error}); truncated or "
            "foreign: use another checkpoint"
        ) from error
    if not hasattr(metadata, "state_dict_metadata"):
        raise CheckpointError(f"{file}: holds {type(metadata).__name__}, not an index of tensors")
    return metadata
