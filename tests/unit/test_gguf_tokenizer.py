"""Tokenizers as GGUF metadata: ids keep their meaning, rules that llama.cpp lacks are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitscale.convert.gguf_tokenizer import read_vocabulary
from bitscale.data.tokenizer import load_tokenizer, train_tokenizer
from bitscale.errors import CheckpointError

pytestmark = pytest.mark.unit
TEXT = ["the cat sat on the mat, and that was that, 12 times. "] * 50
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = {**GPT2, "use_regex": False}
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def byte_level(folder: Path, **changes: Any) -> Path:
    """A tokenizer.json of bytes, two merges and an added token."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*alphabet, "th", "the"])}
    model = tokenizers.models.BPE(vocabulary, [("t", "h"), ("th", "e")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["</s>"])
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = GPT2
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return folder / "tokenizer.json"


def test_sentencepiece(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    train_tokenizer(TEXT, path, "bpe", 280)
    found, loaded = read_vocabulary(path, 283, None), load_tokenizer(path)
    assert (found.model, found.pre, found.merges) == ("llama", "default", None)
    assert found.tokens[:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert found.types[:5] == [2, 3, 3, 6, 6]
    assert [loaded.decode([i]) for i in range(270, 280)] == [
        token.replace("\u2581", " ") for token in found.tokens[270:280]
    ]
    assert found.tokens[280:] == ["[PAD280]", "[PAD281]", "[PAD282]"]
    assert found.types[280:] == [5, 5, 5]
    assert found.scores is not None
    assert len(found.scores) == 283
    assert found.scores[259] > found.scores[279]  # by rank: earlier merges first
    assert found.special == {"unknown": 0, "bos": 1, "eos": 2}
    flags = {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": False}
    assert found.flags == flags
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert read_vocabulary(path, 280, None).flags["add_bos_token"]
    other = read_vocabulary(path, 280, "<s>")
    assert other.special["eos"] == 1


@pytest.mark.parametrize(
    ("pre_tokenizer", "rule"),
    [
        (GPT2, "gpt-2"),
        (sequence(split(LLAMA3), PLAIN), "llama-bpe"),
        (sequence(split(LLAMA3.replace("{1,3}", "")), PLAIN), "qwen2"),
        (sequence({"type": "Digits", "individual_digits": True}, GPT2), "smollm"),
    ],
)
def test_byte_level(pre_tokenizer: dict[str, Any], rule: str, tmp_path: Path) -> None:
    found = read_vocabulary(byte_level(tmp_path, pre_tokenizer=pre_tokenizer), 264, None)
    assert (found.model, found.pre, found.scores) == ("gpt2", rule, None)
    assert found.merges == ["t h", "th e"]
    assert found.tokens[256:] == ["th", "the", "</s>"] + [f"[PAD{i}]" for i in range(259, 264)]
    assert found.types[256:] == [1, 1, 3, 5, 5, 5, 5, 5]
    assert found.special == {"eos": 258}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": sequence(split("a+"), PLAIN)},  # a rule that it has no name for
        {"pre_tokenizer": {**GPT2, "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": PLAIN},
        {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, GPT2)},
        {"normalizer": {"type": "Lowercase"}},
    ],
)
def test_rules_that_llama_cpp_lacks(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a rule that llama\.cpp does not know; give"):
        read_vocabulary(byte_level(tmp_path, **changes), 264, None)


def test_other_models_are_refused(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "a"}
    path = byte_level(tmp_path, model=model, added_tokens=[])
    with pytest.raises(CheckpointError, match="is a WordLevel model, not BPE; give --gguf-tok"):
        read_vocabulary(path, 2, None)
