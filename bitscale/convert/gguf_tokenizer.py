"""A tokenizer as the metadata of a GGUF file, such that llama.cpp gives the same ids.

sentencepiece BPE is llama.cpp's "llama"; byte-level BPE (tokenizer.json) its "gpt2" with the name
of one of the regular expressions that it knows. Neither begin nor end tokens are added, as in
training, unless a tokenizer_config.json beside the file asks for them.

What llama.cpp would tokenize differently is refused: it has no unigram model with byte fallback.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.data.tokenizer import load_tokenizer
from bitscale.errors import CheckpointError

# TokenType of gguf-py, as llama.cpp's enum.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PADDING_SCORE = -10000.0
_REMEDY = "give --gguf-tokenizer none to write the file without a tokenizer"

# What ByteLevel(use_regex) splits by, and what Split is given in the published tokenizers, with
# llama.cpp's name for a rule that splits alike.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_RULES = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


class Vocabulary(NamedTuple):
    """The `tokenizer.ggml.*` keys."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # sentencepiece
    merges: list[str] | None  # byte-level BPE
    special: dict[str, int]  # bos, eos, unknown -> id
    flags: dict[str, bool]


def read_vocabulary(path: Path, vocab_size: int, eod_token: str | None) -> Vocabulary:
    """Of a `.model` or tokenizer.json; `vocab_size` is the model's, which may be larger.

    `eod_token` as in `load_tokenizer`.

    Raises CheckpointError if llama.cpp has no such tokenizer.
    """
    loaded = load_tokenizer(path, eod_token)  # refuses what is neither
    vocabulary = _byte_level(path) if loaded.kind == "huggingface" else _sentencepiece(path)
    special = {"bos": loaded.bos_id, "eos": loaded.eos_id}
    vocabulary.special.update({role: id_ for role, id_ in special.items() if id_ is not None})
    missing = vocab_size - len(vocabulary.tokens)
    if missing < 0:
        raise CheckpointError(
            f"{path} has {len(vocabulary.tokens)} tokens and the model {vocab_size}; it is not the "
            "model's tokenizer"
        )
    first = len(vocabulary.tokens)
    padding = [f"[PAD{i}]" for i in range(first, vocab_size)]
    scores = vocabulary.scores
    return vocabulary._replace(
        tokens=vocabulary.tokens + padding,
        types=vocabulary.types + [_UNUSED] * missing,
        scores=None if scores is None else scores + [_PADDING_SCORE] * missing,
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """To a gguf.GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for role, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    for flag, value in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", value)


def _sentencepiece(path: Path) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "is not sentencepiece BPE; llama.cpp has no unigram model with byte fallback": (
            trainer.model_type != trainer.BPE
        ),
        f"normalizes text by {normalizer.name!r}, which llama.cpp does not": bool(
            normalizer.precompiled_charsmap
        ),
        "removes repeated spaces, which llama.cpp does not": normalizer.remove_extra_whitespaces,
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(f"{path} {reason}; {_REMEDY}")
    # sentencepiece's numbers of types are llama.cpp's; USER_DEFINED with spaces as they are.
    tokens = [
        piece.piece.replace("▁", " ") if piece.type == _USER_DEFINED else piece.piece
        for piece in proto.pieces
    ]
    special = {"unknown": trainer.unk_id} if trainer.unk_id >= 0 else {}
    return Vocabulary(
        "llama",
        "default",
        tokens,
        [piece.type for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        None,
        special,
        {"add_space_prefix": normalizer.add_dummy_prefix, **_begin_and_end(path)},
    )


def _byte_level(path: Path) -> Vocabulary:
    import tokenizers

    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"{path} is a {model.get('type')} model, not BPE; {_REMEDY}")
    rule = _rule(content)
    if rule is None:
        raise CheckpointError(
            f"{path} normalizes or splits text by a rule that llama.cpp does not know; {_REMEDY}"
        )
    # From the library: it numbers added tokens itself where the file's ids leave gaps.
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    added = tokenizer.get_added_tokens_decoder()
    names = {id_: name for name, id_ in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for token in range(max(names) + 1):
        name = names.get(token, f"[PAD{token}]")
        tokens.append(name)
        if token not in names:
            types.append(_UNUSED)
        elif token in added:
            types.append(_CONTROL if added[token].special else _USER_DEFINED)
        else:
            types.append(_NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary("gpt2", rule, tokens, types, None, merges, {}, _begin_and_end(path))


def _rule(content: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits text into words; None if it has none."""
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # as Qwen's, whose files lack it
        return None
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    patterns = [_GPT2] if steps[-1].get("use_regex", True) else []
    for step in steps[:-1]:
        if step.get("type") == "Digits" and step.get("individual_digits") and len(steps) == 2:
            return "smollm" if patterns else None
        if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
            return None
        patterns.insert(0, step["pattern"].get("Regex"))
    return _RULES.get(patterns[0]) if len(patterns) == 1 else None


def _begin_and_end(path: Path) -> dict[str, bool]:
    """Whether llama.cpp adds begin and end tokens to a prompt."""
    file, asked = path.parent / "tokenizer_config.json", {}
    if file.is_file():
        asked = json.loads(file.read_text(encoding="utf-8"))
    return {
        "add_bos_token": bool(asked.get("add_bos_token", False)),
        "add_eos_token": bool(asked.get("add_eos_token", False)),
    }
