"""`bitscale prepare` as a user runs it: outputs, resuming after SIGKILL, every message."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from bitscale.data import python_docs
from bitscale.data.corpus import file_sha256
from bitscale.data.prepare import load_corpus
from bitscale.data.tokenizer import load_tokenizer, train_tokenizer
from bitscale.errors import DataError

pytestmark = pytest.mark.e2e

# Kills itself with SIGKILL before calling the function of prepare.py that KILL_BEFORE names.
COMMAND = """
import argparse, os, signal, sys
from bitscale.cli import prepare
from bitscale.errors import BitscaleError

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def main():
    if "KILL_BEFORE" in os.environ:
        import bitscale.data.prepare
        assert callable(getattr(bitscale.data.prepare, os.environ["KILL_BEFORE"]))
        setattr(bitscale.data.prepare, os.environ["KILL_BEFORE"], kill)
    parser = argparse.ArgumentParser()
    prepare.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args()
    try:
        return args.run(args)
    except BitscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command, a tokenizer and inputs of 3 MB in several parts."""
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "command.py").write_text(COMMAND)
    files = python_docs.documentation_files()
    texts = [text for file in files[:80] for text in python_docs.read_documents(file)]
    train_tokenizer(texts, folder / "tokenizer.model", "bpe", 1000)
    (folder / "in").mkdir()
    for number in range(4):  # no section occurs twice
        lines = "".join(texts).split("\n")
        content = "\n".join(f"{number} {line}" if line else "" for line in lines)
        (folder / "in" / f"{number}.txt").write_bytes(content.replace("\n", "\r\n").encode())
    records = [{"text": f"record {text}"} for text in texts] + [{"text": " \n"}, {"text": None}]
    (folder / "in" / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def start(folder: Path, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(folder / "command.py"), "prepare", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # A test run in the background of a script ignores SIGINT, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(folder: Path, *args: object) -> str:
    """stderr of a successful run."""
    process = start(folder, *args)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout == ""
    return stderr


def fail(folder: Path, *args: object) -> str:
    """The error line of a run that the user can mend."""
    process = start(folder, *args)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: "), stderr
    assert "Traceback" not in stderr
    return last


TOKENIZER = ("--tokenizer", "tokenizer.model", "--split", "0.8,0.1,0.1", "--section-bytes", "20000")


def digests(out: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    stderr = run(folder, "in", "--out", "reference", *TOKENIZER, "--workers", 1)
    assert stderr.count("\n") == 1 and "2 empty documents skipped" in stderr
    return folder / "reference"


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


def wait_until(process: subprocess.Popen[str], partial: Path, stage: str) -> None:
    """Until OUT.partial shows that the run has reached the stage."""
    reached = {
        "request": lambda: (partial / "request.json").exists(),
        "tokenizer": lambda: (partial / "tokenizer.model").exists(),
        "part begun": lambda: bool(list(partial.glob("parts/*.tmp/*"))),
        "part done": lambda: bool(list(partial.glob("parts/*/counts.json"))),
        "merging": lambda: (partial / "final").exists(),
        "merged": lambda: (
            (partial / "final" / "corpus.json.partial").exists()
            or (partial / "final" / "corpus.json").exists()
        ),
    }[stage]
    while not reached() and process.poll() is None:
        time.sleep(0.001)


def children_of(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


STAGES = ["request", "tokenizer", "part begun", "part done"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes(folder: Path, reference: Path, stage: str, workers: int) -> None:
    out = folder / f"killed-{STAGES.index(stage)}-{workers}"
    partial = Path(f"{out}.partial")
    args = ("in", "--out", out.name, *TOKENIZER, "--workers", workers)
    process = start(folder, *args)
    wait_until(process, partial, stage)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail(f"finished before the kill at stage {stage!r}")
    assert process.returncode == -signal.SIGKILL
    assert_nothing_looks_finished(out)

    done = {path.parent: path.stat().st_mtime_ns for path in partial.glob("parts/*/counts.json")}
    done = {part: time_ns for part, time_ns in done.items() if part.suffix != ".tmp"}
    assert done or stage != "part done"
    run_resumed(folder, args, done)
    assert digests(out) == digests(reference)
    assert not partial.exists()


@pytest.mark.parametrize("function", ["_tokenize", "_merge", "_versions", "_publish"])
def test_killed_at_an_exact_point(
    folder: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    out = folder / f"killed{function}"
    args = ("in", "--out", out.name, *TOKENIZER, "--workers", 1)
    monkeypatch.setenv("KILL_BEFORE", function)
    process = start(folder, *args)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_nothing_looks_finished(out)
    monkeypatch.delenv("KILL_BEFORE")
    stderr = run(folder, *args)
    assert ("resuming" in stderr) == (function != "_tokenize")
    assert digests(out) == digests(reference)
    assert not Path(f"{out}.partial").exists()


def test_killed_while_replacing_keeps_the_old_corpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("in/0.txt", "--out", "replaced", *TOKENIZER, "--workers", 1)
    run(folder, *args)
    before = digests(folder / "replaced")
    changed = (*args, "--section-bytes", 9000, "--overwrite")
    monkeypatch.setenv("KILL_BEFORE", "_publish")
    process = start(folder, *changed)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert digests(folder / "replaced") == before
    monkeypatch.delenv("KILL_BEFORE")
    run(folder, *changed)
    assert load_corpus(folder / "replaced", check_hashes=True)
    assert digests(folder / "replaced") != before


def assert_nothing_looks_finished(out: Path) -> None:
    assert not out.exists()
    with pytest.raises(DataError, match="is not a prepared corpus"):
        load_corpus(out)
    with pytest.raises(DataError, match="is not a prepared corpus"):
        load_corpus(f"{out}.partial")


def run_resumed(folder: Path, args: tuple[object, ...], done: dict[Path, int]) -> None:
    """Run to the end; parts in `done` must still be the same files while it runs."""
    process = start(folder, *args)
    while process.poll() is None:
        for part, time_ns in done.items():
            with suppress(FileNotFoundError):  # published, and the staging folder removed
                assert (part / "counts.json").stat().st_mtime_ns == time_ns
        time.sleep(0.02)
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    if done:
        assert f"resuming: {len(done)} of " in stderr


def test_workers_end_with_a_killed_parent(folder: Path) -> None:
    args = ("in", "--out", "orphans", *TOKENIZER, "--workers", 2)
    process = start(folder, *args)
    wait_until(process, folder / "orphans.partial", "part begun")
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the killed prepare"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_killed_worker(folder: Path, reference: Path) -> None:
    args = ("in", "--out", "worker", *TOKENIZER, "--workers", 2)
    process = start(folder, *args)
    wait_until(process, folder / "worker.partial", "part begun")
    for pid in children_of(process.pid):
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "error: a worker process was killed, perhaps for memory; run the same" in stderr
    assert_nothing_looks_finished(folder / "worker")
    run(folder, *args)
    assert digests(folder / "worker") == digests(reference)


def test_interrupt_ends_soon_and_resumes(folder: Path, reference: Path) -> None:
    for attempt in range(5):  # the rest of the work takes a moment only: it may win the race
        args = ("in", "--out", f"interrupted-{attempt}", *TOKENIZER, "--workers", 2)
        process = start(folder, *args)
        wait_until(process, folder / f"interrupted-{attempt}.partial", "part begun")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        if process.returncode != 0:
            break
    else:
        pytest.fail("five runs went on to their end in spite of an interrupt")
    out = folder / f"interrupted-{attempt}"
    assert_nothing_looks_finished(out)
    run(folder, *args)
    assert digests(out) == digests(reference)


def test_two_runs_at_once(folder: Path) -> None:
    args = ("in", "--out", "twice", *TOKENIZER, "--workers", 1)
    process = start(folder, *args)
    wait_until(process, folder / "twice.partial", "request")  # the lock is held, work is ahead
    process.send_signal(signal.SIGSTOP)
    try:
        message = fail(folder, *args)
        assert "another process is preparing" in message and "wait for it" in message
    finally:
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_interrupted_run_with_other_options(folder: Path) -> None:
    source = folder / "changing.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(200)))
    args = ("changing.jsonl", "--out", "other-options", "--workers", 1)
    process = start(folder, *args, *TOKENIZER)
    wait_until(process, folder / "other-options.partial", "request")
    process.kill()
    process.communicate()
    partial = folder / "other-options.partial"
    if not partial.exists():
        pytest.fail("finished before the kill")

    message = fail(folder, *args, *TOKENIZER[:-1], 100)
    assert "interrupted preparation made differently (section_bytes was 20000, now 100)" in message
    assert "repeat its options to resume it, or discard it with --overwrite" in message
    source.write_text(source.read_text() + '{"text": "more"}\n')
    assert "(input changing.jsonl changed" in fail(folder, *args, *TOKENIZER)
    run(folder, *args, *TOKENIZER, "--overwrite")
    assert not partial.exists()


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
