"""Token shards in Megatron's indexed format: `PREFIX.bin` (token ids) and `PREFIX.idx` (index).

Own reader and writer, because importing megatron-core takes four seconds and pulls in torch,
which neither a data worker nor `bitscale prepare` needs. The bytes are those of megatron-core
0.16.1's `IndexedDatasetBuilder`; tests compare both directions with megatron-core itself.

Layout of the index, little-endian: magic (9 bytes), version u64 = 1, dtype code u8, number of
sequences S u64, number of document boundaries D + 1 u64, then S sequence lengths i32, S byte
offsets into `.bin` i64, D + 1 document boundaries i64 (counted in sequences).
"""

from __future__ import annotations

import os
import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from bitscale.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries

# Megatron's codes, without its two floating-point types, which cannot hold token ids.
DTYPE_BY_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}

REMEDY = "prepare the corpus again (`bitscale prepare ... --overwrite`) or copy it again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 below 65,500 ids, else int32: Megatron's `DType.optimal_dtype`."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class TokenShard:
    """A shard opened for reading, memory-mapped; cheap to pickle (it is opened again).

    Attributes:
        prefix: the path without `.bin` and `.idx`.
        num_tokens: tokens in the shard.
        num_documents: documents in the shard (a document may hold several sequences).
        dtype: NumPy dtype of the token ids on disk.
        document_starts: int64 [num_documents + 1], token offset of each document's first token;
            the last entry is `num_tokens`.

    Raises DataError when a file is missing, truncated, or not an indexed token shard.
    """

    prefix: Path
    num_tokens: int
    num_documents: int
    dtype: np.dtype[Any]
    document_starts: npt.NDArray[np.int64]

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index = _read_index(_idx_path(self.prefix))
        bin_path = _bin_path(self.prefix)
        _check_bin_size(bin_path, index)
        self.dtype = index.dtype
        self.num_tokens = int(index.lengths.sum(dtype=np.int64))
        self.num_documents = len(index.boundaries) - 1
        sequence_starts = np.zeros(len(index.lengths) + 1, dtype=np.int64)
        np.cumsum(index.lengths, out=sequence_starts[1:])
        self.document_starts = sequence_starts[index.boundaries]
        if self.num_tokens == 0:
            self._tokens = np.empty(0, dtype=self.dtype)  # an empty file cannot be mapped
        else:
            self._tokens = np.asarray(np.memmap(bin_path, dtype=self.dtype, mode="r"))

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids [start, stop) as a read-only view on the mapped file, dtype `self.dtype`."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._tokens[start:stop]

    def __reduce__(self) -> tuple[type[TokenShard], tuple[Path]]:
        return TokenShard, (self.prefix,)


class ShardWriter:
    """Writes a shard; use it as a context manager.

    The data goes to `PREFIX.bin.partial` and `PREFIX.idx.partial`. Leaving the block without an
    exception syncs them to disk and renames them, the index last, so that a killed writer leaves
    nothing that opens. Leaving it with an exception removes them.

    Args:
        prefix: path without `.bin` and `.idx`; its folder must exist.
        vocab_size: every id must lie in [0, vocab_size); decides the dtype (`token_dtype`).
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self.num_documents = 0
        self._lengths = array("i")  # tokens per sequence
        self._boundaries = array("q", [0])  # in sequences
        self._partial_bin = Path(f"{self.prefix}.bin.partial")
        self._partial_idx = Path(f"{self.prefix}.idx.partial")
        self._stream: BinaryIO = self._partial_bin.open("wb")

    def add_document(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append one document of one sequence; see `add_documents`."""
        self.add_documents([np.asarray(ids, dtype=np.int64).tolist()])

    def add_documents(self, documents: Sequence[list[int]]) -> None:
        """Append documents of one sequence each, at the speed that short documents need.

        A document without tokens is a programmer's error: no reader could return it.
        Raises DataError, and appends none of them, for an id outside the vocabulary.
        """
        if not documents:
            return
        flat = array("q")
        for ids in documents:
            assert ids
            flat.fromlist(ids)
        wide = np.frombuffer(flat, dtype=np.int64)
        lowest, highest = int(wide.min()), int(wide.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise DataError(
                f"token id {lowest if lowest < 0 else highest} lies outside the vocabulary of "
                f"{self.vocab_size} ids; the tokenizer does not belong to this shard"
            )
        self._stream.write(wide.astype(self.dtype).tobytes())
        num_sequences = len(self._lengths)
        self._lengths.extend(map(len, documents))
        self._boundaries.extend(range(num_sequences + 1, len(self._lengths) + 1))
        self.num_tokens += len(flat)
        self.num_documents += len(documents)

    def add_shard(self, prefix: str | Path) -> None:
        """Append every document of another shard of the same dtype."""
        index = _read_index(_idx_path(Path(prefix)))
        bin_path = _bin_path(Path(prefix))
        _check_bin_size(bin_path, index)
        assert index.dtype == self.dtype, (index.dtype, self.dtype)
        with bin_path.open("rb") as source:
            shutil.copyfileobj(source, self._stream, 1 << 22)
        offset = len(self._lengths)
        self._lengths.frombytes(index.lengths.astype(np.int32).tobytes())
        self._boundaries.frombytes((index.boundaries[1:] + offset).astype(np.int64).tobytes())
        self.num_tokens += int(index.lengths.sum(dtype=np.int64))
        self.num_documents += len(index.boundaries) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self._stream.close()
            self._partial_bin.unlink(missing_ok=True)
            return
        _sync_and_close(self._stream)
        with self._partial_idx.open("wb") as stream:
            self._write_index(stream)
            _sync_and_close(stream)
        # An older index must not describe the new tokens, not even for a moment.
        _idx_path(self.prefix).unlink(missing_ok=True)
        self._partial_bin.replace(_bin_path(self.prefix))
        self._partial_idx.replace(_idx_path(self.prefix))

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        boundaries = np.frombuffer(self._boundaries, dtype=np.int64)
        code = CODE_BY_DTYPE[self.dtype]
        stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(boundaries)))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(_byte_offsets(lengths, self.dtype).tobytes())
        stream.write(boundaries.astype("<i8").tobytes())


class _Index(NamedTuple):
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]  # [S] tokens per sequence
    boundaries: npt.NDArray[np.int64]  # [D + 1] document boundaries, in sequences


def _read_index(path: Path) -> _Index:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(
            f"token index {path} does not exist; give the path prefix without .bin/.idx of a "
            "shard written by `bitscale prepare` or by Megatron"
        ) from None
    except OSError as error:
        raise DataError(f"token index {path} cannot be read: {error.strerror}; {REMEDY}") from error
    magic = data[: len(MAGIC)].tobytes()
    if magic != MAGIC:
        raise DataError(f"{path} begins with {magic!r}, not a token index's {MAGIC!r}; {REMEDY}")
    if data.size < HEADER.size:
        raise DataError(f"{path} ends after {data.size} bytes, inside its header; {REMEDY}")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(data[: HEADER.size].tobytes())
    if version != VERSION:
        raise DataError(f"{path} has index version {version}; only {VERSION} is known; {REMEDY}")
    if code not in DTYPE_BY_CODE:
        raise DataError(f"{path} has dtype code {code}, which holds no token ids; {REMEDY}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if data.size != expected:
        raise DataError(
            f"{path} has {data.size} bytes, but {num_sequences} sequences and {num_boundaries} "
            f"document boundaries need {expected}; {REMEDY}"
        )
    index = _Index(
        DTYPE_BY_CODE[code],
        np.frombuffer(data, "<i4", num_sequences, HEADER.size),
        np.frombuffer(data, "<i8", num_boundaries, HEADER.size + 12 * num_sequences),
    )
    offsets = np.frombuffer(data, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    _check_consistency(path, index, offsets)
    return index


def _check_consistency(path: Path, index: _Index, offsets: npt.NDArray[np.int64]) -> None:
    lengths, boundaries = index.lengths, index.boundaries
    if lengths.size and int(lengths.min()) < 0:
        raise DataError(f"{path} lists a sequence of {int(lengths.min())} tokens; {REMEDY}")
    if not np.array_equal(offsets, _byte_offsets(lengths, index.dtype)):
        raise DataError(f"{path}: sequences do not follow each other without gaps; {REMEDY}")
    if (
        boundaries.size == 0
        or boundaries[0] != 0
        or boundaries[-1] != lengths.size
        or bool((np.diff(boundaries) < 0).any())
    ):
        raise DataError(
            f"{path}: document boundaries do not run from 0 to {lengths.size} sequences; {REMEDY}"
        )


def _check_bin_size(path: Path, index: _Index) -> None:
    expected = int(index.lengths.sum(dtype=np.int64)) * index.dtype.itemsize
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"token file {path} does not exist beside its index; {REMEDY}") from None
    if found != expected:
        raise DataError(f"{path} has {found} bytes, its index describes {expected}; {REMEDY}")


def _byte_offsets(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    offsets *= dtype.itemsize
    return offsets


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _bin_path(prefix: Path) -> Path:
    return Path(f"{prefix}.bin")  # not with_suffix: a prefix may contain dots


def _idx_path(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")
