"""What llama.cpp's own program llama-perplexity computes from a GGUF file and a text.

It is asked for the probabilities of every token (`--kl-divergence-base FILE`):

    "_logits_", int32 window W, int32 vocabulary V, int32 windows C
    int32 [C, W]          the token ids that it made of the text
    for each window, for each of its positions W/2 ... W - 2:
        float scale, float floor, uint16 [V rounded up to even]: log p = floor + scale x number

Numbers stand for the 16 nats below the most probable token, in steps of at most 2.5e-4.

Shapes: C windows, W window, N scored positions of a window, V vocabulary.
"""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitscale.errors import CheckpointError, DataError

_PROGRAM = "llama-perplexity"
_MAGIC = b"_logits_"
RANGE_NATS = 16.0  # below the most probable token; what is less probable is stored as that
_SECONDS = 1800.0
_ASK_SECONDS = 60.0


class ProgramOutput(NamedTuple):
    """Of C windows, every log-probability at the scored positions."""

    ids_CW: Tensor  # int64
    scored: slice  # positions of a window
    log_probs_CNV: Tensor  # fp32

    def windows(self) -> list[Tensor]:
        return [row[None] for row in self.ids_CW]

    def logits(self, ids_1W: Tensor) -> Tensor:
        """fp32 [1, W, V] of one of the windows; 0 where nothing is scored."""
        window = int((self.ids_CW == ids_1W).all(dim=1).nonzero()[0])
        out_1WV = torch.zeros(1, ids_1W.shape[1], self.log_probs_CNV.shape[-1])
        out_1WV[0, self.scored] = self.log_probs_CNV[window]
        return out_1WV


def in_range(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`logits` as log-probabilities, with the range in which the program stores them."""

    def log_probs(ids_BS: Tensor) -> Tensor:
        found = logits(ids_BS).log_softmax(dim=-1)
        return found.clamp(min=found.amax(dim=-1, keepdim=True) - RANGE_NATS)

    return log_probs


def find_program(path: Path) -> Path:
    """llama-perplexity at `path`, or in the directory `path`. CheckpointError if it is none."""
    program = path / _PROGRAM if path.is_dir() else path
    if not program.is_file():
        raise CheckpointError(
            f"{program} does not exist; name llama.cpp's {_PROGRAM} or the directory it is in"
        )
    if "--kl-divergence-base" not in _run([program, "--help"], _ASK_SECONDS).stdout:
        raise CheckpointError(
            f"{program} is not llama.cpp's {_PROGRAM}: its --help names no --kl-divergence-base; "
            "name that program or the directory it is in"
        )
    return program


def run_program(
    program: Path, model: Path, text: str, *, window: int, num_windows: int, vocab_size: int
) -> ProgramOutput:
    """Let `program` compute `model` on the first windows of `text`: fp32 key/value cache, no
    flash attention, on the CPU.

    Raises CheckpointError if it fails, takes too long or writes something else; DataError if the
    text is too short.
    """
    with tempfile.TemporaryDirectory(prefix="bitscale-llama-") as folder:
        file, out = Path(folder) / "text", Path(folder) / "logits"
        file.write_text(text.rstrip("\n"), encoding="utf-8")  # it would drop the last line's end
        size = ["-c", window, "-b", window, "--chunks", num_windows]
        exact = ["-ctk", "f32", "-ctv", "f32", "-ngl", 0, *_no_flash_attention(program)]
        command = [program, "-m", model, "-f", file, *size, *exact, "--kl-divergence-base", out]
        done = _run(command, _SECONDS)
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        short = next((line for line in said if "you need at least" in line), None)
        if short is not None:
            raise DataError(f"{_PROGRAM}: {short}; give a longer --text")
        if done.returncode or not out.is_file():
            errors = [line for line in said if "error" in line.lower()] or said or ["nothing"]
            raise CheckpointError(
                f"{program} does not compute {model} (exit code {done.returncode}): {errors[0]}"
            )
        return read_logits(out.read_bytes(), program, window, vocab_size)


def read_logits(content: bytes, where: Path, window: int, vocab_size: int) -> ProgramOutput:
    """What `--kl-divergence-base` wrote, strictly. CheckpointError, naming `where`, if it is
    something else, or of another window or vocabulary than asked for."""
    if content[:8] != _MAGIC or len(content) < 20:
        raise _not_logits(where, f"begins with {content[:8]!r}, not {_MAGIC!r}")
    found_window, found_vocab, count = np.frombuffer(content, "<i4", 3, 8).tolist()
    if (found_window, found_vocab) != (window, vocab_size) or count < 1:
        raise _not_logits(
            where,
            f"{count} windows of {found_window} tokens of {found_vocab}, and not windows of "
            f"{window} tokens of {vocab_size}",
        )
    first, width = window // 2, 2 * ((vocab_size + 1) // 2) + 4
    positions = window - 1 - first
    begin, end = 20 + 4 * count * window, 20 + 4 * count * window + 2 * count * positions * width
    if len(content) != end:
        raise _not_logits(where, f"{len(content)} bytes instead of {end}")
    ids = np.frombuffer(content, "<i4", count * window, 20).reshape(count, window)
    rows = np.frombuffer(content, "<u2", count * positions * width, begin)
    rows = rows.reshape(count, positions, width)
    scale, floor = np.moveaxis(rows[..., :4].copy().view("<f4"), -1, 0)[..., None]
    log_probs = floor + scale * rows[..., 4 : 4 + vocab_size].astype(np.float32)
    if not (np.isfinite(log_probs).all() and ids.min() >= 0 and ids.max() < vocab_size):
        raise _not_logits(where, "NaN, infinity or ids beyond the vocabulary")
    ids_CW = torch.from_numpy(ids.astype(np.int64))
    return ProgramOutput(ids_CW, slice(first, window - 1), torch.from_numpy(log_probs))


def _not_logits(where: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: wrote no logits as llama.cpp does ({what}); use another version of it"
    )


def _no_flash_attention(program: Path) -> list[str]:
    """Newer versions turn it on by themselves; in older ones the option has no value."""
    lines = _run([program, "--help"], _ASK_SECONDS).stdout.splitlines()
    takes_value = any("--flash-attn" in line and "on|off" in line for line in lines)
    return ["-fa", "off"] if takes_value else []


def _run(command: list[object], seconds: float) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except OSError as error:
        raise CheckpointError(f"{command[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{command[0]} has not finished after {seconds:g} s and was stopped; compare fewer "
            "--tokens"
        ) from error
