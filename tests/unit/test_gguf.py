"""GGUF files: what other readers find in them, what comes back, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import load_model, open_source
from bitscale.convert.certificate import codes_digest
from bitscale.convert.clients import decoder_logits
from bitscale.convert.gguf_export import Encoding, export_gguf
from bitscale.convert.gguf_file import open_gguf
from bitscale.convert.gguf_layout import from_gguf, split_scale, to_gguf
from bitscale.convert.gguf_source import gguf_source
from bitscale.convert.llama_cpp import quantize_q8_k, simulated_logits
from bitscale.convert.model_source import ModelSource
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.convert.verify import verify
from bitscale.errors import CheckpointError
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from tiny_models import VOCAB_SIZE, make_source

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
# Blocks of GGUF take 256 columns.
WIDE = "model={d_model: 256, num_heads: 4, num_kv_heads: 2, d_ff: 256, num_layers: 1}"
MODELS = {
    "llama": ["model.tie_embeddings=true"],
    "untied": ["model.tie_embeddings=false"],
    "bitnet": ["model.sub_norm=true"],
    "qwen3": ["model.qk_norm=true", "model.bias=qkv"],
    "bias": ["model.bias=true", "model.rope_scaling={type: llama3, factor: 8.0}"],
    "plain_norm": ["model.norm_affine=false"],
}
ENCODINGS: list[Encoding] = ["tq1_0", "tq2_0", "i2_s", "f32", "f16", "bf16"]
IDS_BS = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def source_of(make_config: MakeConfig) -> Callable[..., ModelSource]:
    """source_of(name): a decoder 256 wide, trained for 3 steps, fp32."""
    made: dict[tuple[str, Strength], ModelSource] = {}

    def make(name: str, strength: Strength = TERNARY) -> ModelSource:
        if (name, strength) not in made:
            cfg = make_config("data.seq_len=64", "train.dtype=fp32", WIDE, *MODELS[name])
            made[name, strength] = make_source(cfg, strength, num_steps=3)
        return made[name, strength]

    return make


def write(source: ModelSource, out: Path, encoding: Encoding, **options: object) -> ModelSource:
    export_gguf(source, out, encoding, with_tokenizer=False, **options)  # type: ignore[arg-type]
    return gguf_source(out)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("llama", encoding) for encoding in ENCODINGS]
    + [(name, encoding) for name in MODELS for encoding in ("tq1_0", "f32") if name != "llama"],
)
def test_what_is_written_comes_back(
    name: str, encoding: Encoding, source_of: Callable[..., ModelSource], tmp_path: Path
) -> None:
    """Every code, every scale, every other weight; and gguf-py reads the same numbers."""
    source = source_of(name)
    again = write(source, tmp_path / "a.gguf", encoding)
    assert codes_digest(again.ternary_names, again.ternary) == codes_digest(
        source.ternary_names, source.ternary
    )
    exact = encoding not in ("f16", "bf16")
    for parameter in source.shapes:
        if parameter in source.ternary_names:
            ours, theirs = source.ternary(parameter).scale, again.ternary(parameter).scale
            assert float(theirs) == (float(ours) if exact else pytest.approx(float(ours), rel=4e-3))
        elif exact:
            assert torch.equal(again.latent(parameter), source.latent(parameter)), parameter
    assert (again.model, again.strength) == (source.model, source.strength)
    if encoding != "i2_s":  # which gguf-py does not know
        _compare_with_gguf_py(again, tmp_path / "a.gguf")


def _compare_with_gguf_py(source: ModelSource, path: Path) -> None:
    theirs = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
    ours = open_gguf(path)
    assert list(theirs) == list(ours.tensors)
    for name in source.ternary_names:
        stored = theirs[to_gguf(name)]
        assert stored.shape == source.shapes[name]
        assert (np.sign(stored) == 0).mean() == (source.ternary(name).codes_FD == 0).float().mean()
        rest = theirs.get(to_gguf(name).replace(".weight", ".scale"), np.ones(1))
        assert np.abs(stored).max() * rest[0] == pytest.approx(
            float(source.ternary(name).scale), rel=1e-6
        )


@pytest.mark.parametrize("strength", [TERNARY, SIXTEEN_BIT])
@pytest.mark.parametrize("name", ["llama", "untied"])
def test_transformers_reads_it(
    name: str, strength: Strength, source_of: Callable[..., ModelSource], tmp_path: Path
) -> None:
    """q and k are permuted as llama expects: its logits are the decoder's.

    transformers knows no `.scale` tensors: it stops at them, and needs scales="fp16".
    """
    from transformers import AutoModelForCausalLM

    source = _with_tokenizer(source_of(name, strength), tmp_path)
    encodings: list[Encoding] = ["f32", "tq1_0"] if strength == TERNARY else ["f32"]
    for encoding in encodings:
        export_gguf(source, tmp_path / f"{encoding}.gguf", encoding, scales="fp16")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=f"{encoding}.gguf", dtype=torch.float32
        )
        with torch.no_grad():
            theirs = model(IDS_BS).logits
        computes = Strength(1.0, 0.0, 0.0) if strength == TERNARY else SIXTEEN_BIT
        ours = decoder_logits(gguf_source(tmp_path / f"{encoding}.gguf"), computes)(IDS_BS)
        assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


def _with_tokenizer(source: ModelSource, folder: Path) -> ModelSource:
    """`source` with a byte-level tokenizer of its size."""
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    names = ["</s>", *sorted(alphabet)][:VOCAB_SIZE]
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return replace(source, tokenizer_file=folder / "tokenizer.json")


def test_q8_k_against_its_definition() -> None:
    """llama.cpp's activations: -127 for the largest of 256, with its sign; half to even."""
    x_TD = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    x_TD[1, 256:] = 0.0
    codes_TGE, d_TG1 = quantize_q8_k(x_TD)
    for row, group in [(0, 0), (0, 1), (2, 1)]:
        x = x_TD[row, 256 * group : 256 * (group + 1)].double()
        peak = x[x.abs().argmax()]
        assert float(d_TG1[row, group]) == pytest.approx(float(peak) / -127, rel=1e-6)
        want = torch.round(x * (-127 / peak)).clamp(max=127)
        assert int((codes_TGE[row, group].double() != want).sum()) == 0
        assert float(codes_TGE[row, group][x.abs().argmax()]) == -127
    assert not codes_TGE[1, 1].any()
    assert not d_TG1[1, 1].any()


def test_the_simulation_is_near_the_trained_function(
    source_of: Callable[..., ModelSource], tmp_path: Path
) -> None:
    source = source_of("llama")
    trained = decoder_logits(source, TERNARY)(IDS_BS)
    file = write(source, tmp_path / "a.gguf", "tq2_0")
    simulated = simulated_logits(file)(IDS_BS)
    assert torch.equal(simulated, simulated_logits(source)(IDS_BS))
    assert 0.0 < float((simulated - trained).abs().max()) < 0.05 * float(trained.abs().max())


@pytest.mark.parametrize(
    "scale", [0.0173, 1.0, 1e-5, 3.1e-8, 1.99999, 0.0625001, 6.0975e-05, 60000.0]
)
def test_split_scale_is_exact(scale: float) -> None:
    d, rest = split_scale(scale)
    assert float(torch.tensor(d).half()) == d
    assert torch.tensor(d) * torch.tensor(rest) == torch.tensor(scale)
    if scale > 2**-14:
        assert abs(rest - 1) <= 2**-10


def test_scales_outside_fp16() -> None:
    for scale in (7e4, 1e-9, 0.0, float("inf")):
        with pytest.raises(CheckpointError, match="outside what GGUF's fp16 block scales reach"):
            split_scale(scale)


def test_scales_without_their_tensors(
    source_of: Callable[..., ModelSource], tmp_path: Path
) -> None:
    source = source_of("llama")
    again = write(source, tmp_path / "a.gguf", "tq2_0", scales="fp16")
    assert not [name for name in open_gguf(again.path).tensors if name.endswith(".scale")]
    name = "layers.0.attn.q.weight"
    assert float(again.ternary(name).scale) == float(source.ternary(name).scale.half())


def test_names_map_back(source_of: Callable[..., ModelSource]) -> None:
    for name in source_of("untied").shapes:
        assert from_gguf(to_gguf(name)) == name
    assert from_gguf("blk.0.ffn_gate_inp.weight") is None


def test_verify_and_load(
    source_of: Callable[..., ModelSource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: a checkpoint, its TQ2_0 file, the same codes; a flipped code is seen."""
    checkpoint = write_checkpoint(source_of("bitnet"), tmp_path / "checkpoint", {}, None)
    out, figures = tmp_path / "a.gguf", tmp_path / "a.json"
    command = ["export", str(checkpoint), str(out), "--format", "gguf-tq2_0"]
    assert main([*command, "--gguf-tokenizer", "none"]) == 0
    compare = ["verify", str(checkpoint), str(out), "--tokens", "64"]
    assert main([*compare, "--json", str(figures)]) == 0
    result = json.loads(figures.read_text())
    names = [check["name"] for check in result["checks"]]
    assert {"codes", "logits", "as trained"} <= set(names)
    assert f"certificate of {out}" in names
    assert load_model(out).strength == TERNARY
    tensor = open_gguf(out).tensors["blk.0.ffn_up.weight"]
    content = bytearray(out.read_bytes())
    content[tensor.offset] = (content[tensor.offset] & 0xFC) | (1 - content[tensor.offset] & 1)
    out.write_bytes(content)
    capsys.readouterr()
    assert main(compare) == 1
    assert "FAIL  codes: 1 of" in capsys.readouterr().out


def test_foreign_files(source_of: Callable[..., ModelSource], tmp_path: Path) -> None:
    """Without our certificate, the architecture comes from the metadata."""
    source = source_of("qwen3")
    write(source, tmp_path / "a.gguf", "tq2_0")
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(
        content.replace(b"bitscale.certificate", b"somebody.elses-data!")
    )
    foreign = open_source(tmp_path / "b.gguf")
    assert foreign.model.model_dump(exclude={"init_std", "norm_eps", "rope_theta"}) == (
        source.model.model_dump(exclude={"init_std", "norm_eps", "rope_theta"})
    )
    checks = verify(replace(source, path=tmp_path), foreign, num_tokens=64)
    assert [check.name for check in checks if not check.passed] == []


def test_every_matrix_is_finite(source_of: Callable[..., ModelSource], tmp_path: Path) -> None:
    source = source_of("llama")

    def poisoned(name: str) -> Tensor:
        value = source.read(name).clone()
        value.view(-1)[7] = torch.nan
        return value

    for encoding in ("tq2_0", "f32"):
        with pytest.raises(CheckpointError, match="holds NaN or infinity; use an earlier check"):
            write(replace(source, read=poisoned), tmp_path / "nan.gguf", encoding)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
