"""Tokenizers: lossless training, determinism, both file kinds, every message."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bitscale.data import python_docs
from bitscale.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from bitscale.errors import DataError

pytestmark = pytest.mark.unit

TRICKY = [
    "def f(x):\n    if x:\n\t\treturn  x\n\n\n",
    "  leading, trailing  ",
    "\n",
    "   ",
    "",
    "émigré, e\u0301, ﬁ ligature, ½, non-breaking\u00a0space, \u3000ideographic",
    "漢字かな交じり文 한국어 العربية",
    "👩‍👩‍👧 🏳️‍🌈 😀",
    "nul \0 and \x1b control",
    "a literal \u2581mark, \u2581\u2581, and \u2585",
    "\ufeffbyte-order mark",
    "</s> <s> <unk> <0x41> <|endoftext|>",
    "\U0010ffff\ue000\ufffe",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    files = python_docs.documentation_files()
    return [text for file in files[:30] for text in python_docs.read_documents(file)]


@pytest.fixture(scope="module", params=["bpe", "unigram", "huggingface"])
def tokenizer(
    request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "huggingface":
        return load_tokenizer(save_huggingface(folder / "tokenizer.json", texts))
    train_tokenizer(texts, folder / "t.model", request.param, 700)
    return load_tokenizer(folder / "t.model")


def save_huggingface(
    path: Path, texts: list[str], special: tuple[str, ...] = ("<|endoftext|>",)
) -> Path:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return path


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip_of_tricky_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids


def test_batch_equals_single(tokenizer: Tokenizer, texts: list[str]) -> None:
    samples = [*texts[:20], *TRICKY]
    assert tokenizer.encode_batch(samples) == [tokenizer.encode(text) for text in samples]


def test_attributes(tokenizer: Tokenizer) -> None:
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size <= 700
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    again = load_tokenizer(tokenizer.path, eod_token=tokenizer.eos_token)
    assert again.eos_id == tokenizer.eos_id


def test_trained_pieces(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer(texts, tmp_path / "t.model", "bpe", 700)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (700, 1, 2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    pieces = [model.id_to_piece(token) for token in range(700)]
    assert not any(re.search(r"\d.|.\d", piece) for piece in pieces[259:])  # digits are split
    assert any(re.fullmatch("▁{4,}", piece) for piece in pieces)  # indentation is one piece
    assert len(tokenizer.encode("2024")) == 4


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_whatever_the_cores(
    tmp_path: Path, texts: list[str], model_type: str
) -> None:
    corpus = tmp_path / "corpus.json"
    corpus.write_text(json.dumps(texts))
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "os.sched_setaffinity(0, json.loads(sys.argv[4]))\n"
        "from bitscale.data.tokenizer import train_tokenizer\n"
        "texts = json.loads(Path(sys.argv[1]).read_text())\n"
        "train_tokenizer(texts, sys.argv[2], sys.argv[3], 700)\n"
    )
    cores = sorted(os.sched_getaffinity(0))
    models = []
    for name, allowed in (("one", cores[:1]), ("all", cores)):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-c", code, str(corpus), str(out), model_type, json.dumps(allowed)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("", "")  # sentencepiece's log is silent
        models.append(out.read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_vocabulary_size_of_the_message_works(tmp_path: Path, model_type: str) -> None:
    text = ["the quick brown fox jumps over the lazy dog again and again\n"] * 3
    for size, message in ((50_000, r"use at most (\d+)"), (10, r"use at least (\d+)")):
        with pytest.raises(DataError, match=message) as caught:
            train_tokenizer(text, tmp_path / "t.model", model_type, size)
        assert f"--vocab-size {size}" in str(caught.value)
        assert not (tmp_path / "t.model").exists()
        found = re.search(message, str(caught.value))
        assert found is not None
        train_tokenizer(text, tmp_path / "t.model", model_type, int(found.group(1)))
        assert load_tokenizer(tmp_path / "t.model").vocab_size == int(found.group(1))
        (tmp_path / "t.model").unlink()


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_to_train_on(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
        train_tokenizer(texts, tmp_path / "t.model", "bpe", 300)


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    line = "zyx" * 40_000  # sentencepiece alone drops lines of more than 4192 bytes
    train_tokenizer([line, "é" * 9000], tmp_path / "t.model", "bpe", 275)
    assert len(load_tokenizer(tmp_path / "t.model").encode("zyx" * 100)) < 100


def test_models_with_a_dummy_prefix_are_left_as_they_are(tmp_path: Path, texts: list[str]) -> None:
    """U+2581 is encoded as bytes only where cutting the text there changes nothing else."""
    (tmp_path / "in.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "in.txt"),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=600,
        byte_fallback=True,
        minloglevel=3,
    )
    tokenizer = load_tokenizer(tmp_path / "llama.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama.model"))
    assert tokenizer.encode("a\u2581b") == library.encode("a\u2581b")


def test_sentencepiece_without_eos(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "in.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "in.txt"),
        model_prefix=str(tmp_path / "t"),
        vocab_size=400,
        eos_id=-1,
        control_symbols=["<eod>"],
        minloglevel=3,
    )
    with pytest.raises(DataError, match=r"t\.model declares no end-of-sentence.*--eod-token"):
        load_tokenizer(tmp_path / "t.model")
    tokenizer = load_tokenizer(tmp_path / "t.model", "<eod>")
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<eod>", 2)
    with pytest.raises(DataError, match="'<nope>' is not among the 400 pieces"):
        load_tokenizer(tmp_path / "t.model", "<nope>")


def test_huggingface_document_separator(tmp_path: Path, texts: list[str]) -> None:
    path = save_huggingface(tmp_path / "tokenizer.json", texts, ("<eos>", "</s>", "[SEP]"))
    with pytest.raises(DataError, match=r"several candidates \(</s>, <eos>\).*--eod-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, "[SEP]").eos_id == 2
    with pytest.raises(DataError, match=r"'<nope>' is not among the \d+ tokens"):
        load_tokenizer(path, "<nope>")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<eos>"}))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.bos_id) == ("</s>", 1, 0)
    config.write_text("[1]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        load_tokenizer(path)


def test_huggingface_without_separator(tmp_path: Path, texts: list[str]) -> None:
    path = save_huggingface(tmp_path / "tokenizer.json", texts, ("[SEP]",))
    with pytest.raises(DataError, match="none of the usual names; name it with --eod-token"):
        load_tokenizer(path)


def test_huggingface_truncation_and_padding_are_off(tmp_path: Path, texts: list[str]) -> None:
    path = save_huggingface(tmp_path / "tokenizer.json", texts)
    expected = load_tokenizer(path).encode_batch(texts[:3])
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.enable_truncation(8)
    raw.enable_padding(length=8)
    raw.save(str(path))
    assert load_tokenizer(path).encode_batch(texts[:3]) == expected
    assert max(map(len, expected)) > 8


def test_folder_with_one_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="holds neither of tokenizer"):
        load_tokenizer(tmp_path)
    path = save_huggingface(tmp_path / "tokenizer.json", texts)
    assert load_tokenizer(tmp_path).path == path
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(DataError, match="holds both of tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.model", None, r"no\.model does not exist; give a sentencepiece"),
        ("bad.model", b"not a model", r"bad\.model is not a sentencepiece model"),
        ("empty.model", b"", r"empty\.model is not a sentencepiece model"),
        ("bad.json", b"{}", r"bad\.json is not a Hugging Face tokenizer\.json"),
        ("binary.json", b"\xff\xfe", r"binary\.json is not a Hugging Face tokenizer\.json"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.model").touch()

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"t\.model cannot be read: Permission denied; check"):
        load_tokenizer(tmp_path / "t.model")


def test_untrainable_text_keeps_the_librarys_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sentencepiece cannot train on this text.*--tokenizer"):
        train_tokenizer(["\0"], tmp_path / "t.model", "bpe", 300)
