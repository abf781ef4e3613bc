"""A prepared corpus on disk: token shards per split, the tokenizer, and the manifest.

The manifest, `corpus.json`, is written last and published with the folder; it says what the
folder holds and how it was made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from bitscale.data.shards import TokenShard
from bitscale.data.tokenizer import Tokenizer, load_tokenizer
from bitscale.errors import DataError
from bitscale.names_in_files import is_plain

FORMAT_VERSION = 1
MANIFEST_NAME = "corpus.json"
REMEDY = "prepare it again with `bitscale prepare ... --overwrite` or copy it again"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileInfo(_Record):
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(num_bytes=path.stat().st_size, sha256=file_sha256(path))


class SplitInfo(_Record):
    """`num_bytes`: UTF-8 bytes of the source text; `num_tokens` includes each document's eod."""

    num_documents: int
    num_tokens: int
    num_bytes: int


class TokenizerInfo(_Record):
    file: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    eod_token: str


class Manifest(_Record):
    """Contents of `corpus.json`.

    Attributes:
        fingerprint: sha256 over options, tokenizer and tokens; independent of the number of
            workers, of paths and of dates. Equal fingerprints mean equal training data.
        options: the options that decide the content.
        inputs: name, size and version of every input file, to notice changes.
        files: size and sha256 of every other file of the folder.
        versions: of Python and the libraries that read and tokenized the text.
    """

    format_version: int
    fingerprint: str
    tokenizer: TokenizerInfo
    splits: dict[str, SplitInfo]
    num_empty_documents: int
    options: dict[str, Any]
    inputs: list[list[Any]]
    files: dict[str, FileInfo]
    versions: dict[str, str]


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus that `prepare` wrote and `load_corpus` checked."""

    directory: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def eod_id(self) -> int:
        return self.manifest.tokenizer.eod_id

    @property
    def splits(self) -> dict[str, SplitInfo]:
        return self.manifest.splits

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / self.manifest.tokenizer.file

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_path, self.manifest.tokenizer.eod_token)

    def prefix(self, split: str) -> Path:
        """Path of a split's shard without .bin/.idx, as Megatron's --data-path takes it.

        Raises DataError for a split that the corpus does not have.
        """
        if split not in self.splits:
            raise DataError(
                f"corpus {self.directory} has no split {split!r}, only {', '.join(self.splits)}; "
                "prepare it again with another --split"
            )
        return self.directory / split

    def shard(self, split: str) -> TokenShard:
        """Open a split's token shard. Raises DataError as `prefix` and `TokenShard` do."""
        return TokenShard(self.prefix(split))


def load_corpus(directory: str | Path, check_hashes: bool = False) -> PreparedCorpus:
    """Open a prepared corpus: reads the manifest and compares file sizes, nothing else.

    `check_hashes` also reads every file and compares its sha256.
    Raises DataError when the folder is not a corpus, is incomplete or damaged.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{directory} is not a prepared corpus (no {MANIFEST_NAME}); "
            "make one with `bitscale prepare INPUT --out DIR`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
    corpus = PreparedCorpus(directory, _parse_manifest(path, content))
    for name, info in corpus.manifest.files.items():
        _check_file(directory / name, info, check_hashes)
    return corpus


def content_fingerprint(
    options: dict[str, Any],
    tokenizer: TokenizerInfo,
    splits: dict[str, SplitInfo],
    files: dict[str, FileInfo],
) -> str:
    """sha256 that identifies the training data; see `Manifest.fingerprint`."""
    content = {
        "format_version": FORMAT_VERSION,
        "options": options,
        "tokenizer": tokenizer.model_dump(),
        "splits": {name: info.model_dump() for name, info in splits.items()},
        "files": {name: info.sha256 for name, info in files.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parse_manifest(path: Path, content: str) -> Manifest:
    try:
        version = json.loads(content).get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}; this bitscale reads {FORMAT_VERSION}; "
                "prepare the corpus again"
            )
        manifest = Manifest.model_validate_json(content)
    except (ValidationError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}); {REMEDY}") from error
    for name in (*manifest.files, *manifest.splits, manifest.tokenizer.file):
        if not is_plain(name):
            raise DataError(
                f"{path} names {name!a}, which is not a file of its own folder; use no corpus of "
                "unknown origin, or prepare it again"
            )
    return manifest


def _check_file(path: Path, info: FileInfo, check_hash: bool) -> None:
    if not path.is_file():
        raise DataError(f"corpus file {path} is missing; {REMEDY}")
    if (found := path.stat().st_size) != info.num_bytes:
        raise DataError(f"{path} has {found} bytes, the manifest says {info.num_bytes}; {REMEDY}")
    if check_hash and (digest := file_sha256(path)) != info.sha256:
        raise DataError(
            f"{path} has sha256 {digest[:12]}..., the manifest says {info.sha256[:12]}...; {REMEDY}"
        )
