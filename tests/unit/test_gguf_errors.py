"""Models that no GGUF file holds and files that are none: what is said; nothing is left behind."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import open_source
from bitscale.convert.gguf_export import export_gguf
from bitscale.convert.gguf_file import open_gguf
from bitscale.convert.model_source import ModelSource
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.data.tokenizer import train_tokenizer
from bitscale.errors import CheckpointError
from bitscale.quant.schedule import SIXTEEN_BIT, Strength
from tiny_models import make_source

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
WIDE = "model={d_model: 256, num_heads: 4, d_ff: 256, num_layers: 1}"


@pytest.fixture(scope="module")
def make(make_config: MakeConfig) -> Callable[..., ModelSource]:
    """make("key=value", ...): a decoder 256 wide, not trained."""

    def source(*overrides: str, strength: Strength | None = None) -> ModelSource:
        cfg = make_config("data.seq_len=64", "train.dtype=fp32", WIDE, *overrides)
        made = make_source(cfg, num_steps=0)
        return made if strength is None else replace(made, strength=strength)

    return source


@pytest.fixture(scope="module")
def file(make: Callable[..., ModelSource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    export_gguf(make(), out, "tq2_0", with_tokenizer=False)
    return out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.d_ff=255"],
            "layers.0.mlp.down.weight has 255 columns and TQ2_0 stores blocks of 256 (1 of 7 "
            "layers do not divide); llama.cpp would fall back to another type: use gguf-bf16, "
            "packed or compact, or train with model.d_model and model.d_ff that are multiples "
            "of 256",
        ),
        (["model.mlp=relu2_glu"], "has model.mlp='relu2_glu'; they compute SwiGLU; the formats"),
        (["model.norm=layernorm"], "has model.norm='layernorm'; they compute RMSNorm"),
        (["model.head_bits=8"], "has model.head_bits=8; they compute a floating-point head"),
        (
            ["model.sub_norm=true", "model.tie_embeddings=false"],
            "has model.sub_norm with an untied head (bitnet shares the embedding)",
        ),
        (["model.sub_norm=true", "model.qk_norm=true"], "both model.sub_norm and model.qk_norm"),
        (["model.sub_norm=true", "model.bias=true"], "biases in a model that needs 'bitnet'"),
        (["model.qk_norm=true", "model.bias=true"], "biases in a model that needs 'qwen3'"),
        (
            ["model.qk_norm=true", "model.rope_scaling={type: llama3, factor: 8.0}"],
            "rope_scaling llama3 in a model that needs 'qwen3'",
        ),
        (["quant.norm=layernorm"], "has a norm or rotation inside the quantizer"),
        (["quant.preset=int4"], "quant.preset='int4' trains with codes -8..7, not ternary: GGUF"),
        (["quant.preset=group128"], "trains with a scale per group, not one a matrix: GGUF"),
    ],
)
def test_models_that_do_not_fit(
    overrides: list[str], message: str, make: Callable[..., ModelSource], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        export_gguf(make(*overrides), tmp_path / "out.gguf", "tq2_0", with_tokenizer=False)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bit_models_have_no_codes(make: Callable[..., ModelSource], tmp_path: Path) -> None:
    for strength in (SIXTEEN_BIT, Strength(0.5, 0.5)):
        with pytest.raises(CheckpointError, match="not 1: its weights are not ternary; train past"):
            export_gguf(make(strength=strength), tmp_path / "a", "tq1_0", with_tokenizer=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_stay(make: Callable[..., ModelSource], tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("precious")
    with pytest.raises(CheckpointError, match="already exists; choose another name or remove it"):
        export_gguf(make(), tmp_path / "a.gguf", "tq2_0", with_tokenizer=False)
    assert (tmp_path / "a.gguf").read_text() == "precious"


def test_options_that_mean_nothing(
    make: Callable[..., ModelSource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(make(), tmp_path / "checkpoint", {}, None)
    export = ["export", str(checkpoint), str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*export, "--format", "gguf-f16", "--gguf-scale", "fp16"]) == 2
    assert "--gguf-scale fp16 means nothing to --format gguf-f16" in capsys.readouterr().err
    assert main([*export, "--format", "packed", "--gguf-tokenizer", "none"]) == 2
    assert "--gguf-tokenizer none means nothing to --format packed" in capsys.readouterr().err


def test_tokenizers(make: Callable[..., ModelSource], tmp_path: Path) -> None:
    """One that is missing, and the unigram model, which llama.cpp would read otherwise."""
    with pytest.raises(CheckpointError, match="the tokenizer is not where the run found it"):
        export_gguf(make(), tmp_path / "a.gguf", "tq2_0")
    unigram = tmp_path / "tokenizer.model"
    train_tokenizer(["the cat sat on the mat, and that was that. "] * 50, unigram, "unigram", 275)
    m = make().model.model_copy(update={"vocab_size": 275})
    source = replace(make(), tokenizer_file=unigram, model=m)
    with pytest.raises(
        CheckpointError, match=r"llama\.cpp has no unigram model with byte fallback"
    ):
        export_gguf(source, tmp_path / "a.gguf", "tq2_0")
    bpe = tmp_path / "bpe.model"
    train_tokenizer(["the cat sat on the mat, and that was that. "] * 50, bpe, "bpe", 275)
    with pytest.raises(CheckpointError, match="has 275 tokens and the model 96; it is not the"):
        export_gguf(replace(make(), tokenizer_file=bpe), tmp_path / "a.gguf", "tq2_0")


def _patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) >= 1
    return content.replace(old, new, 1)


def _truncated(content: bytes) -> bytes:
    return content[: len(content) - 5000]


def _short_header(content: bytes) -> bytes:
    return content[:200]


def _version_9(content: bytes) -> bytes:
    return content[:4] + struct.pack("<I", 9) + content[8:]


def _many_tensors(content: bytes) -> bytes:
    """The file ends after the last tensor's one dimension, type and offset."""
    end = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4 + 8
    return content[:8] + struct.pack("<Q", 2**60) + content[16:end]


def _unknown_type(content: bytes) -> bytes:
    """Of the embedding: after its name, the dimensions."""
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    return content[:place] + struct.pack("<I", 250) + content[place + 4 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "truncated: "),
        (_short_header, "truncated: its header goes on beyond the end of the file, byte 200"),
        (_version_9, "is GGUF version 9; 2 and 3 are read"),
        (_many_tensors, "truncated: its header goes on beyond the end"),
        (_unknown_type, "token_embd.weight has the unknown tensor type 250; this version knows"),
        (lambda c: _patched(c, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"), "'mamba'"),
        (lambda c: _patched(c, b"ffn_up.weight", b"ffn_xx.weight"), "tensors are missing: blk.0"),
        (lambda c: _patched(c, b'"codes_sha256"', b'"codes_sha257"'), "lacks codes_sha256; export"),
    ],
)
def test_damaged_files(
    damage: Callable[[bytes], bytes], message: str, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.gguf").write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError) as refused:
        open_source(tmp_path / "a.gguf")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_blocks_with_scales_of_their_own(file: Path, tmp_path: Path) -> None:
    """llama-quantize of a 16-bit model: a scale a block, which is not what was trained."""
    content = bytearray(file.read_bytes())
    tensor = open_gguf(file).tensors["blk.0.ffn_up.weight"]
    content[tensor.offset + 64] ^= 1  # the last bit of the first block's d
    (tmp_path / "a.gguf").write_bytes(content)
    source = open_source(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="within one matrix: it was quantized block by block"):
        source.ternary("layers.0.mlp.up.weight")


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"GGML or so")
    with pytest.raises(CheckpointError, match="is not a GGUF file: it does not begin with b'GGUF'"):
        open_gguf(tmp_path / "a")
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="empty: cannot be read as GGUF"):
        open_gguf(tmp_path / "empty")
