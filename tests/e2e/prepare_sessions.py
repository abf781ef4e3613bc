"""`bitscale prepare` as a process of its own, and a folder of inputs for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from bitscale.data import python_docs
from bitscale.data.corpus import file_sha256
from bitscale.data.tokenizer import train_tokenizer

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


def make_folder(folder: Path) -> Path:
    """Fill it with the command, a tokenizer and inputs of 3 MB in several parts."""
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
