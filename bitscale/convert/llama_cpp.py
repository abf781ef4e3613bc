"""What llama.cpp computes from a GGUF file: llama.cpp itself, and bitscale's simulation of it.

Beside TQ1_0 and TQ2_0 weights llama.cpp quantizes activations to Q8_K: int8 codes with one scale
for each 256 inputs (training: one for a token). The simulation does the same, so that what is left
of a difference is rounding: a scale that is off by one part in a thousand shows.

Shapes: B batch, S sequence, T tokens, D inputs, F outputs, G groups of 256 inputs, V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bitscale.convert.gguf_file import is_gguf
from bitscale.convert.loaded import decoder_on_meta
from bitscale.convert.model_source import ModelSource
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.quant.gguf_blocks import BLOCK
from bitscale.quant.reference import Ternary
from bitscale.quant.schedule import SIXTEEN_BIT

Logits = Callable[[Tensor], Tensor]  # token ids [B, S] -> fp32 [B, S, V]


def has_llama_cpp(path: Path) -> bool:
    """Whether `path` is a GGUF file and the package llama-cpp-python is there to compute it."""
    return is_gguf(path) and importlib.util.find_spec("llama_cpp") is not None


def quantize_q8_k(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> integral values in [-127, 127], fp32 [T, G, 256], and scales [T, G, 1].

    ggml's quantize_row_q8_K: the element of the largest magnitude gets -127, whatever its sign.
    """
    x_TGE = x_TD.reshape(x_TD.shape[0], -1, BLOCK)
    first = x_TGE.abs().argmax(dim=-1, keepdim=True)
    peak_TG1 = x_TGE.gather(-1, first)
    inverse_TG1 = torch.where(peak_TG1 == 0, 0.0, -127.0 / peak_TG1)
    codes_TGE = torch.round(inverse_TG1 * x_TGE).clamp(max=127)
    return codes_TGE, torch.where(peak_TG1 == 0, 0.0, 1.0 / inverse_TG1)


class Q8KLinear(nn.Module):
    """A ternary layer whose input is quantized per 256 inputs."""

    def __init__(self, weight: Ternary, bias_F: Tensor | None) -> None:
        super().__init__()
        self.codes_FGE = weight.codes_FD.float().view(weight.codes_FD.shape[0], -1, BLOCK)
        self.scale, self.bias_F = weight.scale, bias_F

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1]).float()
        codes_TGE, d_TG1 = quantize_q8_k(x_TD)
        # Integers below 2^24: exact in fp32. The scales come after each group's sum, as in ggml.
        y_TF = torch.zeros(x_TD.shape[0], self.codes_FGE.shape[0])
        for group in range(codes_TGE.shape[1]):
            sums_TF = codes_TGE[:, group] @ self.codes_FGE[:, group].T
            y_TF += sums_TF * d_TG1[:, group]
        y_TF = y_TF * self.scale
        y_TF = y_TF if self.bias_F is None else y_TF + self.bias_F
        return y_TF.view(*x.shape[:-1], -1)


def simulated_logits(source: ModelSource) -> Logits:
    """The decoder as llama.cpp would compute the GGUF file of `source`, in fp32.

    `source` is a GGUF file, or the ternary model that one was made of.
    """
    model = decoder_on_meta(source.model, source.quant)
    finished = set()
    for name, _ in list(bit_linears(model)):
        weight, bias = source.ternary(f"{name}.weight"), source.finished_bias(name)
        bias = None if bias is None else bias.float()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Q8KLinear(weight, bias))
        finished.add(name)
    others = [name for name in source.shapes if name.rpartition(".")[0] not in finished]
    state = {name: source.weight(name).float() for name in others}
    model.load_state_dict(state, strict=False, assign=True)
    if source.model.tie_embeddings:
        model.head.weight = model.embed.weight
    set_strength(model, SIXTEEN_BIT)  # of the head: GGUF has no 8-bit one
    model.eval()

    @torch.no_grad()
    def logits(input_ids_BS: Tensor) -> Tensor:
        return model.logits(input_ids_BS)

    return logits


def load_llama_cpp(path: Path) -> Logits:
    """llama.cpp's logits, by llama-cpp-python: fp32 key/value cache, no flash attention.

    Raises CheckpointError if llama.cpp does not load the file.
    """
    import llama_cpp

    try:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=0,  # as the file says
            n_gpu_layers=0,
            logits_all=True,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: llama.cpp (llama-cpp-python {llama_cpp.__version__}) does not load it: "
            f"{error}; if it knows no .scale tensors, export with --gguf-scale fp16"
        ) from error

    def logits(input_ids_BS: Tensor) -> Tensor:
        rows = []
        for row in input_ids_BS:
            model.reset()
            model.eval(row.tolist())
            rows.append(torch.from_numpy(model.scores[: len(row)].copy()))
        return torch.stack(rows)

    return logits
