"""Reading files of text: ranges that workers can share, lines, sections, UTF-8, newlines."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

from bitscale.errors import DataError

EncodingErrors = Literal["strict", "replace"]

COMPRESSED_SUFFIXES = (".gz", ".zst")

# A worker reads a range whole; small enough for memory and balance, large enough to seek rarely.
RANGE_BYTES = 4 << 20
SEARCH_BYTES = 1 << 18

LINE_END = re.compile(rb"\n|\r(?=[^\n])")
BLANK_LINE = re.compile(rb"\n\r?\n|\r\r(?=[^\n])")


def line_boundaries(path: Path, num_bytes: int) -> list[int]:
    """Offsets [0, ..., num_bytes] that cut a file into ranges of whole lines (LF)."""
    return _boundaries(path, num_bytes, (re.compile(rb"\n"),))


def blank_line_boundaries(path: Path, num_bytes: int) -> list[int]:
    """Offsets [0, ..., num_bytes] that cut a file at blank lines, or at line ends without any."""
    return _boundaries(path, num_bytes, (BLANK_LINE, LINE_END))


def _boundaries(path: Path, num_bytes: int, patterns: tuple[re.Pattern[bytes], ...]) -> list[int]:
    boundaries = [0]
    with path.open("rb") as stream:
        for target in range(RANGE_BYTES, num_bytes, RANGE_BYTES):
            if target < boundaries[-1]:
                continue  # a line longer than a range
            boundary = _next_match(stream, target, patterns)
            if boundary is not None and boundary < num_bytes:
                boundaries.append(boundary)
    return [*boundaries, num_bytes]


def _next_match(
    stream: BinaryIO, start: int, patterns: tuple[re.Pattern[bytes], ...]
) -> int | None:
    """Offset behind the first match after `start`; a window is searched by pattern in turn."""
    stream.seek(start)
    while window := stream.read(SEARCH_BYTES):
        for pattern in patterns:
            if found := pattern.search(window):
                return start + found.end()
        start += len(window)
    return None


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a plain file; of a .gz or .zst file all that it holds."""
    with _open(path) as stream:
        if _is_compressed(path):
            return stream.read()
        stream.seek(start)
        return stream.read(stop - start)


def read_lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines in [start, stop); of a .gz or .zst file all lines, with their
    offsets in the decompressed text."""
    with _open(path) as stream:
        offset = start
        if not _is_compressed(path):
            stream.seek(start)
        for line in stream:
            if offset >= stop and not _is_compressed(path):
                return
            yield offset, line
            offset += len(line)


def line_number(path: Path, offset: int) -> int:
    """1-based number of the line that begins at `offset`; reads the file, for messages only."""
    num_lines = 0
    with _open(path) as stream:
        while offset > 0 and (block := stream.read(min(offset, SEARCH_BYTES))):
            num_lines += block.count(b"\n")
            offset -= len(block)
    return num_lines + 1


def decode(data: bytes, where: str, offset: int, errors: EncodingErrors) -> str:
    """UTF-8 text of `data`, which begins `offset` bytes into what `where` names."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {offset + error.start} "
            f"(0x{data[error.start]:02x}); convert the file to UTF-8, leave it out if it is not "
            "text, or use --encoding-errors replace"
        ) from error


def normalize_newlines(text: str) -> str:
    """CRLF and lone CR become LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def cut_sections(text: str, section_bytes: int) -> Iterator[str]:
    """Sections of at most `section_bytes` of UTF-8, cut behind the last blank line that fits.

    Without a blank line, behind the last line end that fits; a longer line stays whole. Joined,
    the sections are the text. 0 keeps the text whole.
    """
    data = text.encode()
    start = 0
    while section_bytes > 0 and len(data) - start > section_bytes:
        limit = start + section_bytes
        if (found := data.rfind(b"\n\n", start, limit)) >= 0:
            stop = found + 2
        elif (found := data.rfind(b"\n", start, limit)) >= 0 or (
            found := data.find(b"\n", limit)
        ) >= 0:
            stop = found + 1
        else:
            break
        yield data[start:stop].decode()
        start = stop
    if start < len(data) or not data:
        yield data[start:].decode()


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressing .gz and .zst; damage is a DataError."""
    try:
        with _open_compressed(path) if _is_compressed(path) else path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"input {path} is gone; put it back or prepare anew") from None
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(
            f"input {path} cannot be read ({' '.join(str(error).split())}); copy it again"
        ) from error


def _open_compressed(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path))
    import pyarrow

    # Not the zstandard package: its reader takes a truncated file for a complete one.
    stream = pyarrow.input_stream(str(path), compression="zstd")
    return cast(BinaryIO, io.BufferedReader(stream, SEARCH_BYTES))


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED_SUFFIXES
