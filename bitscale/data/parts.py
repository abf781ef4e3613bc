"""Parts of a corpus: planning them, tokenizing them in worker processes, resuming.

A part is a list of spans that one worker tokenizes into its own shards, in a folder that gets its
final name by a rename when complete: a folder `parts/000012` is the marker that part 12 is done.
Parts and their contents depend on the inputs alone, not on the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bitscale.data.shards import ShardWriter
from bitscale.data.sources import SourceOptions, Span, read_span
from bitscale.data.tokenizer import Tokenizer, load_tokenizer
from bitscale.errors import DataError

SPLITS = ("train", "valid", "test")
Split = tuple[float, float, float]  # shares of train, valid, test; they sum to 1

# A part: 1/256 of the input, for progress and resuming, within what is worth a folder and a rename.
PARTS_PER_CORPUS = 256
MIN_PART_BYTES = 1 << 20
MAX_PART_BYTES = 64 << 20

BATCH_CHARS = 1 << 19  # text handed to the tokenizer at once


@dataclass(frozen=True)
class Part:
    index: int
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)


@dataclass(frozen=True)
class SplitCounts:
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0  # UTF-8 bytes of the documents' text

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(
            self.num_documents + other.num_documents,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
        )


@dataclass(frozen=True)
class PartCounts:
    splits: dict[str, SplitCounts]  # the wanted splits
    num_empty_documents: int

    @property
    def num_tokens(self) -> int:
        return sum(counts.num_tokens for counts in self.splits.values())


@dataclass(frozen=True)
class PartSettings:
    """What a worker needs to know: picklable, a few hundred bytes."""

    folder: Path  # of the finished parts
    source: SourceOptions
    split: Split
    tokenizer_path: Path
    eod_token: str


class Stopped(Exception):
    """The run is ending; the part is abandoned."""


def plan_parts(spans: Sequence[Span]) -> list[Part]:
    """Group consecutive spans. A span of unknown size (a dataset's shard) is a part by itself."""
    total = sum(span.num_bytes for span in spans)
    target = min(max(total // PARTS_PER_CORPUS, MIN_PART_BYTES), MAX_PART_BYTES)
    parts: list[Part] = []
    group: list[Span] = []
    group_bytes = 0
    for span in spans:
        group.append(span)
        group_bytes += span.num_bytes
        if group_bytes >= target or span.kind == "hf":
            parts.append(Part(len(parts), tuple(group)))
            group, group_bytes = [], 0
    if group:
        parts.append(Part(len(parts), tuple(group)))
    return parts


def wanted_splits(split: Split) -> list[str]:
    return [name for name, share in zip(SPLITS, split, strict=True) if share > 0]


def split_of(text: bytes, split: Split) -> str:
    """Split of a document by the hash of its text: equal documents never straddle two splits."""
    position = int.from_bytes(blake2b(text, digest_size=8).digest()) / 2**64  # in [0, 1)
    train, valid, test = split
    if position < train:
        return "train"
    if position < train + valid:
        return "valid"
    # Shares may sum to a little less than 1, which must not fill a split of share 0.
    if test > 0:
        return "test"
    return "valid" if valid > 0 else "train"


def part_documents(part: Part, source: SourceOptions) -> Iterator[str]:
    """The part's documents in order, empty ones included."""
    for span in part.spans:
        yield from read_span(span, source)


def part_folder(folder: Path, part: Part) -> Path:
    return folder / f"{part.index:06d}"


def read_part_counts(folder: Path, part: Part) -> PartCounts | None:
    """Counts of a finished part, None for one that is not finished."""
    path = part_folder(folder, part) / "counts.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    splits = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
    return PartCounts(splits, content["num_empty_documents"])


def tokenize_part(
    part: Part, settings: PartSettings, tokenizer: Tokenizer, stopped: Callable[[], bool]
) -> PartCounts:
    """Write the part's shards and counts, then give its folder the final name.

    Raises DataError for input that cannot be read, Stopped when `stopped()` turns true.
    """
    final = part_folder(settings.folder, part)
    work = Path(f"{final}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    totals = {name: SplitCounts() for name in wanted_splits(settings.split)}
    num_empty = 0
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(work / name, tokenizer.vocab_size))
            for name in totals
        }
        for texts in _batches(part_documents(part, settings.source)):
            if stopped():
                raise Stopped
            batch = [text for text in texts if text and not text.isspace()]
            num_empty += len(texts) - len(batch)
            for name, split_batch in _tokenize_batch(batch, settings.split, tokenizer).items():
                writers[name].add_documents(split_batch.documents)
                totals[name] += split_batch.counts()
    counts = PartCounts(totals, num_empty)
    (work / "counts.json").write_text(json.dumps(asdict(counts)), encoding="utf-8")
    work.rename(final)
    return counts


def tokenize_parts(
    parts: Sequence[Part], settings: PartSettings, num_workers: int
) -> Iterator[tuple[Part, PartCounts]]:
    """Tokenize parts in `num_workers` processes (one: in this process); yields as they finish."""
    num_workers = min(num_workers, len(parts))
    if num_workers <= 1:
        tokenizer = load_tokenizer(settings.tokenizer_path, settings.eod_token)
        for part in parts:
            yield part, tokenize_part(part, settings, tokenizer, lambda: False)
        return
    # Spawn: the parent may hold threads (tokenizers, pyarrow) that a fork would break.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(num_workers, context, _initialize_worker, (settings, stop))
    try:
        largest_first = sorted(parts, key=lambda part: -part.num_bytes)
        futures = {pool.submit(_tokenize_in_worker, part): part for part in largest_first}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for memory; run the same command again to "
            f"resume, with fewer --workers than {num_workers}"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what workers of a killed run left behind."""
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)


@dataclass
class _SplitBatch:
    documents: list[list[int]] = field(default_factory=list)
    num_bytes: int = 0

    def counts(self) -> SplitCounts:
        return SplitCounts(len(self.documents), sum(map(len, self.documents)), self.num_bytes)


def _tokenize_batch(
    texts: Sequence[str], split: Split, tokenizer: Tokenizer
) -> dict[str, _SplitBatch]:
    batches: defaultdict[str, _SplitBatch] = defaultdict(_SplitBatch)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids.append(tokenizer.eos_id)
        data = text.encode()
        batch = batches[split_of(data, split)]
        batch.documents.append(ids)
        batch.num_bytes += len(data)
    return batches


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in documents:
        batch.append(text)
        num_chars += len(text) + 1
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


# A worker process. Its state is a module global because that is how pools pass initial values.

_worker: tuple[PartSettings, Tokenizer, Any] | None = None


def _initialize_worker(settings: PartSettings, stop: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets `stop`
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    _worker = (settings, load_tokenizer(settings.tokenizer_path, settings.eod_token), stop)


def _exit_with_parent() -> None:
    """End this process when its parent is killed; the pool alone would leave it waiting."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _tokenize_in_worker(part: Part) -> PartCounts:
    assert _worker is not None
    settings, tokenizer, stop = _worker
    return tokenize_part(part, settings, tokenizer, stop.is_set)
