"""Documents from plain text, JSONL, parquet, Hugging Face datasets and the embedded corpus.

An input is cut into *spans*: a byte range of a file, row groups of a parquet file, a shard of a
dataset. Spans depend on the inputs alone, never on the number of workers, and each can be read
without the others; a span pickles to a few bytes.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bitscale.data import python_docs, text_files
from bitscale.data.text_files import COMPRESSED_SUFFIXES, EncodingErrors
from bitscale.errors import DataError

Format = Literal["auto", "text", "jsonl", "parquet", "hf"]
Kind = Literal["text", "jsonl", "parquet", "hf", "python-docs"]

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PYTHON_DOCS_SPAN_FILES = 50
PARQUET_BATCH_ROWS = 256

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SourceOptions:
    """How inputs become documents.

    Attributes:
        format: of every input; "auto" goes by the file's suffix (and never to the network).
        text_key: key (JSONL), column (parquet, Hugging Face) that holds the text.
        hf_config, hf_split, hf_revision: as in `datasets.load_dataset`.
        encoding_errors: "strict" refuses invalid UTF-8, "replace" writes U+FFFD.
        section_bytes: plain text files longer than this are cut into documents at blank lines;
            0 keeps every file as one document.
    """

    format: Format = "auto"
    text_key: str = "text"
    hf_config: str | None = None
    hf_split: str = "train"
    hf_revision: str | None = None
    encoding_errors: EncodingErrors = "strict"
    section_bytes: int = 65536


@dataclass(frozen=True)
class Span:
    """A stretch of input that is read in one go.

    `start` and `stop` count bytes (text, JSONL), row groups (parquet) or files (python-docs); of a
    Hugging Face dataset they are the shard's number and the number of shards. `num_bytes` is its
    size in the input, 0 if unknown.
    """

    kind: Kind
    location: str
    start: int
    stop: int
    num_bytes: int


class InputFile(NamedTuple):
    """What tells whether an input changed: no absolute path, so that data may be moved."""

    name: str
    num_bytes: int
    version: str  # modification time in ns, a Python version, or a dataset's revision


class Inputs(NamedTuple):
    files: list[InputFile]
    spans: list[Span]
    notes: list[str]  # what the user should know, a line each


def find_inputs(inputs: tuple[str, ...], options: SourceOptions) -> Inputs:
    """Resolve the inputs as given (files, folders, names) into files and spans, in fixed order.

    Raises DataError for an input that does not exist or holds nothing to read.
    """
    found = Inputs([], [], [])
    for given in inputs:
        if given.startswith("builtin:"):
            _add_python_docs(given, found)
        elif options.format == "hf":
            _add_hf_dataset(given, options, found)
        else:
            for path, name in _files_of(given, options, found.notes):
                _add_file(path, name, options, found)
    return found


def read_span(span: Span, options: SourceOptions) -> Iterator[str]:
    """The span's documents, LF newlines, no byte-order mark; empty ones included.

    Raises DataError for text that cannot be decoded or parsed, naming file and place.
    """
    if span.kind == "text":
        return _read_text(span, options)
    if span.kind == "jsonl":
        return _read_jsonl(span, options)
    if span.kind == "parquet":
        return _read_parquet(span, options)
    if span.kind == "hf":
        return _read_hf(span, options)
    return _read_python_docs(span)


# Files and folders


def _files_of(given: str, options: SourceOptions, notes: list[str]) -> list[tuple[Path, str]]:
    """Paths with their names relative to the input as given; `notes` is told what is left out."""
    root = Path(given)
    if root.is_file():
        return [(root, root.name)]
    if not root.is_dir():
        raise DataError(
            f"input {given!r} does not exist; give a file, a folder or {python_docs.NAME}, or "
            "--format hf for a Hugging Face dataset"
        )
    found = [(path, path.relative_to(root).as_posix()) for path in root.rglob("*")]
    found = [
        (path, name)
        for path, name in found
        if not any(part.startswith(".") for part in Path(name).parts)
    ]
    links = sorted(name for path, name in found if path.is_symlink() and not path.is_file())
    if links:
        notes.append(
            f"folder {given!r}: {len(links)} links to folders, or to nothing, are not followed "
            f"({', '.join(links[:3])}{', ...' if links[3:] else ''}); name what they lead to as "
            "inputs of their own"
        )
    wanted = [
        (path, name)
        for path, name in found
        if path.is_file()
        and (options.format in ("auto", "text") or _kind_by_suffix(path) == options.format)
    ]
    if not wanted:
        kind = "file" if options.format in ("auto", "text") else f"{options.format} file"
        raise DataError(f"folder {given!r} holds no {kind}; give one that does, or --format")
    return sorted(wanted, key=lambda entry: entry[1])


def _kind_by_suffix(path: Path) -> Literal["text", "jsonl", "parquet"]:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED_SUFFIXES:
        suffix = Path(path.stem).suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def _add_file(path: Path, name: str, options: SourceOptions, found: Inputs) -> None:
    try:
        status = path.stat()
        with path.open("rb"):
            pass  # an unreadable file should be refused now, not after an hour of work
    except OSError as error:
        raise DataError(
            f"input {path} cannot be read: {error.strerror}; check its permissions"
        ) from error
    # A name may be bytes that are no UTF-8, which no JSON can hold.
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    found.files.append(InputFile(shown, status.st_size, str(status.st_mtime_ns)))
    kind = _kind_by_suffix(path) if options.format == "auto" else options.format
    location = str(path.absolute())
    if kind == "parquet":
        found.spans.extend(_parquet_spans(location, options))
        return
    assert kind in ("text", "jsonl"), kind
    boundaries = [0, status.st_size]
    whole = path.suffix.lower() in COMPRESSED_SUFFIXES  # no random access
    if kind == "jsonl" and not whole:
        boundaries = text_files.line_boundaries(path, status.st_size)
    elif kind == "text" and not whole and options.section_bytes > 0:
        boundaries = text_files.blank_line_boundaries(path, status.st_size)
    for start, stop in pairwise(boundaries):
        found.spans.append(Span(kind, location, start, stop, stop - start))


def _read_text(span: Span, options: SourceOptions) -> Iterator[str]:
    data = text_files.read_range(Path(span.location), span.start, span.stop)
    offset = span.start
    if offset == 0 and data.startswith(codecs.BOM_UTF8):
        offset = len(codecs.BOM_UTF8)
        data = data[offset:]
    text = text_files.decode(data, f"{span.location}", offset, options.encoding_errors)
    text = text_files.normalize_newlines(text)
    yield from text_files.cut_sections(text, options.section_bytes)


def _read_jsonl(span: Span, options: SourceOptions) -> Iterator[str]:
    path = Path(span.location)
    for offset, line in text_files.read_lines(path, span.start, span.stop):
        if offset == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        content = text_files.decode(line, span.location, offset, options.encoding_errors)
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{_line_of(path, offset)}: not a JSON object ({error}); mend or remove the line, "
                "or give --format text if this is not JSONL"
            ) from error
        yield _text_of(record, partial(_line_of, path, offset), options)


def _line_of(path: Path, offset: int) -> str:
    return f"{path}:{text_files.line_number(path, offset)}"


def _text_of(record: object, where: Callable[[], str], options: SourceOptions) -> str:
    """The record's text, LF newlines, no byte-order mark; null, common in datasets, is empty.

    `where` is called for messages only: counting lines reads the file.
    """
    text = record.get(options.text_key, 0) if isinstance(record, dict) else 0
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _wrong_record(record, where(), options)
    if not text.isascii() and (found := LONE_SURROGATE.search(text)):  # JSON's \ud800 escapes
        if options.encoding_errors == "strict":
            raise DataError(
                f"{where()}: the text holds a lone surrogate U+{ord(found.group()):04X}, which "
                "is not Unicode text; use --encoding-errors replace"
            )
        text = LONE_SURROGATE.sub("\ufffd", text)
    return text_files.normalize_newlines(text.removeprefix("\ufeff"))


def _wrong_record(record: object, where: str, options: SourceOptions) -> DataError:
    if not isinstance(record, dict):
        return DataError(
            f"{where}: a {type(record).__name__} instead of an object with key "
            f"{options.text_key!r}; write one JSON object a line"
        )
    if options.text_key not in record:
        return _missing_key(where, options, sorted(map(str, record)))
    found = type(record[options.text_key]).__name__
    return DataError(
        f"{where}: {options.text_key!r} holds a value of type {found} instead of text; choose "
        "another --text-key"
    )


def _missing_key(where: str, options: SourceOptions, names: list[str]) -> DataError:
    return DataError(
        f"{where}: no {options.text_key!r}; found {', '.join(names) or 'nothing'}; name the one "
        "that holds the text with --text-key"
    )


# Parquet


def _parquet_spans(location: str, options: SourceOptions) -> Iterator[Span]:
    parquet = _open_parquet(location)
    schema = parquet.schema_arrow
    if options.text_key not in schema.names:
        raise _missing_key(location, options, list(schema.names))
    kind = str(schema.field(options.text_key).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{location}: column {options.text_key!r} holds {kind} instead of text; choose "
            "another --text-key"
        )
    for group in range(parquet.num_row_groups):
        num_bytes: int = parquet.metadata.row_group(group).total_byte_size
        yield Span("parquet", location, group, group + 1, num_bytes)


def _open_parquet(location: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(location)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_parquet(location, error) from error


def _read_parquet(span: Span, options: SourceOptions) -> Iterator[str]:
    import pyarrow

    parquet = _open_parquet(span.location)
    batches = parquet.iter_batches(
        PARQUET_BATCH_ROWS, row_groups=range(span.start, span.stop), columns=[options.text_key]
    )
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(span.start))
    try:
        for batch in batches:
            # As bytes: parquet's writers do not promise that "string" is valid UTF-8.
            for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                where = f"{span.location} row {row}"
                text = text_files.decode(data or b"", where, 0, options.encoding_errors)
                yield text_files.normalize_newlines(text.removeprefix("\ufeff"))
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_parquet(span.location, error) from error


def _damaged_parquet(location: str, error: Exception) -> DataError:
    return DataError(
        f"{location} cannot be read as parquet ({_one_line(error)}); copy it again or give --format"
    )


# Hugging Face datasets


@lru_cache(maxsize=4)
def _open_hf(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """(streaming dataset, its builder)."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        return builder.as_streaming_dataset(split=split), builder
    except Exception as error:  # the library's errors share no base class
        raise DataError(
            f"Hugging Face dataset {name!r}, split {split!r}, cannot be opened "
            f"({_one_line(error)}); check the name, --hf-config, --hf-split and the network"
        ) from error


def _add_hf_dataset(name: str, options: SourceOptions, found: Inputs) -> None:
    dataset, builder = _open_hf(name, options.hf_config, options.hf_split, options.hf_revision)
    columns = dataset.column_names
    if columns is not None and options.text_key not in columns:
        raise _missing_key(f"dataset {name!r}", options, list(columns))
    data_files = (builder.config.data_files or {}).get(options.hf_split, [])
    # Names its files with their modification times, on the Hub the repository's revision.
    version = json.dumps([list(data_files), getattr(data_files, "origin_metadata", [])])
    found.files.append(InputFile(f"hf:{Path(name).name}", 0, version))
    for shard in range(dataset.num_shards):
        found.spans.append(Span("hf", name, shard, dataset.num_shards, 0))


def _read_hf(span: Span, options: SourceOptions) -> Iterator[str]:
    dataset, _ = _open_hf(span.location, options.hf_config, options.hf_split, options.hf_revision)
    where = f"dataset {span.location!r} shard {span.start} row"
    for row, record in enumerate(dataset.shard(num_shards=span.stop, index=span.start)):
        yield _text_of(record, partial("{} {}".format, where, row), options)


# The embedded corpus


def _add_python_docs(given: str, found: Inputs) -> None:
    if given != python_docs.NAME:
        raise DataError(f"embedded corpus {given!r} is unknown; the only one is {python_docs.NAME}")
    files = python_docs.documentation_files()
    if not python_docs.has_topics():
        found.notes.append(
            "this Python comes without pydoc_data.topics; using the standard library's docstrings"
        )
    num_bytes = sum(file.num_bytes for file in files)
    found.files.append(InputFile(given, num_bytes, f"Python {sys.version.split()[0]}"))
    for start in range(0, len(files), PYTHON_DOCS_SPAN_FILES):
        stop = min(start + PYTHON_DOCS_SPAN_FILES, len(files))
        span_bytes = sum(file.num_bytes for file in files[start:stop])
        found.spans.append(Span("python-docs", given, start, stop, span_bytes))


def _read_python_docs(span: Span) -> Iterator[str]:
    for file in python_docs.documentation_files()[span.start : span.stop]:
        for document in python_docs.read_documents(file):
            yield text_files.normalize_newlines(document)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
