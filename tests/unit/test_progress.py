"""Lines of progress where stderr is no terminal."""

import re
import time

import pytest

from bitscale.data import progress
from bitscale.data.progress import ByteProgress, TokenProgress

pytestmark = pytest.mark.unit


def test_progress_elsewhere_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with TokenProgress(num_bytes=4_000_000, done_bytes=1_000_000) as bar:
        bar.add_tokens(1_000_000, 300_000)
    assert capsys.readouterr().err == ""  # nothing within ten seconds
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with TokenProgress(num_bytes=4_000_000, done_bytes=1_000_000) as bar:
        time.sleep(0.1)
        bar.add_tokens(1_000_000, 300_000)
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"tokenizing: 2 of 4 MB, \d+\.\d MB/s, [\d,]+ tokens/s, \d+ s left\n", line
    ), line
    with TokenProgress(num_bytes=0, done_bytes=0) as bar:
        bar.add_tokens(0, 300_000)
    assert re.fullmatch(r"tokenizing: 300000 tokens, [\d,]+ tokens/s\n", capsys.readouterr().err)


def test_bytes_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with ByteProgress(".model.gguf.partial", 4_000_000) as bar:
        time.sleep(0.1)
        bar.add(1_000_000)
    line = capsys.readouterr().err
    assert re.fullmatch(r"model.gguf: 1 of 4 MB, \d+\.\d MB/s, \d+ s left\n", line), line
