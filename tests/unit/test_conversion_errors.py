"""Bad inputs of export and import: what is said, that nothing is half-written, and exit code 2."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import open_source
from bitscale.convert.formats import ExportOptions, export
from bitscale.quant.schedule import SIXTEEN_BIT, Strength
from tiny_models import make_checkpoint

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
Capture = pytest.CaptureFixture[str]
Change = Callable[[Path], None]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def ternary(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(make_config, tmp_path_factory.mktemp("errors") / "checkpoint")


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line that the command says, with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def config(**keys: object) -> Change:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return change


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def run(directory: Path) -> None:
        file = directory / "model.safetensors"
        content = load_file(file)
        change(content)
        save_file(content, file, metadata={"format": "pt"})

    return run


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index(weight_map: dict[str, str]) -> Change:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "shard.safetensors")
        file = directory / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": weight_map}))

    return change


class Code:
    """What a pickle must not do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/bitscale-pickle-ran-code"),))


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code()}))


def to_nan(content: dict[str, Any]) -> None:
    content[NAME][2, 3] = float("nan")


def one_row_less(content: dict[str, Any]) -> None:
    content[NAME] = content[NAME][:-1].contiguous()


BAD_LATENTS: dict[str, tuple[Change, str]] = {
    "truncated": (truncated, "damaged or not a safetensors file (Error while deserializing"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "neither model.safetensors nor its index nor pytorch_model.bin; name the directory",
    ),
    "index names a lost file": (
        index({"a": "model-00001-of-00002.safetensors"}),
        "model-00001-of-00002.safetensors: missing, though model.safetensors.index.json lists it",
    ),
    "index names a lost tensor": (
        index({"model.layers.7.x": "shard.safetensors"}),
        "model.layers.7.x is not in it, though the index says so (1 such tensors); copy the model",
    ),
    "index leaves the directory": (
        index({"a": "../../etc/passwd"}),
        "damaged ('../../etc/passwd' is not a name in this directory); copy the model again",
    ),
    "NaN": (tensors(to_nan), "layers.1.mlp.up.weight holds NaN or infinity; use an earlier"),
    "missing": (
        tensors(lambda content: content.pop(NAME)),
        f"1 tensors missing: {NAME}; config.json is of another model, or the copy is incomplete",
    ),
    "unexpected": (
        tensors(lambda content: content.update({"model.extra.weight": torch.zeros(2)})),
        "1 tensors unexpected: model.extra.weight; config.json is of another model",
    ),
    "shape off by one": (
        tensors(one_row_less),
        f"{NAME} has shape [63, 32], and config.json makes it [64, 32]; the files are of",
    ),
    "integers": (
        tensors(lambda content: content.update({NAME: content[NAME].to(torch.int8)})),
        f"{NAME} is int8, not a 16- or 32-bit number; import the model as it was before",
    ),
    "tied head differs": (
        tensors(lambda content: content.update({"lm_head.weight": torch.ones(96, 32)})),
        "tie_word_embeddings=true, but lm_head.weight differs from the embedding; set it to false",
    ),
    "pickle with code": (
        pickled,
        "not plain tensors, and nothing else is unpickled because it could run code (",
    ),
    "architecture": (
        config(model_type="mixtral"),
        "config.json: model_type 'mixtral' is not one that bitscale reads (llama, mistral, ",
    ),
    "experts": (config(num_local_experts=8), "cannot compute num_local_experts=8 (a mixture of"),
    "activation": (config(hidden_act="gelu"), "the decoder cannot compute hidden_act='gelu';"),
    "window": (
        config(model_type="mistral", sliding_window=16),
        "sliding_window=16 is shorter than the 64 tokens of a sequence, and the decoder attends "
        "to all of them; import with --seq-len 16",
    ),
    "rope": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "the decoder cannot compute rope_type='yarn'",
    ),
    "partial rotary": (
        config(partial_rotary_factor=0.5),
        "the decoder cannot compute partial_rotary_factor=0.5",
    ),
    "head width": (config(head_dim=16), "cannot compute head_dim=16 x 4 heads != hidden_size=32"),
    "mlp bias": (config(mlp_bias=True), "cannot compute mlp_bias=true without attention_bias"),
    "missing key": (config(hidden_size=None), "config.json has no 'hidden_size'; complete it"),
    "no number": (
        config(rope_theta="large", rope_parameters=None),
        "config.json: could not convert string to float: 'large'; take the publisher's",
    ),
    "no size": (config(hidden_size=0), "hidden_size=0 is not a positive whole number; mend it"),
    "another quantizer": (
        config(quantization_config={"quant_method": "gptq"}),
        "quant_method='gptq' is not read, only bitnet is; import the model as it was before",
    ),
    "certificate": (
        lambda d: (d / "bitscale.json").write_text('{"format": "bitscale-certificate-9"}') and None,
        "bitscale.json: damaged (format 'bitscale-certificate-9', this version reads",
    ),
}


def inverted(content: dict[str, Any]) -> None:
    for name in content:
        if name.endswith("_scale"):
            content[name] = 1.0 / content[name]


def without_certificate(change: Change) -> Change:
    def run(directory: Path) -> None:
        (directory / "bitscale.json").unlink()
        change(directory)

    return run


def pattern_3(content: dict[str, Any]) -> None:
    content[NAME][0, 0] = 0b11


def negative(content: dict[str, Any]) -> None:
    content[f"{NAME}_scale"] *= -1


BAD_PACKED: dict[str, tuple[Change, str]] = {
    "inverted scales": (
        without_certificate(tensors(inverted)),
        "looks inverted for its linear_class; import with --scales divide if so, or --scales "
        "multiply",
    ),
    "scales of another export": (
        tensors(inverted),
        "the files are not of one export: use another copy",
    ),
    "pattern 3": (tensors(pattern_3), f"{NAME}: packed tensor holds the unused bit pattern 3"),
    "negative scale": (tensors(negative), "a scale is positive: use another copy"),
    "rms norm": (
        config(quantization_config={"quant_method": "bitnet", "use_rms_norm": True}),
        "use_rms_norm=true puts a norm before every linear layer, which the decoder does not",
    ),
    "not converted": (
        config(
            quantization_config={
                "quant_method": "bitnet",
                "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
            }
        ),
        "modules_to_not_convert names 'model.layers.0.mlp.up_proj'; the decoder quantizes every",
    ),
}


EXPORTED = {
    "hf": (ExportOptions(dtype="fp32"), BAD_LATENTS),
    "hf-bitnet": (ExportOptions(linear="autobitlinear"), BAD_PACKED),
}


@pytest.mark.parametrize(
    ("target", "case"), [(target, case) for target, (_, bad) in EXPORTED.items() for case in bad]
)
def test_bad_directories(
    target: str, case: str, ternary: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = tmp_path / "model"
    options, bad = EXPORTED[target]
    export(open_source(ternary), model, target, options)
    change, message = bad[case]
    change(model)
    error = refused(capsys, "import", model, tmp_path / "out")
    assert message in error, error
    assert list(tmp_path.iterdir()) == [model]
    assert not Path("/tmp/bitscale-pickle-ran-code").exists()


def test_scale_convention_can_be_named(ternary: Path, tmp_path: Path, capsys: Capture) -> None:
    """A model whose scales are the other way round is imported when the user says so."""
    export(open_source(ternary), tmp_path / "m", "hf-bitnet", ExportOptions(linear="bitlinear"))
    source = open_source(tmp_path / "m")
    expected = source.ternary("layers.1.mlp.up.weight")
    without_certificate(tensors(inverted))(tmp_path / "m")
    assert main(["import", str(tmp_path / "m"), str(tmp_path / "o"), "--scales", "multiply"]) == 0
    found = open_source(tmp_path / "o").ternary("layers.1.mlp.up.weight")
    assert torch.equal(found.codes_FD, expected.codes_FD)
    torch.testing.assert_close(found.scale, expected.scale, rtol=3e-7, atol=0)


EXPORTS: dict[str, tuple[str, list[str], str]] = {
    "no gate": (
        "model.mlp=relu2",
        ["--format", "hf-dequantized"],
        "no Hugging Face architecture has model.mlp='relu2' (a feed-forward without gate); "
        "--format packed holds any shape",
    ),
    "norm with weights": (
        "model.norm=layernorm",
        ["--format", "hf"],
        "no Hugging Face architecture has model.norm='layernorm' with weights",
    ),
    "two norms": (
        "model.sub_norm=true model.qk_norm=true",
        ["--format", "hf"],
        "has model.sub_norm=true together with model.qk_norm=True",
    ),
    "8-bit head": (
        "model.head_bits=8",
        ["--format", "hf-dequantized"],
        "model.head_bits=8: transformers computes the head in 16 bit; --format packed holds it",
    ),
    "rows": (
        "model.d_ff=66",
        ["--format", "hf-bitnet", "--linear", "bitlinear"],
        "has 66 rows; the 2-bit layout packs 4 rows a byte: choose model sizes",
    ),
    "group scales": (
        "quant.preset=group64 quant.group_size=32",
        ["--format", "hf-bitnet", "--linear", "bitlinear"],
        "trains with a scale per group, not one a matrix",
    ),
    "rotation": (
        "quant.preset=quest model.d_model=128 model.d_ff=128",
        ["--format", "hf-dequantized"],
        "quant.preset='quest' has a Hadamard rotation of inputs: a plain linear layer has no such",
    ),
    "weights only": (
        "quant.preset=weight_only",
        ["--format", "hf-bitnet", "--linear", "autobitlinear"],
        "has activations other than absmax to 127 with eps 1e-5: transformers' bitnet layers",
    ),
    "online median": (
        "quant.preset=absmedian",
        ["--format", "hf-bitnet", "--linear", "online"],
        "has a scale other than absmean, which online quantization takes",
    ),
    "online in bf16": (
        "train.dtype=fp32",
        ["--format", "hf-bitnet", "--linear", "online", "--dtype", "bf16"],
        "--dtype bf16 would round fp32 latents before they are quantized online, and flip codes",
    ),
    "no convention": (
        "train.dtype=fp32",
        ["--format", "hf-bitnet"],
        "--format hf-bitnet needs --linear: bitlinear divides by weight_scale, autobitlinear",
    ),
    "superfluous convention": (
        "train.dtype=fp32",
        ["--format", "packed", "--linear", "bitlinear"],
        "--linear bitlinear means nothing to --format packed, only to hf-bitnet; leave it out",
    ),
    "megatron: SubLN": (
        "model.sub_norm=true",
        ["--format", "megatron"],
        "megatron-core's GPTModel has no model.sub_norm=True; --format hf and gguf may hold it, "
        "and --format packed and compact hold any shape",
    ),
    "megatron: LayerNorm": (
        "model.norm=layernorm model.norm_affine=false",
        ["--format", "megatron"],
        "has no model.norm='layernorm' (its LayerNorm has a bias); --format hf may hold it",
    ),
    "megatron: norms after the blocks": (
        "model.post_norm=true model.qk_norm=width",
        ["--format", "megatron"],
        "megatron-core's GPTModel has no model.post_norm=true; --format hf may hold it",
    ),
    "megatron: biases of attention only": (
        "model.bias=attention",
        ["--format", "megatron"],
        "megatron-core's GPTModel has no model.bias='attention'; --format hf and gguf may hold it",
    ),
    "megatron: RoPE scaling": (
        "model.rope_scaling.type=linear model.rope_scaling.factor=2.0",
        ["--format", "megatron"],
        "GPTModel has no model.rope_scaling, whose frequencies are arguments of the program;",
    ),
    "unknown preset": (
        "train.dtype=fp32",
        ["--quantize", "b157"],
        "quantizer preset 'b157' is unknown; use one of b158",
    ),
    "quantized already": (
        "train.dtype=fp32",
        ["--quantize", "b158"],
        "is quantized already (λ = 1), and quantizing again would move its scales",
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_what_a_format_cannot_hold(
    case: str, make_config: MakeConfig, tmp_path: Path, capsys: Capture
) -> None:
    overrides, options, message = EXPORTS[case]
    checkpoint = make_checkpoint(make_config, tmp_path / "c", *overrides.split(), num_steps=1)
    error = refused(capsys, "export", checkpoint, tmp_path / "out", *options)
    assert message in error, error
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_models_that_are_not_ternary(
    make_config: MakeConfig, tmp_path: Path, capsys: Capture
) -> None:
    for strength in (SIXTEEN_BIT, Strength(0.5, 0.5)):
        name = f"λ{strength.weight:g}"
        path = make_checkpoint(make_config, tmp_path / name, strength=strength, num_steps=1)
        for options in (["--format", "hf-dequantized"], ["--format", "packed"]):
            error = refused(capsys, "export", path, tmp_path / "out", *options)
            assert (
                f"{path} is at λ = {strength.weight:g}, not 1: its weights are not ternary" in error
            )
    assert not (tmp_path / "out").exists()


def test_out_that_exists_and_disk_errors(ternary: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    for command in ("export", "import"):
        error = refused(capsys, command, ternary, tmp_path / "out")
        assert f"{tmp_path / 'out'} already exists; choose another name or remove it" in error
        error = refused(capsys, command, ternary, tmp_path / "file" / "out")
        assert f"{tmp_path / 'file' / 'out'}: not written: [Errno" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_codes_have_no_latents(ternary: Path, tmp_path: Path, capsys: Capture) -> None:
    packed = tmp_path / "packed"
    export(open_source(ternary), packed, "packed")
    error = refused(capsys, "export", packed, tmp_path / "out", "--format", "hf")
    assert "holds the codes of layers.0.attn.q.weight, not the 16-bit weights" in error
    options = ["--format", "hf-bitnet", "--linear", "online"]
    error = refused(capsys, "export", packed, tmp_path / "out", *options)
    assert "holds codes, and --linear online stores 16-bit latents; export from the" in error
    assert list(tmp_path.iterdir()) == [packed]


def test_import_for_another_configuration(
    ternary: Path, tiny_config_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    packed = tmp_path / "packed"
    export(open_source(ternary), packed, "packed")
    command = ("import", packed, tmp_path / "out", "--config", tiny_config_file)
    error = refused(capsys, *command, "model.d_ff=128")
    assert f"model.d_ff is 128 in the configuration and 64 in {packed}; set it to" in error
    error = refused(capsys, *command, "quant.preset=twn")
    assert (
        f"quant.preset is 'twn' in the configuration, and {packed} holds codes of 'b158'" in error
    )
    assert list(tmp_path.iterdir()) == [packed]


def test_finished_biases_and_superfluous_options(
    make_config: MakeConfig, tmp_path: Path, capsys: Capture
) -> None:
    options = ["quant.preset=tequila", "quant.granularity=matrix"]
    checkpoint = make_checkpoint(make_config, tmp_path / "c", *options, num_steps=1)
    packed = tmp_path / "packed"
    export(open_source(checkpoint), packed, "packed")
    error = refused(capsys, "import", packed, tmp_path / "out")
    assert "holds a bias made of weights whose code is 0, and not those weights" in error
    error = refused(capsys, "import", packed, tmp_path / "out", "--scales", "divide")
    assert f"--scales divide is for Hugging Face directories, and {packed} is none" in error
    assert not (tmp_path / "out").exists()


def test_llama2c_files(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "model.bin"
    header = torch.tensor([32, 64, 2, 4, 4, 96, 16]).int().numpy().tobytes()
    for content, message in (
        (header, "28 bytes, and its header makes it 95"),
        (header[:12], "its first 28 bytes are no llama2.c header"),
        (b"\x80\x02}q\x00." * 10, "its first 28 bytes are no llama2.c header"),
        (b"24ka" + (2).to_bytes(4, "little") + header, "version 2 of llama2.c's format, and"),
    ):
        path.write_bytes(content)
        assert message in refused(capsys, "import", path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
