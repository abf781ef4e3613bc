"""Tokenizers: sentencepiece `.model` and Hugging Face `tokenizer.json` behind one interface.

Text is encoded as text: no begin or end tokens are added, a special token's name inside a
document (`<|endoftext|>`, `</s>`) becomes ordinary pieces and never the control token, and
padding or truncation settings stored in a `tokenizer.json` are switched off.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from bitscale.errors import DataError

ModelType = Literal["bpe", "unigram"]

WHITESPACE_MARK = "\u2581"  # sentencepiece's stand-in for a space

# Names of the end-of-document token in published tokenizers, for files that do not declare one.
KNOWN_EOD_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
)

# sentencepiece drops longer training sentences; documents are cut at line ends below this.
MAX_SENTENCE_BYTES = 4096


class Tokenizer(Protocol):
    """What the rest of bitscale knows about a tokenizer.

    Attributes:
        path: the file it was loaded from.
        kind: "sentencepiece" or "huggingface".
        fingerprint: sha256 of that file, hexadecimal.
        vocab_size: ids lie in [0, vocab_size).
        bos_id: begin-of-text id, or None.
        eos_id: id appended to every document.
        eos_token: its name, accepted again as `eod_token` of `load_tokenizer`.
    """

    path: Path
    kind: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    eos_token: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, faster."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """Load a `.model` or `tokenizer.json` file, or the folder that holds exactly one of them.

    Args:
        path: file or folder.
        eod_token: name of the document separator; default: the one that the file declares.

    Raises DataError when the file is missing or malformed, or has no document separator.
    """
    file = _find_tokenizer_file(Path(path))
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, eod_token)
    return SentencePieceTokenizer(file, eod_token)


class SentencePieceTokenizer:
    """A sentencepiece model (see `Tokenizer`).

    sentencepiece writes spaces as U+2581, so it cannot tell a literal U+2581 from a space. Where
    the model has byte pieces and adds no prefix, as `train_tokenizer`'s have, that character is
    encoded as its three bytes; then decode(encode(text)) == text for every text.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import sentencepiece

        self.path = path
        data = _read_file(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            loaded = len(data) > 0 and self._processor.LoadFromSerializedProto(data)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise DataError(
                f"{path} is not a sentencepiece model; give a .model file written by sentencepiece "
                "or a Hugging Face tokenizer.json"
            )
        self.vocab_size: int = self._processor.vocab_size()
        bos_id: int = self._processor.bos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = self._find_eos(eod_token)
        self.eos_token: str = self._processor.id_to_piece(self.eos_id)
        self._mark_ids = self._byte_ids_of_mark()

    def encode(self, text: str) -> list[int]:
        if self._mark_ids and WHITESPACE_MARK in text:
            return self._encode_with_marks(text)
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: `prepare` runs one process per core, which also covers reading and writing.
        batch: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        if self._mark_ids:
            for position, text in enumerate(texts):
                if WHITESPACE_MARK in text:
                    batch[position] = self._encode_with_marks(text)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def _encode_with_marks(self, text: str) -> list[int]:
        first, *rest = text.split(WHITESPACE_MARK)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._mark_ids
            ids += self._processor.encode(part)
        return ids

    def _byte_ids_of_mark(self) -> list[int]:
        """Ids of U+2581's byte pieces, or [] where splitting a text would change its encoding."""
        names = [f"<0x{byte:02X}>" for byte in WHITESPACE_MARK.encode()]
        ids = [self._processor.piece_to_id(name) for name in names]
        if not all(self._processor.is_byte(token) for token in ids):
            return []
        keeps_text = self._processor.normalize(" a  b ") == "▁a▁▁b▁"
        return ids if keeps_text else []

    def _find_eos(self, eod_token: str | None) -> int:
        if eod_token is None:
            eos_id: int = self._processor.eos_id()
            if eos_id < 0:
                raise DataError(
                    f"{self.path} declares no end-of-sentence piece to separate documents; "
                    "name one of its pieces with --eod-token"
                )
            return eos_id
        token: int = self._processor.piece_to_id(eod_token)
        if self._processor.id_to_piece(token) != eod_token:
            raise DataError(
                f"--eod-token {eod_token!r} is not among the {self.vocab_size} pieces of "
                f"{self.path}; name one that is"
            )
        return token


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library (see `Tokenizer`)."""

    kind = "huggingface"

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import tokenizers

        self.path = path
        data = _read_file(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path} is not a Hugging Face tokenizer.json ({_one_line(error)}); give the file "
                "that `tokenizer.save_pretrained` writes"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a document cannot forge a control token
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.bos_id = vocabulary.get(_declared_token(path, "bos_token") or "")
        self.eos_token = _find_eod_token(path, vocabulary, eod_token)
        self.eos_id = vocabulary[self.eos_token]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)
        return text


def train_tokenizer(
    texts: Iterable[str], out: str | Path, model_type: ModelType, vocab_size: int
) -> None:
    """Train a lossless sentencepiece model on `texts` and write it to `out` (a `.model` file).

    Byte fallback, no normalization, whitespace kept and merged into runs, digits split one by
    one; ids 0 `<unk>`, 1 `<s>`, 2 `</s>`, then 256 bytes. The same texts give the same file.

    Raises DataError when the vocabulary is larger than the texts support or too small for the
    alphabet, naming the size that works, and when there is no text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2 * MAX_SENTENCE_BYTES,
            # Fixed: unigram sums expectations by thread, and the number is stored in the file.
            num_threads=8,
            minloglevel=3,  # its log would drown the progress; errors arrive as exceptions
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    Path(out).write_bytes(model.getvalue())


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut documents at line ends into sentences that sentencepiece accepts, losing no text."""
    for text in texts:
        sentence: list[str] = []
        num_bytes = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), MAX_SENTENCE_BYTES // 4):  # 4 bytes a character
                piece = line[start : start + MAX_SENTENCE_BYTES // 4]
                piece_bytes = len(piece.encode())
                if num_bytes + piece_bytes > MAX_SENTENCE_BYTES:
                    yield "".join(sentence)
                    sentence, num_bytes = [], 0
                sentence.append(piece)
                num_bytes += piece_bytes
        if sentence:
            yield "".join(sentence)


def _training_error(message: str, vocab_size: int) -> DataError:
    if found := re.search(r"too high .* <= (\d+)", message):
        return DataError(
            f"--vocab-size {vocab_size} is more than this text supports; use at most "
            f"{found.group(1)}, or train on more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"--vocab-size {vocab_size} is too small for the 256 bytes and the characters of this "
            f"text; use at least {found.group(1)}"
        )
    if "empty" in message:
        return DataError(
            "there is no text to train a tokenizer on; give inputs with text, or --tokenizer"
        )
    return DataError(f"sentencepiece cannot train on this text: {message}; give --tokenizer")


def _find_tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        found = [path / name for name in names if (path / name).is_file()]
        if len(found) != 1:
            count = "neither" if not found else "both"
            raise DataError(
                f"folder {path} holds {count} of tokenizer.model and tokenizer.json; "
                "name the tokenizer's file"
            )
        return found[0]
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist; give a sentencepiece .model file or a Hugging Face "
            "tokenizer.json"
        )
    return path


def _find_eod_token(path: Path, vocabulary: dict[str, int], eod_token: str | None) -> str:
    if eod_token is not None:
        if eod_token not in vocabulary:
            raise DataError(
                f"--eod-token {eod_token!r} is not among the {len(vocabulary)} tokens of {path}; "
                "name one that is"
            )
        return eod_token
    declared = _declared_token(path, "eos_token")
    if declared is not None and declared in vocabulary:
        return declared
    known = [name for name in KNOWN_EOD_TOKENS if name in vocabulary]
    if len(known) != 1:
        found = f"several candidates ({', '.join(known)})" if known else "none of the usual names"
        raise DataError(
            f"{path} does not say which token separates documents and has {found}; "
            "name it with --eod-token"
        )
    return known[0]


def _declared_token(path: Path, key: str) -> str | None:
    """`bos_token` or `eos_token` of the tokenizer_config.json beside the file, if there is one."""
    config_path = path.parent / "tokenizer_config.json"
    if not config_path.is_file():
        return None
    try:
        token = json.loads(config_path.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{config_path} is not a JSON object ({_one_line(error)}); mend or remove it"
        ) from error
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read: {error.strerror}; check its path and permissions"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
