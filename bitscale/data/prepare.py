"""Prepare a corpus: documents -> tokens -> one shard per split, with tokenizer and manifest.

    inputs -> spans -> parts --workers--> OUT.partial/parts/* -> OUT.partial/final -> OUT

Everything is staged in `OUT.partial`, so that a killed run resumes with the parts it finished,
and published by one rename, so that OUT is complete whenever it exists.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitscale.data.corpus import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileInfo,
    Manifest,
    PreparedCorpus,
    SplitInfo,
    TokenizerInfo,
    content_fingerprint,
    load_corpus,
)
from bitscale.data.parts import (
    Part,
    PartCounts,
    PartSettings,
    Split,
    SplitCounts,
    part_documents,
    part_folder,
    plan_parts,
    read_part_counts,
    remove_unfinished,
    split_of,
    tokenize_parts,
    wanted_splits,
)
from bitscale.data.progress import TokenProgress, say
from bitscale.data.shards import ShardWriter
from bitscale.data.sources import Inputs, SourceOptions, find_inputs
from bitscale.data.tokenizer import ModelType, Tokenizer, load_tokenizer, train_tokenizer
from bitscale.errors import DataError

__all__ = ["PrepareOptions", "PreparedCorpus", "load_corpus", "prepare"]

REQUEST_NAME = "request.json"
LIBRARIES = ("bitscale", "numpy", "sentencepiece", "tokenizers", "datasets", "pyarrow")


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, from what, where.

    Attributes:
        inputs: files, folders, `builtin:python-docs`, or dataset names with source.format "hf".
        out: folder to publish; `OUT.partial` beside it holds unfinished work.
        source: how inputs become documents.
        tokenizer: file or folder of an existing tokenizer; None trains one on the train split.
        model_type, vocab_size: of the tokenizer to train. 4096 pieces suit 1 to 100 MB of text and
            models of some million parameters; real runs use 32,768 and more.
        tokenizer_bytes: text to train the tokenizer on at most, spread evenly over the input.
        eod_token: piece appended to every document; None takes the one the tokenizer declares.
        split: shares of train, valid and test by hash of the document; 0 leaves a split out.
        workers: processes; None uses every core this process may run on. Never changes the result.
        overwrite: replace an existing OUT and discard an interrupted run.
    """

    inputs: tuple[str, ...]
    out: Path
    source: SourceOptions = field(default_factory=SourceOptions)
    tokenizer: Path | None = None
    model_type: ModelType = "bpe"
    vocab_size: int = 4096
    tokenizer_bytes: int = 32 << 20
    eod_token: str | None = None
    split: Split = (0.98, 0.01, 0.01)
    workers: int | None = None
    overwrite: bool = False


def prepare(options: PrepareOptions) -> PreparedCorpus:
    """Prepare the corpus, resume an interrupted preparation of it, or find it up to date.

    Raises DataError for every fault of inputs, options or the output folder.
    """
    start = time.monotonic()
    _check_options(options)
    if options.out.is_symlink():  # OUT.partial belongs beside the folder itself, on its disk
        options = replace(options, out=options.out.resolve())
    inputs = find_inputs(options.inputs, options.source)
    for note in inputs.notes:
        say(f"note: {note}")
    request = _request(options, inputs)
    if corpus := _find_up_to_date(options, request):
        return corpus
    _refuse_unmovable(options.out)
    with _locked_folder(Path(f"{options.out}.partial")) as partial:
        if corpus := _find_up_to_date(options, request):  # another process was faster
            return corpus
        _start_or_resume(partial, request, options.overwrite)
        parts = plan_parts(inputs.spans)
        tokenizer = _provide_tokenizer(partial, parts, options)
        settings = PartSettings(
            partial / "parts", options.source, options.split, tokenizer.path, tokenizer.eos_token
        )
        counts = _tokenize(parts, settings, options)
        _check_counts(counts, partial, options)
        final = _merge(parts, counts, settings, tokenizer, request)
        _publish(final, options.out, partial)
    corpus = load_corpus(options.out)
    say(_summary(corpus, time.monotonic() - start))
    return corpus


# Options and what a run is made from


def _check_options(options: PrepareOptions) -> None:
    if not options.inputs:
        raise DataError("no input given; name files, folders or builtin:python-docs")
    # NaN is neither.
    if not (all(share >= 0 for share in options.split) and abs(sum(options.split) - 1) <= 1e-6):
        shares = ",".join(f"{share:g}" for share in options.split)
        raise DataError(
            f"--split {shares} is not three shares that sum to 1 (train, valid, test); "
            "for example 0.98,0.01,0.01"
        )
    if options.source.section_bytes < 0:
        raise DataError(
            f"--section-bytes {options.source.section_bytes} is negative; give a size, or 0 to "
            "keep files whole"
        )
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers {options.workers} is not a number of processes; give 1 or more")
    if options.tokenizer is None and options.vocab_size < 1:
        raise DataError(f"--vocab-size {options.vocab_size} is not positive; for example 4096")
    if options.tokenizer is None and options.vocab_size >= 2**31:
        raise DataError(
            f"--vocab-size {options.vocab_size} is more than a tokenizer can have; for example 4096"
        )


def _request(options: PrepareOptions, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the content, as JSON data; equal requests give equal corpora."""
    if options.tokenizer is not None:
        given = load_tokenizer(options.tokenizer, options.eod_token)
        tokenizer: dict[str, Any] = {"sha256": given.fingerprint, "eod_token": given.eos_token}
    else:
        tokenizer = {
            "train_tokenizer": options.model_type,
            "vocab_size": options.vocab_size,
            "tokenizer_bytes": options.tokenizer_bytes,
            "eod_token": options.eod_token,
        }
    return {
        "format_version": FORMAT_VERSION,
        "options": {**asdict(options.source), "split": list(options.split)},
        "tokenizer": tokenizer,
        "inputs": [list(file) for file in inputs.files],
    }


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first difference between two requests in words, None if there is none."""
    for group in ("options", "tokenizer"):
        for key in sorted({*old[group], *new[group]}):
            before, now = old[group].get(key), new[group].get(key)
            if before != now:
                return f"{key} was {before!r}, now {now!r}"
    old_files = {entry[0]: entry for entry in old["inputs"]}
    new_files = {entry[0]: entry for entry in new["inputs"]}
    for name in sorted({*old_files, *new_files}):
        if name not in new_files:
            return f"input {name} is gone"
        if name not in old_files:
            return f"input {name} is new"
        if old_files[name] != new_files[name]:
            return f"input {name} changed (size, time or version)"
    if old["inputs"] != new["inputs"]:
        return "the inputs' order changed"
    return None if old == new else "another version of bitscale"


# OUT and OUT.partial


def _find_up_to_date(options: PrepareOptions, request: dict[str, Any]) -> PreparedCorpus | None:
    """The corpus in OUT if it is the one requested, None if OUT is to be written."""
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(f"{out} exists and is not a prepared corpus; choose another --out")
    try:
        corpus = load_corpus(out)
    except DataError:
        if options.overwrite:
            return None
        raise
    difference = _difference(_request_of(corpus.manifest), request)
    if difference is None:
        say(f"{out} is up to date")
        return corpus
    if options.overwrite:
        return None
    raise DataError(
        f"{out} holds a corpus made differently ({difference}); choose another --out or replace "
        "it with --overwrite"
    )


def _request_of(manifest: Manifest) -> dict[str, Any]:
    return {
        "format_version": manifest.format_version,
        "options": manifest.options["documents"],
        "tokenizer": manifest.options["tokenizer"],
        "inputs": manifest.inputs,
    }


def _refuse_unmovable(out: Path) -> None:
    """Known before the work: the complete corpus gets its name by a rename, and replaces `out`."""
    if out.name in ("", "..") or out.is_mount():
        raise DataError(
            f"--out {out} is a place that no folder can be renamed to; name one in it, such as "
            f"{out / 'corpus'}"
        )


@contextmanager
def _locked_folder(folder: Path) -> Iterator[Path]:
    """Create the folder and lock it; the lock dies with this process. Removed again if empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"cannot make the folder {folder}: {error.strerror}; choose another --out"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between mkdir and flock another process may have published and removed the folder.
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise BlockingIOError
        yield folder
        if not any(folder.iterdir()):
            folder.rmdir()
    except BlockingIOError:
        raise DataError(
            f"another process is preparing {folder}; wait for it or choose another --out"
        ) from None
    finally:
        os.close(descriptor)


def _start_or_resume(partial: Path, request: dict[str, Any], overwrite: bool) -> None:
    path = partial / REQUEST_NAME
    leftovers = {entry.name for entry in partial.iterdir()}
    if not path.is_file() and leftovers - {f"{REQUEST_NAME}.partial"}:
        raise DataError(f"{partial} exists and is not bitscale's; move it or choose another --out")
    if path.is_file() and not overwrite:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["options"]["encoding_errors"] == "strict":
            # What strict accepted, replace reads alike: the remedy for one bad file costs nothing.
            earlier["options"]["encoding_errors"] = request["options"]["encoding_errors"]
        difference = _difference(earlier, request)
        if difference is None:
            _write_durably(path, json.dumps(request).encode())
            return
        raise DataError(
            f"{partial} holds an interrupted preparation made differently ({difference}); repeat "
            "its options to resume it, or discard it with --overwrite"
        )
    _clear(partial)
    _write_durably(path, json.dumps(request).encode())


def _clear(folder: Path) -> None:
    """Empty a folder, the request last: without it a half-emptied folder looks foreign."""
    for entry in sorted(folder.iterdir(), key=lambda path: path.name == REQUEST_NAME):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(final: Path, out: Path, partial: Path) -> None:
    if out.exists():
        replaced = partial / "replaced"
        if replaced.exists():
            shutil.rmtree(replaced)
        out.rename(replaced)
    final.rename(out)
    _sync_folder(out.parent)
    _clear(partial)


# Tokenizing


def _provide_tokenizer(partial: Path, parts: Sequence[Part], options: PrepareOptions) -> Tokenizer:
    """Copy or train the tokenizer into OUT.partial, unless an interrupted run did."""
    if options.tokenizer is not None:
        given = load_tokenizer(options.tokenizer, options.eod_token)
        path = partial / ("tokenizer.json" if given.kind == "huggingface" else "tokenizer.model")
        if not path.is_file():
            _write_durably(path, given.path.read_bytes())
        return load_tokenizer(path, given.eos_token)
    path = partial / "tokenizer.model"
    if not path.is_file():
        start = time.monotonic()
        trained = partial / "tokenizer.model.trained"
        texts = _training_texts(parts, options)
        train_tokenizer(texts, trained, options.model_type, options.vocab_size)
        _write_durably(path, trained.read_bytes())
        trained.unlink()
        say(
            f"trained a {options.model_type} tokenizer of {options.vocab_size} pieces "
            f"in {time.monotonic() - start:.1f} s"
        )
    return load_tokenizer(path, options.eod_token)


def _training_texts(parts: Sequence[Part], options: PrepareOptions) -> Iterator[str]:
    """Train-split documents, `tokenizer_bytes` of them at most, the same amount of every part."""
    num_bytes = 0
    for position, part in enumerate(parts, start=1):
        budget = options.tokenizer_bytes * position // len(parts)
        for text in part_documents(part, options.source):
            if num_bytes >= budget:
                break
            data = text.encode()
            if split_of(data, options.split) == "train":
                num_bytes += len(data)
                yield text


def _tokenize(
    parts: Sequence[Part], settings: PartSettings, options: PrepareOptions
) -> dict[int, PartCounts]:
    """Counts of every part by its index, after tokenizing those that are not finished yet."""
    settings.folder.mkdir(exist_ok=True)
    remove_unfinished(settings.folder)
    counts = {
        part.index: found for part in parts if (found := read_part_counts(settings.folder, part))
    }
    if counts:
        say(f"resuming: {len(counts)} of {len(parts)} parts are finished")
    missing = [part for part in parts if part.index not in counts]
    num_workers = options.workers or len(os.sched_getaffinity(0))
    num_bytes = sum(part.num_bytes for part in parts)
    done_bytes = num_bytes - sum(part.num_bytes for part in missing)
    with TokenProgress(num_bytes, done_bytes) as progress:
        for part, part_counts in tokenize_parts(missing, settings, num_workers):
            counts[part.index] = part_counts
            progress.add_tokens(part.num_bytes, part_counts.num_tokens)
    return counts


def _total(counts: dict[int, PartCounts], name: str) -> SplitCounts:
    return sum((part.splits[name] for part in counts.values()), SplitCounts())


def _check_counts(counts: dict[int, PartCounts], partial: Path, options: PrepareOptions) -> None:
    wanted = wanted_splits(options.split)
    totals = {name: _total(counts, name) for name in wanted}
    num_documents = sum(total.num_documents for total in totals.values())
    empty = [name for name in wanted if totals[name].num_documents == 0]
    if not empty:
        return
    _clear(partial)  # nothing to resume: the remedy changes the options
    if num_documents == 0:
        num_empty = sum(part.num_empty_documents for part in counts.values())
        raise DataError(
            f"the inputs hold no text ({num_empty} empty documents); give inputs with text"
        )
    raise DataError(
        f"split {empty[0]!r} got none of the {num_documents} documents; raise its share in "
        "--split, set it to 0, or give more documents (for plain text, lower --section-bytes)"
    )


# The published folder


def _merge(
    parts: Sequence[Part],
    counts: dict[int, PartCounts],
    settings: PartSettings,
    tokenizer: Tokenizer,
    request: dict[str, Any],
) -> Path:
    """Write the folder to publish: parts joined in order, the tokenizer, the manifest."""
    final = settings.folder.parent / "final"
    if final.exists():
        shutil.rmtree(final)
    final.mkdir()
    _write_durably(final / tokenizer.path.name, tokenizer.path.read_bytes())
    splits: dict[str, SplitInfo] = {}
    for name in wanted_splits(settings.split):
        with ShardWriter(final / name, tokenizer.vocab_size) as writer:
            for part in parts:
                writer.add_shard(part_folder(settings.folder, part) / name)
        total = _total(counts, name)
        assert (writer.num_documents, writer.num_tokens) == (total.num_documents, total.num_tokens)
        splits[name] = SplitInfo(**asdict(total))
    files = {path.name: FileInfo.of(path) for path in sorted(final.iterdir())}
    tokenizer_info = TokenizerInfo(
        file=tokenizer.path.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eos_id,
        eod_token=tokenizer.eos_token,
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=content_fingerprint(request["options"], tokenizer_info, splits, files),
        tokenizer=tokenizer_info,
        splits=splits,
        num_empty_documents=sum(part.num_empty_documents for part in counts.values()),
        options={"documents": request["options"], "tokenizer": request["tokenizer"]},
        inputs=request["inputs"],
        files=files,
        versions=_versions(),
    )
    _write_durably(final / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    _sync_folder(final)
    return final


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # bitscale run from a source tree
            versions[name] = "not installed"
    return versions


def _summary(corpus: PreparedCorpus, seconds: float) -> str:
    counts = "; ".join(
        f"{name} {info.num_tokens:,} tokens in {info.num_documents:,} documents "
        f"({info.num_bytes / info.num_tokens:.2f} bytes a token)"
        for name, info in corpus.splits.items()
    )
    skipped = corpus.manifest.num_empty_documents
    note = f"; {skipped:,} empty documents skipped" if skipped else ""
    return f"{corpus.directory}: {counts}{note}; {seconds:.1f} s"


def _write_durably(path: Path, data: bytes) -> None:
    """Write a file under another name, sync it, rename it: it is complete or absent."""
    partial = Path(f"{path}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
