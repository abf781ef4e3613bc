"""`verify --llama-cpp`: what llama-perplexity writes, read strictly, and programs that are not it.

Here a script stands in its place and writes logits in its format; llama.cpp's own is run by hand
(docs/conversion.md).
"""

import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitscale.config import Config
from bitscale.convert import llama_perplexity
from bitscale.convert.gguf_export import export_gguf
from bitscale.convert.gguf_source import gguf_source
from bitscale.convert.llama_cpp import simulated_logits
from bitscale.convert.llama_perplexity import find_program, in_range, read_logits
from bitscale.convert.model_source import ModelSource
from bitscale.convert.verify import Check, verify
from bitscale.errors import BitscaleError, CheckpointError
from bitscale.quant.schedule import TERNARY
from tiny_models import VOCAB_SIZE, make_source

pytestmark = pytest.mark.unit
WIDE = "model={d_model: 256, num_heads: 4, num_kv_heads: 2, d_ff: 256, num_layers: 1}"
WINDOW = 16
WHERE = Path("program")
PROGRAM = """\
#!{python}
import sys
if "--help" in sys.argv:
    print("-fa, --flash-attn [on|off|auto]\\n--kl-divergence-base FNAME")
    sys.exit()
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["-ctk"] == given["-ctv"] == "f32" and given["-fa"] == "off", given
assert given["-c"] == given["-b"] == "{window}" and given["--chunks"] == "3", given
assert not open(given["-f"]).read().endswith("\\n")
{body}
"""


def encoded(ids_CW: Tensor, log_probs_CNV: Tensor) -> bytes:
    """llama-perplexity's file, by its definition."""
    count, window = ids_CW.shape
    vocab_size = log_probs_CNV.shape[-1]
    out = b"_logits_" + struct.pack("<3i", window, vocab_size, count)
    out += ids_CW.int().numpy().tobytes()
    for row in log_probs_CNV.flatten(0, 1).double().numpy():
        floor = max(row.min(), row.max() - 16)
        scale = (row.max() - floor) / 65535
        numbers = np.rint((np.maximum(row, floor) - floor) / scale).astype("<u2")
        padding = b"\0\0" * (vocab_size % 2)
        out += struct.pack("<2f", scale, floor) + numbers.tobytes() + padding
    return out


def program(folder: Path, body: str) -> Path:
    file = folder / "llama-perplexity"
    file.write_text(PROGRAM.format(python=sys.executable, window=WINDOW, body=body))
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def model(
    make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSource, Path]:
    cfg = make_config(f"data.seq_len={WINDOW}", "train.dtype=fp32", WIDE)
    source, path = make_source(cfg, num_steps=3), tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(source, path, "tq2_0", with_tokenizer=False)
    return source, path


def verified(model: tuple[ModelSource, Path], folder: Path, sharpness: float) -> dict[str, Check]:
    """By a program that computes the model, with logits times `sharpness`."""
    source, path = model
    ids_CW = torch.randint(0, VOCAB_SIZE, (3, WINDOW), generator=torch.Generator().manual_seed(1))
    logits = simulated_logits(source)(ids_CW)[:, WINDOW // 2 : WINDOW - 1]
    (folder / "logits").write_bytes(encoded(ids_CW, (sharpness * logits).log_softmax(-1)))
    copy = (
        f"import shutil; shutil.copyfile({str(folder / 'logits')!r}, given['--kl-divergence-base'])"
    )
    program(folder, copy)
    (folder / "text").write_text("any text\n")
    checks = verify(
        source, gguf_source(path), text=folder / "text", num_tokens=3 * WINDOW, program=folder
    )
    return {check.name: check for check in checks}


def test_verify_by_the_program(model: tuple[ModelSource, Path], tmp_path: Path) -> None:
    checks = verified(model, tmp_path, 1.0)
    assert all(check.passed for check in checks.values()), checks
    figures = checks["logits"].figures
    assert "of 21; A in bitscale at λ 1/1, B in llama-perplexity" in figures
    assert checks["logits"].values["max_difference"] < 2e-4  # half a step of 16 / 65535
    assert checks["logits"].values["greedy_agreement"] == 1.0
    assert checks["as trained"].values["kl_nats"] > checks["logits"].values["kl_nats"]
    checks = verified(model, tmp_path, 1.1)
    assert not checks["logits"].passed and not checks["perplexity"].passed


def test_what_is_read_is_what_was_written() -> None:
    generator = torch.Generator().manual_seed(2)
    ids_CW = torch.randint(0, 7, (2, 6), generator=generator)
    log_probs = (9 * torch.randn(2, 2, 7, generator=generator)).log_softmax(-1)
    found = read_logits(encoded(ids_CW, log_probs), WHERE, 6, 7)
    assert torch.equal(found.ids_CW, ids_CW) and found.scored == slice(3, 5)
    expected = in_range(lambda _: log_probs)(ids_CW)
    assert float((found.log_probs_CNV - expected).abs().max()) <= 1.3e-4
    assert float((log_probs - expected).abs().max()) > 1  # some lie outside the range
    second = found.logits(found.windows()[1])
    assert torch.equal(second[0, 3:5], found.log_probs_CNV[1]) and not second[0, :3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"gguf" + c[4:], r"begins with b'gguf"),
        (lambda c: c[:-2], r"bytes instead of"),
        (lambda c: c + b"\0\0", r"bytes instead of"),
        (lambda c: c[:8] + struct.pack("<3i", 8, 7, 2) + c[20:], r"2 windows of 8 tokens of 7"),
        (lambda c: c[:20] + struct.pack("<i", 7) + c[24:], r"ids beyond the vocabulary"),
        (lambda c: c[:68] + struct.pack("<f", float("nan")) + c[72:], r"NaN, infinity or"),
    ],
)
def test_other_files_are_refused(change: Callable[[bytes], bytes], message: str) -> None:
    content = encoded(torch.zeros(2, 6), torch.randn(2, 2, 7).log_softmax(-1))
    with pytest.raises(CheckpointError, match=rf"^program: wrote no logits .*{message}"):
        read_logits(change(content), WHERE, 6, 7)


def refusal(model: tuple[ModelSource, Path], folder: Path, path: Path, **changes: object) -> str:
    source, file = model
    (folder / "text").write_text("any text")
    given = {"text": folder / "text", "num_tokens": 3 * WINDOW, "program": path, **changes}
    b = given.pop("b", gguf_source(file))
    with pytest.raises(BitscaleError) as error:
        verify(source, b, **given)  # type: ignore[arg-type]
    return str(error.value)


def test_programs_that_are_not_it(
    model: tuple[ModelSource, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(model, tmp_path, tmp_path / "none") == (
        f"{tmp_path / 'none'} does not exist; name llama.cpp's llama-perplexity or the directory "
        "it is in"
    )
    assert "/true is not llama.cpp's llama-perplexity: its --help names no --kl" in refusal(
        model, tmp_path, Path("/bin/true")
    )
    assert f"{tmp_path / 'text'} cannot be run: Permission denied" in refusal(
        model, tmp_path, tmp_path / "text"
    )
    path = program(tmp_path, "sys.exit('error: unknown model architecture')")
    assert refusal(model, tmp_path, path) == (
        f"{path} does not compute {model[1]} (exit code 1): error: unknown model architecture"
    )
    path = program(tmp_path, "print('you need at least 32 tokens'); open('/dev/null')")
    assert "you need at least 32 tokens; give a longer --text" in refusal(model, tmp_path, path)
    path = program(tmp_path, "import time; time.sleep(60)")
    assert find_program(tmp_path) == path
    monkeypatch.setattr(llama_perplexity, "_SECONDS", 0.5)
    assert "has not finished after 0.5 s and was stopped" in refusal(model, tmp_path, path)


def test_what_it_is_for(
    model: tuple[ModelSource, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path, "")
    assert refusal(model, tmp_path, path, text=None) == (
        "--llama-cpp needs --text FILE, of which llama.cpp makes tokens"
    )
    other = replace(model[0], strength=TERNARY)
    assert refusal(model, tmp_path, path, b=other) == (
        "--llama-cpp computes GGUF files, and B, memory, is none; leave it out"
    )
    asks = SimpleNamespace(metadata={"tokenizer.ggml.add_bos_token": True})
    monkeypatch.setattr("bitscale.convert.verify.open_gguf", lambda _: asks)
    assert f"{model[1]} wants a begin token (add_bos_token), which" in refusal(
        model, tmp_path, path
    )
