"""Tensors of a published model by name: safetensors or plain pickled tensors, in several files.

One tensor is read at a time. Nothing in a file is executed.
"""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitscale.convert.tensor_file import INDEX_NAME
from bitscale.errors import CheckpointError

_PICKLE_NAME = "pytorch_model.bin"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TensorReader:
    """The tensors of a model's directory.

    Raises CheckpointError for missing, damaged or inconsistent files, and for pickles that hold
    more than tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._get: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files = weight_files(directory)
        if not files:
            raise CheckpointError(
                f"{directory}: neither model.safetensors nor its index nor {_PICKLE_NAME}; name "
                "the directory that holds the weights"
            )
        for file, names in files.items():
            self._open(file, names)

    def read(self, name: str) -> Tensor:
        """The tensor in the dtype of its file."""
        return self._get[name]()

    def floating(self, name: str) -> Tensor:
        """The same, but fp32 instead of 64-bit numbers, whose range nothing else here has.

        Raises CheckpointError if the file holds integers or 8-bit floats.
        """
        tensor = self.read(name)
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.directory}: {name} is {str(tensor.dtype).removeprefix('torch.')}, not a "
                "16- or 32-bit number; import the model as it was before it was quantized"
            )
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def _open(self, file: Path, listed: Iterable[str] | None) -> None:
        is_pickle = file.suffix == ".bin"
        tensors = _open_pickle(file) if is_pickle else _open_safetensors(file)
        if listed is not None and (lost := sorted(set(listed) - set(tensors))):
            raise CheckpointError(
                f"{file}: {lost[0]} is not in it, though the index says so ({len(lost)} such "
                "tensors); copy the model again"
            )
        for name, (shape, get) in tensors.items():
            if name in self._get:
                raise CheckpointError(f"{file}: {name} is in another file too; copy it again")
            self.shapes[name], self._get[name] = shape, get


_Opened = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files that hold a model's tensors, with the names that an index expects in each; empty
    if there are none by these names.

    In transformers' order: the whole file comes before an index, which `save_pretrained` leaves
    behind when it writes over a model in shards.
    """
    for whole in (directory / "model.safetensors", directory / _PICKLE_NAME):
        index = directory / (INDEX_NAME if whole.suffix != ".bin" else f"{_PICKLE_NAME}.index.json")
        if whole.is_file():
            return {whole: None}
        if index.is_file():
            return _indexed(index)
    return {}


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not a name in this directory")
            names = files.setdefault(index.parent / file, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged ({error}); copy the model again") from error
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though {index.name} lists it; copy it again")
    return files


def _open_safetensors(file: Path) -> _Opened:
    try:
        handle: Any = safe_open(file, framework="pt")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: damaged or not a safetensors file ({error}); copy it again"
        ) from error

    def getter(name: str) -> Callable[[], Tensor]:
        return lambda: handle.get_tensor(name)

    return {name: (shape, getter(name)) for name, shape in shapes.items()}


def _open_pickle(file: Path) -> _Opened:
    try:
        mapped = zipfile.is_zipfile(file)  # those of before PyTorch 1.6 are read whole
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler of hostile bytes raises anything
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{file}: not plain tensors, and nothing else is unpickled because it could run code "
            f"({reason}); ask its publisher for safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(
            f"{file}: not a dictionary of tensors; ask its publisher for safetensors"
        )

    def getter(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    return {name: (tuple(t.shape), getter(t)) for name, t in tensors.items()}
