"""GGUF files read without trusting them: header, metadata, tensors as views of the mapped file.

gguf-py's reader knows no I2_S, takes seconds for a large vocabulary, and believes every length.
The format (version 2 and 3, little endian): magic, version, number of tensors and of metadata
pairs; the pairs; for each tensor name, dimensions (columns first), type, offset; then, aligned, the
data.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitscale.errors import CheckpointError

MAGIC = b"GGUF"
CERTIFICATE_KEY = "bitscale.certificate"  # JSON, see certificate.py
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_DEPTH = 4  # of arrays in arrays
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


class TensorType(NamedTuple):
    """Elements are stored in blocks of `block`, of `bytes` each."""

    name: str
    number: int
    block: int
    bytes: int


_ALL = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4),
    ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("I2_S", 36, 4, 1), ("MXFP4", 39, 32, 17),
)  # fmt: skip
TYPES = {name: TensorType(name, *rest) for name, *rest in _ALL}
_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
_I2_S_TAIL = 32


class GgufTensor(NamedTuple):
    name: str
    type: TensorType
    shape: tuple[int, ...]  # rows first
    offset: int  # in the file
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """What a file says, and its tensors' bytes."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    _data: Tensor  # uint8, the whole file, mapped

    def bytes_of(self, tensor: GgufTensor) -> Tensor:
        """uint8 [num_bytes], a view of the file: not to be written to."""
        return self._data[tensor.offset : tensor.offset + tensor.num_bytes]


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> GgufFile:
    """Map `path`. CheckpointError if it is no GGUF file, truncated, or damaged."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error})") from error
    cursor = _Cursor(path, data)
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC!r}")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}; 2 and 3 are read, little endian: convert it with a "
            "current llama.cpp"
        )
    num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise cursor.damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {info.name: info._replace(offset=info.offset + start) for info in infos}
    if len(tensors) != len(infos):
        raise cursor.damaged("a tensor name stands twice")
    for tensor in tensors.values():
        if tensor.offset + tensor.num_bytes > len(data):
            raise CheckpointError(
                f"{path}: truncated: {tensor.name} ends at byte {tensor.offset + tensor.num_bytes} "
                f"and the file at {len(data)}; copy or export it again"
            )
    whole = torch.frombuffer(data, dtype=torch.uint8)
    return GgufFile(path, version, metadata, tensors, whole)


def _tensor_info(cursor: "_Cursor") -> GgufTensor:
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if num_dimensions > _MOST_DIMENSIONS:
        raise cursor.damaged(f"{name} has {num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))[::-1]
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    kind = _BY_NUMBER.get(number)
    if kind is None:
        raise CheckpointError(
            f"{cursor.path}: {name} has the unknown tensor type {number}; this version knows "
            f"{', '.join(TYPES)}"
        )
    elements = math.prod(shape)
    if shape and shape[-1] % kind.block and kind.name != "I2_S":
        raise cursor.damaged(f"{name} has {shape[-1]} columns in blocks of {kind.block}")
    size = elements // kind.block * kind.bytes + _I2_S_TAIL * (kind.name == "I2_S")
    return GgufTensor(name, kind, shape, offset, size)


class _Cursor:
    """A position in the file; nothing is read beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.position, self._data = path, 0, data

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise CheckpointError(
                f"{self.path}: truncated: its header goes on beyond the end of the file, byte "
                f"{len(self._data)}; copy or export it again"
            )
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        return raw.decode("utf-8", errors="replace")  # of tokens, which may be parts of characters

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _MOST_DEPTH:
            raise self.damaged(f"metadata of the unknown type {kind}")
        element, count = self.scalar("I"), self.scalar("Q")
        code = _SCALARS.get(element)
        if code is not None:
            raw = self.take(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self.value(element, depth + 1) for _ in range(count)]

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF file: {reason}")
