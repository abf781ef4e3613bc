"""A tokenizer as transformers' AutoTokenizer loads it: the same ids as in training.

A `tokenizer.json` is copied. A sentencepiece model is copied too, and rewritten as a
`tokenizer.json`, because transformers' own conversion assumes Llama's settings (a space before the
text, merged blanks). The rewritten one must encode probe texts like the original, or is left out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from bitscale.convert.model_source import ModelSource
from bitscale.data.tokenizer import (
    WHITESPACE_MARK,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from bitscale.errors import CheckpointError, DataError

_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two blanks, a\ttab\nand\n\n    a new line; 1234567890 + 3.14 = ?!",
    "def f(x: int) -> int:\n    return x  # naïve café, Ελλάδα, 日本語, 🙂\r\n",
    "",
    " ",
    "a",
)


def write_tokenizer(source: ModelSource, out: Path) -> dict[str, Any]:
    """Write the tokenizer's files into `out`; returns what config.json says of it.

    No file is written if the corpus, and with it the tokenizer, has moved since the run.
    """
    if source.tokenizer_file is None:
        return {"eos_token_id": None, "bos_token_id": None}  # not the family's defaults
    try:
        tokenizer = load_tokenizer(source.tokenizer_file, source.eod_token)
    except DataError as error:
        raise CheckpointError(
            f"tokenizer: {error}; or name it as eos_token in a tokenizer_config.json beside it"
        ) from error
    shutil.copyfile(source.tokenizer_file, out / source.tokenizer_file.name)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.seq_len,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        converted = from_sentencepiece(tokenizer)
        if converted is None:
            config["tokenizer_class"] = "LlamaTokenizer"
        else:
            converted.save(str(out / "tokenizer.json"))
        config |= _sentencepiece_names(tokenizer)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        given = source.tokenizer_file.parent / "tokenizer_config.json"
        config = (json.loads(given.read_text()) if given.is_file() else {}) | config
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    return ids


def from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any | None:
    """The model as a `tokenizers.Tokenizer`; None if that would encode probe texts differently.

    Only a literal U+2581 becomes a space there, and the names of control tokens in a text become
    the tokens, as everywhere in transformers.
    """
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as Fast

    processor = tokenizer._processor
    pieces = [processor.id_to_piece(token) for token in range(tokenizer.vocab_size)]
    scores = [processor.get_score(token) for token in range(tokenizer.vocab_size)]
    steps: list[Any] = [normalizers.Replace(" ", WHITESPACE_MARK)]
    strip: list[Any] = []
    if processor.normalize("a").startswith(WHITESPACE_MARK):
        steps.insert(0, normalizers.Prepend(WHITESPACE_MARK))
        strip = [decoders.Strip(" ", 1, 0)]
    special = [
        AddedToken(pieces[token], special=True, normalized=False)
        for token in range(tokenizer.vocab_size)
        if processor.is_control(token) or processor.is_unknown(token)
    ]
    symbols = _user_defined(processor)
    for model in _models(processor, pieces, scores):
        fast = Fast(model)
        fast.normalizer = normalizers.Sequence(steps)
        fast.decoder = decoders.Sequence(
            [
                decoders.Replace(WHITESPACE_MARK, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *strip,
            ]
        )
        fast.add_special_tokens(special)
        fast.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
        if _agree(fast, tokenizer, symbols):
            return fast
    return None


def _user_defined(processor: Any) -> list[str]:
    """The symbols that are a piece wherever a text has them, whatever merges and scores say."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return [p.piece.replace(WHITESPACE_MARK, " ") for p in proto.pieces if p.type == kind]


def _models(processor: Any, pieces: list[str], scores: list[float]) -> list[Any]:
    """What the model may be: its file does not say through sentencepiece's interface."""
    from tokenizers import models

    unknown = processor.unk_id()
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    bpe = models.BPE(
        vocabulary,
        _merges(vocabulary, scores),
        unk_token=pieces[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    unigram = models.Unigram(
        list(zip(pieces, scores, strict=True)), unk_id=unknown, byte_fallback=True
    )
    return [bpe, unigram]


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; sentencepiece merges into the best piece first."""
    merges = [
        (-scores[token], vocabulary[piece[:i]], vocabulary[piece[i:]], piece[:i], piece[i:])
        for piece, token in vocabulary.items()
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _agree(fast: Any, tokenizer: Tokenizer, symbols: list[str]) -> bool:
    return all(
        fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
        for text in (*_PROBES, *(f"{symbol}a {symbol} b{symbol}{symbol}" for symbol in symbols))
    )


def _sentencepiece_names(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    processor = tokenizer._processor
    names = {"unk_token": processor.id_to_piece(processor.unk_id())}
    if tokenizer.bos_id is not None:
        names["bos_token"] = processor.id_to_piece(tokenizer.bos_id)
    return names
