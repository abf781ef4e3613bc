"""`bitscale prepare` as a user runs it: outputs and every message."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from prepare_sessions import TOKENIZER, digests, fail, run, start

from bitscale.data import python_docs
from bitscale.data.prepare import load_corpus
from bitscale.data.tokenizer import load_tokenizer
from bitscale.errors import DataError

pytestmark = pytest.mark.e2e


def test_tokens_are_the_documents(folder: Path, reference: Path) -> None:
    corpus = load_corpus(reference, check_hashes=True)
    tokenizer = corpus.tokenizer()
    texts: dict[str, list[str]] = {}
    for name, info in corpus.splits.items():
        shard = corpus.shard(name)
        bounds = shard.document_starts
        documents = [shard.tokens(a, b) for a, b in pairwise(bounds)]
        assert all(ids[-1] == corpus.eod_id for ids in documents)
        texts[name] = [tokenizer.decode(ids[:-1].tolist()) for ids in documents]
        assert info.num_documents == len(documents)
        assert info.num_tokens == shard.num_tokens == sum(map(len, documents))
        assert info.num_bytes == sum(len(text.encode()) for text in texts[name])
    assert corpus.manifest.num_empty_documents == 2
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not set(texts[first]) & set(texts[second])

    lines = (folder / "in" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line)["text"] for line in lines]
    sections = [text for split in texts.values() for text in split]
    assert {text for text in records if text and text.strip()} <= set(sections)
    plain = "".join(
        (folder / "in" / f"{number}.txt").read_bytes().decode().replace("\r\n", "\n")
        for number in range(4)
    )
    num_plain_bytes = sum(len(text.encode()) for text in sections if text not in set(records))
    assert num_plain_bytes == len(plain.encode())
    assert all(text in plain for text in sections if text not in set(records))
    # within a split, documents keep the input's order
    first_file = (folder / "in" / "0.txt").read_bytes().decode().replace("\r\n", "\n")
    places = [first_file.find(text) for text in texts["train"] if text in first_file]
    assert len(places) > 3 and places == sorted(places)


def test_megatron_reads_the_shards(reference: Path) -> None:
    corpus = load_corpus(reference)
    for name in corpus.splits:
        theirs = IndexedDataset(str(corpus.prefix(name)))
        shard = corpus.shard(name)
        assert np.array_equal(np.concatenate(theirs[:]), shard.tokens(0, shard.num_tokens))
        assert len(theirs.document_indices) - 1 == shard.num_documents


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(folder: Path, reference: Path, workers: int) -> None:
    run(folder, "in", "--out", f"w{workers}", *TOKENIZER, "--workers", workers)
    assert digests(folder / f"w{workers}") == digests(reference)
    assert not (folder / f"w{workers}.partial").exists()


def test_fingerprint_ignores_paths_and_dates(folder: Path, reference: Path) -> None:
    moved = folder / "elsewhere"
    moved.mkdir()
    for path in (folder / "in").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    (moved / "t.model").write_bytes((folder / "tokenizer.model").read_bytes())
    options = ("--tokenizer", "elsewhere/t.model", *TOKENIZER[2:], "--workers", 1)
    (folder / "elsewhere-in").mkdir()
    for path in moved.glob("[0-9r]*"):
        path.rename(folder / "elsewhere-in" / path.name)
    run(folder, "elsewhere-in", "--out", "moved", *options)
    assert load_corpus(folder / "moved").fingerprint == load_corpus(reference).fingerprint
    run(folder, "in/0.txt", "--out", "other", *TOKENIZER, "--workers", 1)
    assert load_corpus(folder / "other").fingerprint != load_corpus(reference).fingerprint


def test_up_to_date_and_overwrite(folder: Path) -> None:
    source = folder / "small.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)))
    args = ("small.jsonl", "--out", "small", "--workers", 1)
    run(folder, *args, *TOKENIZER)
    before = digests(folder / "small")
    manifest = folder / "small" / "corpus.json"
    written = manifest.stat().st_mtime_ns
    assert run(folder, *args, *TOKENIZER) == "small is up to date\n"
    assert run(folder, *args[:-1], 2, *TOKENIZER, "--overwrite") == "small is up to date\n"
    assert manifest.stat().st_mtime_ns == written and digests(folder / "small") == before

    message = fail(folder, *args, "--tokenizer", "tokenizer.model", "--section-bytes", 20000)
    assert "small holds a corpus made differently (split was [0.8, 0.1, 0.1], now" in message
    assert digests(folder / "small") == before
    run(folder, *args, "--tokenizer", "tokenizer.model", "--split", "1,0,0", "--overwrite")
    assert sorted(path.name for path in (folder / "small").iterdir()) == [
        "corpus.json",
        "tokenizer.model",
        "train.bin",
        "train.idx",
    ]
    with pytest.raises(DataError, match="has no split 'valid', only train; prepare it again"):
        load_corpus(folder / "small").prefix("valid")


def test_damaged_corpus(folder: Path) -> None:
    source = folder / "damaged.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)))
    args = ("damaged.jsonl", "--out", "damaged", "--workers", 1, *TOKENIZER)
    run(folder, *args)
    out = folder / "damaged"
    tokens, manifest = out / "train.bin", out / "corpus.json"
    content, text = tokens.read_bytes(), manifest.read_text()

    tokens.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train\.bin has \d+ bytes, the manifest says \d+"):
        load_corpus(out)
    assert "--overwrite" in fail(folder, *args)
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    load_corpus(out)
    with pytest.raises(DataError, match=r"train\.bin has sha256 .*, the manifest says"):
        load_corpus(out, check_hashes=True)
    tokens.unlink()
    with pytest.raises(DataError, match=r"corpus file .*train\.bin is missing"):
        load_corpus(out)
    for broken, message in (
        (text[:-20], r"corpus\.json is damaged"),
        ("[]", r"corpus\.json is damaged"),
        (text.replace('"splits"', '"spilts"'), r"corpus\.json is damaged"),
        (text.replace('"format_version": 1', '"format_version": 9'), "has format version 9; this"),
    ):
        manifest.write_text(broken)
        with pytest.raises(DataError, match=message):
            load_corpus(out)
    manifest.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"corpus\.json cannot be read"):
        load_corpus(out)
    run(folder, *args, "--overwrite")
    assert load_corpus(out, check_hashes=True).splits["train"].num_documents > 200


def test_trained_tokenizer_and_default_corpus(folder: Path) -> None:
    stderr = run(folder, python_docs.NAME, "--out", "docs", "--vocab-size", 2000, "--workers", 2)
    assert "trained a bpe tokenizer of 2000 pieces" in stderr
    corpus = load_corpus(folder / "docs", check_hashes=True)
    assert corpus.vocab_size == 2000
    assert corpus.splits["train"].num_bytes > 1_000_000
    assert load_tokenizer(corpus.tokenizer_path).fingerprint == (
        corpus.manifest.tokenizer.fingerprint
    )
    run(folder, python_docs.NAME, "--out", "docs1", "--vocab-size", 2000, "--workers", 1)
    assert digests(folder / "docs") == digests(folder / "docs1")


def test_huggingface_dataset_and_tokenizer(folder: Path) -> None:
    import tokenizers

    texts = [f"row {i} of the dataset" for i in range(400)]
    (folder / "ds").mkdir()
    for shard in range(2):
        lines = [json.dumps({"body": text}) + "\n" for text in texts[shard::2]]
        (folder / "ds" / f"train-{shard}.jsonl").write_text("".join(lines))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["[A]", "[B]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    (folder / "hf").mkdir()
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    args = ("ds", "--format", "hf", "--text-key", "body", "--tokenizer", "hf", "--split", "1,0,0")
    assert "name it with --eod-token" in fail(folder, *args, "--out", "hf-out")
    run(folder, *args, "--out", "hf-out", "--eod-token", "[B]", "--workers", 2)
    corpus = load_corpus(folder / "hf-out")
    assert (corpus.eod_id, corpus.tokenizer().eos_token) == (1, "[B]")
    shard = corpus.shard("train")
    starts = shard.document_starts
    decoded = [
        corpus.tokenizer().decode(shard.tokens(a, b - 1).tolist()) for a, b in pairwise(starts)
    ]
    assert decoded == texts[0::2] + texts[1::2]


def test_messages(folder: Path) -> None:
    (folder / "one.txt").write_text("a single document")
    (folder / "empty.txt").write_text(" \n")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "precious").touch()
    (folder / "foreign2.partial").mkdir()
    (folder / "foreign2.partial" / "precious").touch()
    model = ("--tokenizer", "tokenizer.model", "--workers", 1)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("one.txt", "--split", "0.5,0.2,0.2"), "--split 0.5,0.2,0.2 is not three shares"),
        (("one.txt", "--split", "1.5,-0.5,0"), "--split 1.5,-0.5,0 is not three shares"),
        (("one.txt", "--workers", 0), "--workers 0 is not a number of processes"),
        (("one.txt", "--section-bytes", -1), "--section-bytes -1 is negative"),
        (("one.txt", "--vocab-size", 0), "--vocab-size 0 is not positive"),
        (("nowhere.txt",), "input 'nowhere.txt' does not exist; give a file"),
        (("one.txt", *model), "got none of the 1 documents; raise its share"),
        (("empty.txt", *model), "the inputs hold no text (1 empty documents)"),
        (("one.txt", "--split", "1,0,0"), "--vocab-size 4096 is more than this text supports"),
        (("one.txt", "--tokenizer", "no.model"), "tokenizer no.model does not exist"),
    ]
    for args, message in cases:
        assert message in fail(folder, *args, "--out", "message"), args
        assert not (folder / "message").exists()
    # a mended split starts at once: the failed run left nothing to refuse
    fail(folder, "one.txt", *model, "--out", "mended")
    run(folder, "one.txt", *model, "--out", "mended", "--split", "1,0,0")

    for extra in ((), ("--overwrite",)):
        message = fail(folder, "one.txt", *model, *extra, "--out", "foreign")
        assert "foreign exists and is not a prepared corpus; choose another --out" in message
        message = fail(folder, "one.txt", *model, *extra, "--out", "foreign2")
        assert "foreign2.partial exists and is not bitscale's; move it" in message
    assert (folder / "foreign" / "precious").exists()
    message = fail(folder, "one.txt", *model, "--out", "one.txt/sub")
    assert "cannot make the folder" in message


def test_input_fault_stops_the_run_and_can_be_mended(folder: Path) -> None:
    (folder / "faulty").mkdir()
    for number in range(2):
        (folder / "faulty" / f"{number}.txt").write_text(
            "".join(f"text {number} {line}\n\n" for line in range(150_000))
        )
    (folder / "faulty" / "2.txt").write_bytes(b"good\n\ncaf\xe9\n")
    args = ("faulty", *TOKENIZER, "--workers", 2, "--out", "faulty-out")
    message = fail(folder, *args)
    assert "2.txt: invalid UTF-8 at byte 9 (0xe9)" in message
    finished = len(list((folder / "faulty-out.partial" / "parts").glob("*/counts.json")))
    assert not (folder / "faulty-out").exists()
    # The remedy that the message names resumes: strict and replace agree on what is finished.
    stderr = run(folder, *args, "--encoding-errors", "replace")
    assert (f"resuming: {finished} of" in stderr) == (finished > 0)
    run(folder, "faulty", *args[1:-1], "whole", "--encoding-errors", "replace")
    assert digests(folder / "faulty-out") == digests(folder / "whole")


def test_progress_on_a_terminal(folder: Path) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "command.py", "prepare", "in", "--out", "terminal", *TOKENIZER]
    process = subprocess.Popen(command, cwd=folder, stderr=slave)
    os.close(slave)
    output = b""
    with suppress(OSError):  # how Linux says that the terminal's other end closed
        while block := os.read(master, 4096):
            output += block
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert b"tokenizing:" in output and b"tokens/s" in output and b"100%" in output


def test_wrong_shares_are_a_usage_error(folder: Path) -> None:
    process = start(folder, "in", "--out", "x", "--split", "0.9")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "'0.9' is not three numbers such as 0.98,0.01,0.01" in stderr


def test_help_is_fast_and_imports_nothing_heavy(folder: Path) -> None:
    code = (
        "import argparse, sys\nfrom bitscale.cli import prepare\n"
        "prepare.add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "print(sorted({'torch', 'numpy', 'sentencepiece', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
