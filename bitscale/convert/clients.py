"""Who computes a model's logits: bitscale's decoder, or the program that a format is made for.

Shapes: B batch, S sequence, V vocabulary.

A new format joins `bitscale verify` by a line in `CLIENTS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitscale.convert.gguf_file import is_gguf
from bitscale.convert.gguf_source import gguf_source
from bitscale.convert.huggingface_in import is_huggingface
from bitscale.convert.llama_cpp import has_llama_cpp, load_llama_cpp, simulated_logits
from bitscale.convert.loaded import DTYPES, LoadedModel, decoder_on_meta
from bitscale.convert.model_source import ModelSource, dequantized, refuse_unless_ternary
from bitscale.convert.packed import packed_layer
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

Logits = Callable[[Tensor], Tensor]  # token ids [B, S] -> fp32 [B, S, V]


class Client(NamedTuple):
    """A program that computes the models of a format."""

    name: str
    opens: Callable[[Path], bool]  # whether it is the client of this path
    load: Callable[[Path], Logits]
    # How bitscale computes a model to compare with; None: its decoder, `decoder_logits`.
    twin: Callable[[ModelSource, Strength], Logits] | None = None


class Computed(NamedTuple):
    """A model's logits, by whom, and what its twin makes of another model at some λ."""

    by: str
    logits: Logits
    twin: Callable[[ModelSource, Strength], Logits]


def client_logits(source: ModelSource) -> Computed:
    """What the client of `source`'s format computes; bitscale where there is none.

    Raises CheckpointError if the client is not installed or does not load the model.
    """
    for client in CLIENTS:
        if client.opens(source.path):
            return Computed(client.name, client.load(source.path), client.twin or decoder_logits)
    return Computed("bitscale", decoder_logits(source, source.computes), decoder_logits)


def decoder_logits(source: ModelSource, strength: Strength) -> Logits:
    """What bitscale's decoder computes at `strength`, in fp32 from the weights of the run's dtype.

    Raises CheckpointError if that needs latents and the source has none.
    """
    model = latent_decoder(source) if source.has_latents else codes_decoder(source, strength)
    if source.has_latents:
        set_strength(model, strength)

    @torch.no_grad()
    def logits(input_ids_BS: Tensor) -> Tensor:
        return model.logits(input_ids_BS)

    return logits


def load_from_source(source: ModelSource) -> LoadedModel:
    """The decoder as a reader of the source's form computes it, in the dtype of the run."""
    strength = source.computes
    model = latent_decoder(source) if source.has_latents else codes_decoder(source, strength)
    if source.has_latents:
        set_strength(model, strength)
    return LoadedModel(
        model.to(DTYPES[source.dtype]),
        strength,
        source.step,
        source.tokenizer_sha256,
        source.seq_len,
        source.reset_attention,
        source.corpora,
    )


def latent_decoder(source: ModelSource) -> Decoder:
    """The decoder with latent weights, in fp32: numbers of the run's dtype give the run's codes."""
    model = decoder_on_meta(source.model, source.quant)
    state = {name: source.weight(name).float() for name in source.shapes}
    return _filled(model, state, source)


def codes_decoder(source: ModelSource, strength: Strength) -> Decoder:
    """The decoder of codes and scales, in fp32, with activations quantized or not."""
    refuse_unless_ternary(source)
    if strength not in (TERNARY, Strength(1.0, 0.0)):
        raise CheckpointError(
            f"{source.path} holds codes, and what it is compared with computes at λ = "
            f"{strength.weight:g}; name the training checkpoint in its place"
        )
    model = decoder_on_meta(source.model, source.quant)
    for name, layer in list(bit_linears(model)):
        codes = source.ternary(f"{name}.weight")
        bias = source.finished_bias(name)
        bias = None if bias is None else bias.float()
        finished: nn.Module
        if strength == TERNARY:
            finished = packed_layer(codes, bias, layer.quant)
        else:
            finished = nn.Linear(1, 1, bias=bias is not None, device="meta")
            state = {"weight": dequantized(codes)} | ({} if bias is None else {"bias": bias})
            for part, value in state.items():
                setattr(finished, part, nn.Parameter(value, requires_grad=False))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, finished)
    finished_names = {n.removesuffix(".weight") for n in source.ternary_names}
    others = [n for n in source.shapes if n.rpartition(".")[0] not in finished_names]
    model = _filled(model, {n: source.weight(n).float() for n in others}, source)
    set_strength(model, SIXTEEN_BIT if strength != TERNARY else TERNARY)
    return model


def _filled(model: Decoder, state: dict[str, Tensor], source: ModelSource) -> Decoder:
    model.load_state_dict(state, strict=False, assign=True)
    if source.model.tie_embeddings:
        model.head.weight = model.embed.weight
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not empty, empty
    return model.eval()


def _load_transformers(path: Path) -> Logits:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(
            f"{path} is computed by transformers, which is not installed; pip install "
            "'bitscale[export]'"
        ) from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: transformers does not load it: {reason}") from error
    model.eval()
    # Version 5.23 leaves what is not quantized in the file's dtype, where AutoBitLinear is used.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()

    @torch.no_grad()
    def logits(input_ids_BS: Tensor) -> Tensor:
        # Its bitnet layers are compiled, which takes minutes on CPU.
        with torch.compiler.set_stance("force_eager"):
            computed: Tensor = model(input_ids_BS).logits
        return computed.float()

    return logits


def llama_cpp_twin(source: ModelSource, strength: Strength) -> Logits:
    """llama.cpp's own way of quantizing activations is where it has codes to multiply."""
    return simulated_logits(source) if strength == TERNARY else decoder_logits(source, strength)


def _simulated_file(path: Path) -> Logits:
    source = gguf_source(path)
    return llama_cpp_twin(source, source.computes)


CLIENTS = [
    Client("transformers", is_huggingface, _load_transformers),
    Client("llama.cpp", has_llama_cpp, load_llama_cpp, llama_cpp_twin),
    Client("bitscale simulating llama.cpp", is_gguf, _simulated_file, llama_cpp_twin),
]
