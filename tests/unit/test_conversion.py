"""Between precisions: latents of codes, the rounding baseline, certificates, verify."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitscale.cli.export import FORMATS
from bitscale.cli.main import main
from bitscale.config import Config, QuantConfig, quant_spec
from bitscale.convert import load_model, open_source
from bitscale.convert.certificate import read_certificate
from bitscale.convert.formats import WRITERS, ExportOptions, export
from bitscale.convert.latents import latents_of_codes
from bitscale.convert.model_source import dequantized
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.convert.verify import verify
from bitscale.data.tokenizer import load_tokenizer
from bitscale.errors import CheckpointError, DataError
from bitscale.quant.quantizer import quantize
from bitscale.quant.reference import Ternary, ternarize
from bitscale.quant.schedule import SIXTEEN_BIT
from tiny_models import make_checkpoint

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
_MATRIX = ("b158", "absmedian", "twn", "trilm")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def ternary(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint at λ = 1 in bf16."""
    out = tmp_path_factory.mktemp("ternary") / "checkpoint"
    return make_checkpoint(make_config, out, "train.dtype=bf16")


@pytest.fixture(scope="module")
def sixteen_bit(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sixteen") / "checkpoint"
    return make_checkpoint(make_config, out, "train.dtype=bf16", strength=SIXTEEN_BIT)


def test_every_format_is_named_once() -> None:
    assert FORMATS.keys() == WRITERS.keys()


# --- latents of codes ---


@settings(max_examples=60, deadline=None)
@given(
    # twn in bf16: a mean that leaves weights out need not be that of bf16 numbers near it.
    case=st.sampled_from([(p, d) for p in _MATRIX for d in DTYPES if (p, d) != ("twn", "bf16")]),
    log_std=st.floats(-9, 0),
    rows=st.integers(4, 40),
    seed=st.integers(0, 99),
)
def test_latents_quantize_to_their_codes_and_scale(
    case: tuple[str, str], log_std: float, rows: int, seed: int
) -> None:
    """packed -> latent -> packed is the identity, whatever the quantizer and the dtype."""
    preset, dtype = case
    spec = quant_spec(QuantConfig.model_validate({"preset": preset}))
    generator = torch.Generator().manual_seed(seed)
    weight_FD = (torch.randn(rows, 48, generator=generator) * 2.0**log_std).to(DTYPES[dtype])
    codes = ternarize(weight_FD, spec)
    latent_FD = latents_of_codes(codes, spec, DTYPES[dtype], "w")
    assert latent_FD.dtype == DTYPES[dtype]
    again = ternarize(latent_FD, spec)
    assert torch.equal(again.codes_FD, codes.codes_FD)
    assert torch.equal(again.scale, codes.scale)


@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("blocks", [None, (3, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantized_is_rounded_once(
    dtype: torch.dtype, blocks: tuple[int, int] | None, most: int
) -> None:
    """As if made in fp32, whether or not it is."""
    generator = torch.Generator().manual_seed(0)
    codes_FD = torch.randint(-most, most + 1, (300, 64), generator=generator, dtype=torch.int8)
    scale = 0.01 + 0.05 * torch.rand(blocks or (), generator=generator)
    got = dequantized(Ternary(codes_FD, scale), dtype)
    want = dequantized(Ternary(codes_FD, scale))
    assert want.dtype == torch.float32
    assert torch.equal(got.view(torch.int16), want.to(dtype).view(torch.int16))


def test_dequantized_weights_are_no_latents() -> None:
    """The trap: their codes are kept, and their absmean scale is .69 of what it was."""
    spec = quant_spec(QuantConfig())
    weight_FD = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    codes = ternarize(weight_FD, spec)
    again = ternarize(dequantized(codes), spec)
    assert torch.equal(again.codes_FD, codes.codes_FD)
    share = float((codes.codes_FD != 0).float().mean())
    assert float(again.scale / codes.scale) == pytest.approx(share, rel=1e-6)
    assert share == pytest.approx(0.69, abs=0.005)


def test_latents_that_cannot_be() -> None:
    """A scale that is not the median of any such weights; and a scale for each group."""
    spec = quant_spec(QuantConfig(preset="absmedian"))
    codes = torch.tensor([[1, 0, 0, 0], [0, 0, 0, -1]], dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"layer 7: no weights were found of which absmedian"):
        latents_of_codes(Ternary(codes, torch.tensor(0.3)), spec, torch.float32, "layer 7")
    spec = quant_spec(QuantConfig(preset="group64"))
    grouped = quantize(torch.randn(4, 128), spec.weight)
    with pytest.raises(CheckpointError, match=r"a scale per group"):
        latents_of_codes(Ternary(*grouped), spec, torch.float32, "w")


def test_packed_to_checkpoint_to_packed(ternary: Path, tmp_path: Path) -> None:
    """Every byte of the tensors, in the run's bf16."""
    first = export(open_source(ternary), tmp_path / "packed", "packed")
    back = write_checkpoint(open_source(tmp_path / "packed"), tmp_path / "back", {})
    again = export(open_source(back), tmp_path / "again", "packed")
    assert again["codes_sha256"] == first["codes_sha256"]
    one, other = (load_file(tmp_path / k / "model.safetensors") for k in ("packed", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_dtypes_between(sixteen_bit: Path, tmp_path: Path) -> None:
    """fp32 holds the masters, bf16 what the run computed with; bf16 -> fp32 -> bf16 is exact."""
    source = open_source(sixteen_bit)
    name, theirs = "layers.0.attn.q.weight", "model.layers.0.self_attn.q_proj.weight"
    for dtype, torch_dtype in DTYPES.items():
        out = tmp_path / dtype
        export(source, out, "hf", ExportOptions(dtype=dtype))  # type: ignore[arg-type]
        stored = load_file(out / "model.safetensors")[theirs]
        assert torch.equal(stored, source.latent(name).to(torch_dtype))
    export(open_source(tmp_path / "bf16"), tmp_path / "up", "hf", ExportOptions(dtype="fp32"))
    export(open_source(tmp_path / "up"), tmp_path / "down", "hf", ExportOptions(dtype="bf16"))
    one, other = (load_file(tmp_path / k / "model.safetensors") for k in ("bf16", "down"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- the baseline without training ---


@pytest.mark.parametrize("preset", ["b158", "absmedian", "twn", "group64", "int4", "paretoq"])
def test_round_to_nearest(preset: str, sixteen_bit: Path, tmp_path: Path) -> None:
    source = open_source(sixteen_bit)
    quant = QuantConfig.model_validate({"preset": preset})
    if preset == "group64":  # the tiny model is narrower
        quant = quant.model_copy(update={"group_size": 32})
    content = export(source, tmp_path / "out", "hf-dequantized", ExportOptions(dtype="fp32"), quant)
    assert content["post_training_quantization"] is True
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight_FD = source.weight("layers.1.mlp.up.weight").float()
    found = stored["model.layers.1.mlp.up_proj.weight"]
    if preset == "b158":
        scale = weight_FD.abs().mean()
        expected = (weight_FD / scale).round().clamp(-1, 1) * scale
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    error = float((found - weight_FD).square().mean() / weight_FD.square().mean())
    assert error < (0.05 if preset == "int4" else 0.6)
    levels = found.abs().unique().numel()
    assert levels > 3 if preset in ("group64", "int4", "paretoq") else levels == 2
    if preset == "b158":
        packed = export(source, tmp_path / "packed", "packed", quantize=quant)
        assert packed["codes_sha256"] == content["codes_sha256"]
        certificate = read_certificate(tmp_path / "packed")
        assert certificate is not None
        assert certificate["post_training_quantization"] is True


def test_quantizing_twice_is_refused(ternary: Path, sixteen_bit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is quantized already \(λ = 1\), and quantizing"):
        export(open_source(ternary), tmp_path / "out", "packed", quantize=QuantConfig())
    # Weights that are codes already are recognized without a certificate too.
    export(open_source(ternary), tmp_path / "plain", "hf-dequantized")
    (tmp_path / "plain" / "bitscale.json").unlink()
    source = open_source(tmp_path / "plain")
    assert source.form == "llama, dequantized codes"
    with pytest.raises(CheckpointError, match=r"is quantized already"):
        export(source, tmp_path / "out", "packed", quantize=QuantConfig())
    assert not (tmp_path / "out").exists()


# --- certificates and verify ---


def test_same_digest_in_every_format(ternary: Path, tmp_path: Path) -> None:
    source = open_source(ternary)
    digests = set()
    for target, linear, dtype in (
        ("packed", None, None),
        ("hf-dequantized", None, "bf16"),
        ("hf-bitnet", "bitlinear", "bf16"),
        ("hf-bitnet", "autobitlinear", "bf16"),
        ("hf-bitnet", "autobitlinear", "fp32"),
        ("hf-bitnet", "online", "fp32"),  # latents of the run's bf16: of its masters codes differ
    ):
        out = tmp_path / f"{target}-{linear}-{dtype}"
        options = ExportOptions(linear=linear, dtype=dtype)  # type: ignore[arg-type]
        content = export(source, out, target, options)
        digests |= {content["codes_sha256"]} - {None}
        assert read_certificate(out) == json.loads(json.dumps(content))
        assert content["source"]["step"] == 0
        assert content["quantizer"]["weight"]["measure"] == "absmean"
        checks = verify(source, open_source(out), num_tokens=128)
        assert all(check.passed for check in checks), checks
        assert "codes" in [check.name for check in checks]
    assert len(digests) == 1


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a model in place."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.0.self_attn.v_proj.weight"


def other_code(tensors: dict[str, Any]) -> None:
    tensors[NAME][0, 0] ^= 1 if int(tensors[NAME][0, 0]) & 3 != 2 else 2


def smaller_scale(tensors: dict[str, Any]) -> None:
    tensors[f"{NAME}_scale"] *= 0.997


@pytest.mark.parametrize(
    ("change", "keeps_certificate", "failed"),
    [
        (other_code, True, {"certificate of", "codes"}),
        (other_code, False, {"codes"}),
        (smaller_scale, False, set()),  # within bf16's rounding, which a scale may have had
    ],
)
def test_verify_sees_one_code_in_a_model(
    change: Callable[[dict[str, Any]], None],
    keeps_certificate: bool,
    failed: set[str],
    ternary: Path,
    tmp_path: Path,
) -> None:
    export(open_source(ternary), tmp_path / "b", "hf-bitnet", ExportOptions(linear="autobitlinear"))
    edit(tmp_path / "b", change)
    if not keeps_certificate:
        (tmp_path / "b" / "bitscale.json").unlink()
    checks = verify(open_source(ternary), open_source(tmp_path / "b"), num_tokens=64)
    found = {check.name.removesuffix(f" {tmp_path / 'b'}") for check in checks if not check.passed}
    assert found - {"logits"} == failed, checks


def test_verify_command(
    ternary: Path, sixteen_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(open_source(ternary), tmp_path / "b", "hf-dequantized")
    result = tmp_path / "verdict.json"
    options = ["--tokens", "100", "--json", str(result)]
    assert main(["verify", str(ternary), str(tmp_path / "b"), *options]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'b'} is the model of {ternary}" in out
    assert "codes: 0 of 18,432 differ" in out
    assert "A in bitscale at λ 1/0, B in transformers" in out
    assert "as trained: (no verdict) A at its own λ 1/1" in out
    assert json.loads(result.read_text())["same"] is True
    assert main(["verify", str(ternary), str(sixteen_bit), *options]) == 1
    assert f"{sixteen_bit} is NOT the model of {ternary}" in capsys.readouterr().out
    assert main(["verify", str(ternary), str(tmp_path / "missing")]) == 2
    assert "missing: no checkpoint here" in capsys.readouterr().err


def test_verify_perplexity(
    make_config: MakeConfig, ternary: Path, tmp_path: Path, corpus: Path
) -> None:
    """On a text, by the tokenizer beside the model; the loss is that of the model, worked out by
    hand, and the same in both forms."""
    text = tmp_path / "text.txt"
    text.write_text("river tree moves " * 60, encoding="utf-8")
    source = open_source(ternary)
    with pytest.raises(CheckpointError, match=r"has a tokenizer; put its file beside"):
        verify(source, source, text=text)
    with pytest.raises(DataError, match=r"missing.txt: not readable as UTF-8 text"):
        verify(source, source, text=tmp_path / "missing.txt")

    checkpoint = make_checkpoint(make_config, tmp_path / "words", "model.vocab_size=300")
    shutil.copyfile(corpus / "tokenizer.model", checkpoint / "tokenizer.model")
    source = open_source(checkpoint)
    export(source, tmp_path / "packed", "packed")
    checks = verify(source, open_source(tmp_path / "packed"), text=text, num_tokens=100)
    found = {check.name: check for check in checks}["perplexity"]
    assert found.passed
    ids = torch.tensor(load_tokenizer(corpus / "tokenizer.model").encode(text.read_text())[:100])
    model = load_model(checkpoint).model.eval()
    with torch.no_grad():
        losses = [
            model(part[None, :-1], part[None, 1:], reduction="none") for part in ids.split(64)
        ]
    loss = float(torch.cat([part.flatten() for part in losses]).mean())
    assert found.values["loss_a"] == pytest.approx(loss, rel=1e-6)
    assert found.values["loss_b"] == pytest.approx(loss, rel=1e-6)


def test_wrong_weights_fail(ternary: Path, sixteen_bit: Path, tmp_path: Path) -> None:
    """16-bit forms are compared weight by weight, after rounding to the narrower dtype."""
    source = open_source(sixteen_bit)
    export(source, tmp_path / "hf", "hf")
    checks = {c.name: c for c in verify(source, open_source(tmp_path / "hf"), num_tokens=64)}
    assert checks["weights"].passed
    assert checks["logits"].passed

    def change(tensors: dict[str, Any]) -> None:
        tensors[NAME][3, 3] += 0.5

    edit(tmp_path / "hf", change)
    checks = {c.name: c for c in verify(source, open_source(tmp_path / "hf"), num_tokens=64)}
    assert not checks["weights"].passed
    assert "(layers.0.attn.v.weight)" in checks["weights"].figures
