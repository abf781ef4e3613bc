"""Hugging Face directories: transformers computes what we trained, and we read what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitscale.config import Config
from bitscale.convert import load_model, open_source
from bitscale.convert.clients import decoder_logits
from bitscale.convert.formats import ExportOptions, export
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.data.tokenizer import load_tokenizer, train_tokenizer
from bitscale.quant.pack import unpack_2bit
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from tiny_models import MODELS, VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
FORMS = {
    "hf": ("hf", None),
    "dequantized": ("hf-dequantized", None),
    "bitlinear": ("hf-bitnet", "bitlinear"),
    "autobitlinear": ("hf-bitnet", "autobitlinear"),
    "online": ("hf-bitnet", "online"),
}
CLASSES = {
    "tied": "LlamaForCausalLM",
    "untied": "LlamaForCausalLM",
    "sub_norm": "BitNetForCausalLM",
    "qk_norm": "Qwen3ForCausalLM",
    "bias": "LlamaForCausalLM",
    "qkv_bias": "Qwen2ForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
IDS_BS = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoint_of(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """checkpoint_of(name): a decoder of tiny_models.MODELS, trained at λ = 1 for 30 steps."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        out = root / name
        return out if out.exists() else make_checkpoint(make_config, out, MODELS[name])

    return make


def transformers_model(path: Path) -> Any:
    """transformers' own model in fp32; it found every tensor and had none left."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):  # else minutes of compilation
        logits: Tensor = model(ids_BS).logits
    return logits


def our_greedy(logits: Callable[[Tensor], Tensor], prompt_BS: Tensor, num_tokens: int) -> Tensor:
    for _ in range(num_tokens):
        prompt_BS = torch.cat((prompt_BS, logits(prompt_BS)[:, -1:].argmax(-1)), dim=1)
    return prompt_BS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_trained_model(
    name: str, form: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Logits to fp32's rounding (or one activation code), and the same greedy tokens."""
    source, out = open_source(checkpoint_of(name)), tmp_path / "out"
    target, linear = FORMS[form]
    content = export(source, out, target, ExportOptions(linear=linear))  # type: ignore[arg-type]
    model = transformers_model(out)
    assert type(model).__name__ == CLASSES[name]
    ours = decoder_logits(source, Strength(**content["computes"]))
    expected, found = ours(IDS_BS), their_logits(model, IDS_BS)
    # Half of the trained model's activations are codes, of which a few may round the other way.
    bound = 1e-5 if form in ("hf", "dequantized") else 2e-2
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())
    prompt = IDS_BS[:, :8]
    with torch.compiler.set_stance("force_eager"):
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
    assert torch.equal(generated, our_greedy(ours, prompt, 12))
    # Another function altogether at another λ: the comparison above can fail.
    other = decoder_logits(source, TERNARY if form == "hf" else SIXTEEN_BIT)(IDS_BS)
    assert float((found - other).abs().max()) > 5 * bound * float(expected.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tied", "sub_norm", "bias"])
def test_round_trip(
    name: str, form: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """checkpoint -> Hugging Face -> checkpoint -> packed: codes and scales to the bit."""
    target, linear = FORMS[form]
    checkpoint = checkpoint_of(name)
    export(open_source(checkpoint), tmp_path / "hf", target, ExportOptions(linear=linear))  # type: ignore[arg-type]
    back = write_checkpoint(open_source(tmp_path / "hf"), tmp_path / "back", {})
    export(open_source(checkpoint), tmp_path / "mine", "packed")
    export(open_source(back), tmp_path / "theirs", "packed")
    mine, theirs = (load_file(tmp_path / k / "model.safetensors") for k in ("mine", "theirs"))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        if key.endswith("bias") and form == "autobitlinear":  # divided by the scale and multiplied
            torch.testing.assert_close(theirs[key], tensor, rtol=3e-7, atol=0)
        else:
            assert torch.equal(theirs[key], tensor), key


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
def test_packed_layout(linear: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Codes and both scale conventions, from the definition."""
    source = open_source(checkpoint_of("sub_norm"))
    content = export(source, tmp_path / "out", "hf-bitnet", ExportOptions(linear=linear))  # type: ignore[arg-type]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["linear_class"] == linear
    assert content["linear"] == linear
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weight_FD = source.latent("layers.1.mlp.down.weight")
    scale = weight_FD.abs().double().mean().float()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(unpack_2bit(tensors[name]), (weight_FD / scale).round().clamp(-1, 1).char())
    stored = tensors[f"{name}_scale"]
    assert stored.shape == (1,)
    assert float(stored) == pytest.approx(
        1 / float(scale) if linear == "bitlinear" else float(scale), rel=1e-6
    )
    assert content["scales"]["layers.1.mlp.down.weight"] == float(scale)


def random_model(family: str, **overrides: Any) -> Any:
    """A random model of transformers' own class and configuration."""
    import transformers

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "olmo": "Olmo", "olmo2": "Olmo2"}.get(family)
    name = name or {"bitnet": "BitNet"}.get(family, family.capitalize())
    config = getattr(transformers, f"{name}Config")(**{**sizes, **overrides})
    torch.manual_seed(3)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-6}),
    "llama3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "bitnet": ("bitnet", {}),
}


@pytest.mark.parametrize("case", RANDOM)
def test_import_of_random_models(case: str, tmp_path: Path) -> None:
    """Same logits from our decoder; exported again, the same tensors to the bit."""
    family, overrides = RANDOM[case]
    model = random_model(family, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", ".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)  # not the initial 1 and 0
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = write_checkpoint(open_source(tmp_path / "theirs"), tmp_path / "ours", {})
    loaded = load_model(checkpoint)
    assert (loaded.step, loaded.strength) == (0, SIXTEEN_BIT)
    with torch.no_grad():
        expected, found = their_logits(model, IDS_BS), loaded.model.eval().logits(IDS_BS)
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    export(open_source(checkpoint), tmp_path / "again", "hf")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in theirs.items())
    assert torch.equal(their_logits(transformers_model(tmp_path / "again"), IDS_BS), expected)


def test_sharded_and_pickled_files(tmp_path: Path) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    config = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "pickled" / "config.json").write_text(config)
    whole = open_source(tmp_path / "whole")
    for form in ("sharded", "pickled"):
        source = open_source(tmp_path / form)
        assert source.shapes == whole.shapes
        for name in source.shapes:
            assert torch.equal(source.latent(name), whole.latent(name)), (form, name)


def test_our_shards_load(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Several files with an index, as exports beyond 5 GB have them."""
    from bitscale.convert.tensor_file import INDEX_NAME, TensorSpec, write_sharded

    export(open_source(checkpoint_of("tied")), tmp_path / "out", "hf")
    whole = tmp_path / "out" / "model.safetensors"
    tensors = load_file(whole)
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    before = their_logits(transformers_model(tmp_path / "out"), IDS_BS)
    whole.unlink()
    names = write_sharded(tmp_path / "out", specs, iter(tensors.items()), max_shard_bytes=20_000)
    assert len(names) > 2
    assert (tmp_path / "out" / INDEX_NAME).is_file()
    assert torch.equal(their_logits(transformers_model(tmp_path / "out"), IDS_BS), before)
    assert open_source(tmp_path / "out").latent("norm.weight").shape == (32,)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_auto_tokenizer_gives_the_ids_of_training(
    kind: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    from transformers import AutoTokenizer

    texts = ["The river moves under the bright tree, and 12 slow words.\n", "  never  always\t!"]
    train_tokenizer(texts * 20, tmp_path / "tokenizer.model", kind, 285)  # type: ignore[arg-type]
    source = replace(
        open_source(checkpoint_of("tied")), tokenizer_file=tmp_path / "tokenizer.model"
    )
    export(source, tmp_path / "out", "hf")
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*texts, "unseen: naïve 日本 🙂 \r\n  x", "", " a", "a "]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (ours.eos_id, ours.bos_id)


def test_llama2c(tmp_path: Path) -> None:
    """A random Llama, written as llama2.c does (rows of q and k for neighbouring pairs)."""
    for tied in (True, False):
        model = random_model("llama", rms_norm_eps=1e-5, tie_word_embeddings=tied)
        state = model.state_dict()

        def neighbours(w_FD: Tensor, heads: int) -> Tensor:
            return w_FD.view(heads, 2, 4, 32).transpose(1, 2).reshape(w_FD.shape)

        blocks = [f"model.layers.{i}." for i in range(2)]
        order = [
            state["model.embed_tokens.weight"],
            *(state[b + "input_layernorm.weight"] for b in blocks),
            *(neighbours(state[b + "self_attn.q_proj.weight"], 4) for b in blocks),
            *(neighbours(state[b + "self_attn.k_proj.weight"], 2) for b in blocks),
            *(state[b + "self_attn.v_proj.weight"] for b in blocks),
            *(state[b + "self_attn.o_proj.weight"] for b in blocks),
            *(state[b + "post_attention_layernorm.weight"] for b in blocks),
            *(state[b + "mlp.gate_proj.weight"] for b in blocks),
            *(state[b + "mlp.down_proj.weight"] for b in blocks),
            *(state[b + "mlp.up_proj.weight"] for b in blocks),
            state["model.norm.weight"],
            torch.full((64 * 8,), float("nan")),  # cosines and sines, not to be used
            *([] if tied else [state["lm_head.weight"]]),
        ]
        header = torch.tensor([32, 48, 2, 4, 2, VOCAB_SIZE * (1 if tied else -1), 64]).int()
        path = tmp_path / f"{tied}.bin"
        numbers = torch.cat([tensor.flatten().float() for tensor in order])
        path.write_bytes(header.numpy().tobytes() + numbers.numpy().tobytes())
        checkpoint = write_checkpoint(open_source(path), tmp_path / str(tied), {})
        loaded = load_model(checkpoint)
        assert loaded.seq_len == 64
        with torch.no_grad():
            expected, found = their_logits(model, IDS_BS), loaded.model.eval().logits(IDS_BS)
        assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
