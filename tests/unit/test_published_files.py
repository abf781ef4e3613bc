"""Models as publishers and other programs leave them: what is read of them, and by which rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitscale.cli.main import main
from bitscale.config import ModelConfig, QuantConfig
from bitscale.convert import gguf_export, open_source
from bitscale.convert.huggingface_in import huggingface_source
from bitscale.convert.huggingface_tokenizer import from_sentencepiece
from bitscale.convert.inspection import inspect
from bitscale.convert.model_source import parameter_shapes
from bitscale.convert.names import to_huggingface
from bitscale.convert.verify import verify
from bitscale.data.tokenizer import SentencePieceTokenizer
from bitscale.errors import CheckpointError, DataError
from bitscale.quant.pack import pack_2bit

pytestmark = pytest.mark.unit
MODEL = ModelConfig(
    vocab_size=48, num_layers=1, d_model=16, num_heads=2, d_ff=32, tie_embeddings=False
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}
WHOLE = "model.safetensors"


def published(directory: Path, **keys: object) -> dict[str, Tensor]:
    """A Llama in a directory with config.json; its tensors, which the caller writes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **keys}))
    torch.manual_seed(0)
    shapes = parameter_shapes(MODEL, QuantConfig())
    return {to_huggingface(name): 0.05 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_file(published(tmp_path / "llama"), tmp_path / "llama" / WHOLE)
    return tmp_path / "llama"


def index_of(directory: Path, tensors: dict[str, Tensor], file: str) -> None:
    index = {"weight_map": dict.fromkeys(tensors, file)}
    (directory / f"{WHOLE}.index.json").write_text(json.dumps(index))


def test_the_whole_file_comes_before_an_older_index(llama: Path) -> None:
    """As in transformers, whose save_pretrained leaves the index of a model in shards behind."""
    older = {name: tensor + 1.0 for name, tensor in published(llama).items()}
    index_of(llama, older, "model-00001-of-00001.safetensors")
    norm = published(llama)["model.norm.weight"]
    assert torch.equal(open_source(llama).latent("norm.weight"), norm)  # the shard has gone
    save_file(older, llama / "model-00001-of-00001.safetensors")
    assert torch.equal(open_source(llama).latent("norm.weight"), norm)
    (llama / WHOLE).unlink()
    assert torch.equal(open_source(llama).latent("norm.weight"), norm + 1.0)


def test_a_second_copy_is_not_counted(llama: Path) -> None:
    weights = inspect(llama).facts["weights"]
    save_file(published(llama), llama / "consolidated.safetensors")  # as Mistral's have it
    assert inspect(llama).facts["weights"] == weights


def test_what_lies_beside_a_pickled_model_is_not_read(tmp_path: Path) -> None:
    tensors = published(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    torch.save(Path, tmp_path / "training_args.bin")  # transformers' Trainer pickles an object
    assert inspect(tmp_path).facts["weights"] == sum(t.numel() for t in tensors.values())


def test_pickles_of_before_zip_files(tmp_path: Path) -> None:
    tensors = published(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert torch.equal(open_source(tmp_path).latent("norm.weight"), tensors["model.norm.weight"])
    file.write_bytes(b".")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not plain tensors"):
        open_source(tmp_path)


def test_eight_bit_floats_are_described(llama: Path) -> None:
    tensors = published(llama)
    small = {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in tensors.items()}
    save_file(small, llama / WHOLE)
    found = {tensor.name: tensor for tensor in inspect(llama).tensors}
    assert found["lm_head.weight"].stored == "F8_E4M3"
    assert found["lm_head.weight"].zeros is not None and found["lm_head.weight"].zeros < 0.1


@pytest.mark.parametrize("header", [b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_a_header_that_describes_no_tensors(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        inspect(file)


def test_scales_beyond_1_are_taken_when_the_convention_is_named(tmp_path: Path) -> None:
    quantization = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    tensors = published(tmp_path, model_type="bitnet", quantization_config=quantization)
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            tensors[name] = pack_2bit(weight.sign().to(torch.int8))
            tensors[f"{name}_scale"] = torch.tensor([0.5])
    block = "model.layers.0"
    tensors[f"{block}.self_attn.attn_sub_norm.weight"] = torch.ones(16)
    tensors[f"{block}.mlp.ffn_sub_norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / WHOLE)
    with pytest.raises(CheckpointError, match="import with --scales multiply if so, or --scales d"):
        huggingface_source(tmp_path).ternary("layers.0.attn.q.weight")
    scales = {"divide": 2.0, "multiply": 0.5}
    for convention, scale in scales.items():
        source = huggingface_source(tmp_path, scales=convention)  # type: ignore[arg-type]
        assert float(source.ternary("layers.0.attn.q.weight").scale) == scale


@pytest.mark.parametrize("tokens", [1, 0, -3])
def test_too_few_tokens_to_compare(tokens: int, llama: Path) -> None:
    source = open_source(llama)
    with pytest.raises(DataError, match=f"--tokens {tokens} are too few to compare"):
        verify(source, source, num_tokens=tokens)


def test_options_of_import_that_mean_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", str(llama), str(tmp_path / "out")]
    assert main([*command, "train.steps=3"]) == 2
    assert "'train.steps=3' changes a configuration, and none is given" in capsys.readouterr().err
    assert main([*command, "--seq-len", "0"]) == 2
    assert "--seq-len 0 is not positive" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- GGUF files of other programs ---


@pytest.fixture
def foreign(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """foreign(key=value): a file without our certificate, with these hyperparameters."""

    def make(change: dict[str, Any]) -> Path:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        own = gguf_export.hyperparameters

        def changed(*arguments: Any) -> dict[str, Any]:
            values = {**own(*arguments), **{f"llama.{key}": v for key, v in change.items()}}
            return {key: value for key, value in values.items() if value is not None}

        with monkeypatch.context() as patch:
            patch.setattr(gguf_export, "hyperparameters", changed)
            patch.setattr(gguf_export, "CERTIFICATE_KEY", "somebody.elses")
            gguf_export.export_gguf(open_source(llama), out, "f32", with_tokenizer=False)
        return out

    return make


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_linear_scaling_is_what_a_factor_means(key: str, foreign: Callable[..., Path]) -> None:
    """llama.cpp's default type; the second key is the older one."""
    scaling = open_source(foreign({key: 4.0})).model.rope_scaling
    assert scaling is not None and (scaling.type, scaling.factor) == ("linear", 4.0)
    none = {key: 4.0, "rope.scaling.type": "none"}
    assert open_source(foreign(none)).model.rope_scaling is None
    assert open_source(foreign({})).model.rope_scaling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.dimension_count": 4}, "rotates 4 of the 8 numbers of a head, and the decoder all"),
        ({"context_length": None}, "has no llama.context_length in its metadata"),
    ],
)
def test_foreign_files_that_are_refused(
    change: dict[str, Any], message: str, foreign: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source(foreign(change))


# --- Tokenizers ---


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_of_a_sentencepiece_model_stay_whole(kind: str, tmp_path: Path) -> None:
    import sentencepiece

    symbols = ["<sep>", "<|im_start|>"]
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the river moves under the tree, and 12 words <sep> go"] * 20),
            model_writer=file,
            model_type=kind,
            vocab_size=290,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=symbols,
            hard_vocab_limit=False,
            minloglevel=3,
        )
    ours = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    theirs = from_sentencepiece(ours)
    assert theirs is not None
    for text in ("the <sep> river<|im_start|>tree", "<sep><sep>", "plain words"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text
