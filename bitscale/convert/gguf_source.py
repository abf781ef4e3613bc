"""A GGUF file as a model: of ours (its certificate is in the metadata), or of architecture llama,
qwen3 or bitnet from elsewhere, if its tensors are floating point, TQ1_0, TQ2_0 or I2_S.

Codes come out as they are stored, with scale = d, times the tensor's `.scale` if it has one;
nothing is quantized again. Of a floating-point file that our certificate says is ternary, the codes
are the signs and the scale is the largest weight.

Shapes: F outputs, D inputs of a linear layer.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from bitscale.config import ModelConfig, QuantConfig
from bitscale.config.schema import RopeScaling
from bitscale.convert.gguf_file import CERTIFICATE_KEY, GgufFile, GgufTensor, open_gguf
from bitscale.convert.gguf_layout import (
    ARCHITECTURES,
    ROPE_FACTORS,
    Architecture,
    permuted_rows,
    to_gguf,
)
from bitscale.convert.model_source import ModelSource, parameter_shapes, ternary_names
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import is_scale
from bitscale.quant.gguf_blocks import BlockType, unpack_blocks, unpack_i2_s
from bitscale.quant.reference import Ternary
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCKS: dict[str, BlockType] = {"TQ1_0": "tq1_0", "TQ2_0": "tq2_0"}
TERNARY_TYPES = (*_BLOCKS, "I2_S")
_NEEDED = (
    *("codes_sha256", "source", "dtype", "seq_len", "reset_attention", "corpora"),
    *("config_hash", "tokenizer_sha256", "versions", "recipe", "post_training_quantization"),
)


def gguf_source(path: Path) -> ModelSource:
    """The model of the file `path`. CheckpointError if it is damaged, or none that we compute."""
    file = open_gguf(path)
    architecture = architecture_of(file)
    content = certificate_of(file)
    m = ModelConfig(**content["model"]) if content else _model_config(file, architecture)
    quant = QuantConfig(**content["quant"]) if content else QuantConfig()
    names = ternary_names(m, quant)
    all_shapes = parameter_shapes(m, quant)
    shapes = {name: shape for name, shape in all_shapes.items() if not is_scale(name)}
    _check_tensors(file, shapes, m, architecture)
    biases = [f"{name[:-7]}.bias" for name in names if f"{to_gguf(name)[:-7]}.bias" in file.tensors]
    shapes |= {name: shapes[f"{name[:-5]}.weight"][:1] for name in biases}
    types = {file.tensors[to_gguf(name)].type.name for name in names}
    stores_codes = types <= set(TERNARY_TYPES)
    holds_codes = stores_codes or bool(content and content["codes_sha256"])
    computes = _computes(stores_codes, holds_codes)
    read = partial(_read, file, m, architecture)
    return ModelSource(
        path=path,
        kind="gguf",
        form="/".join(sorted(types)),
        model=m,
        quant=quant,
        dtype=content["dtype"] if content else "fp32",
        strength=Strength(**content["trained_at"]) if content else computes,
        step=content["source"]["step"] if content else 0,
        tokens=content["source"]["tokens"] if content else 0,
        seq_len=content["seq_len"] if content else _value(file, architecture, "context_length"),
        reset_attention=content["reset_attention"] if content else False,
        corpora=tuple(content["corpora"]) if content else (),
        config_hash=content["config_hash"] if content else "",
        tokenizer_sha256=content["tokenizer_sha256"] if content else "",
        tokenizer_file=None,
        eod_token=None,
        versions=content["versions"] if content else {},
        recipe=content["recipe"] if content else {},
        shapes=shapes,
        ternary_names=names,
        read=read,
        read_codes=partial(_read_codes, file, m, architecture) if holds_codes else None,
        biases_finished=True,
        read_as=computes,
        scale_rounding=_scale_rounding(file, types),
        post_training=bool(content and content["post_training_quantization"]),
    )


def architecture_of(file: GgufFile) -> Architecture:
    """CheckpointError if the decoder computes no such architecture."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path} is of the architecture {name!r}; {', '.join(ARCHITECTURES)} are read"
        )
    known: Architecture = name
    return known


def certificate_of(file: GgufFile) -> dict[str, Any] | None:
    """What `bitscale export` wrote into the file; None if something else wrote it."""
    text = file.metadata.get(CERTIFICATE_KEY)
    if text is None:
        return None
    try:
        content = json.loads(text)
        ModelConfig(**content["model"]), QuantConfig(**content["quant"])
        Strength(**content["trained_at"])
        missing = [key for key in _NEEDED if key not in content]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file.path}: its {CERTIFICATE_KEY} is damaged ({_one_line(error)}); export it again"
        ) from error
    if missing:
        raise CheckpointError(
            f"{file.path}: its {CERTIFICATE_KEY} lacks {', '.join(missing)}; export it again"
        )
    return dict(content)


def _computes(stores_codes: bool, holds_codes: bool) -> Strength:
    """What a reader computes: activations are quantized only where weights are stored as codes."""
    if stores_codes:
        return TERNARY
    return Strength(1.0, 0.0, 0.0) if holds_codes else SIXTEEN_BIT


def _model_config(file: GgufFile, architecture: Architecture) -> ModelConfig:
    """Of a foreign file, from its hyperparameters."""
    value = partial(_value, file, architecture)
    scaling = value("rope.scaling.type", "linear")  # llama.cpp's default, with a factor of 1
    if scaling not in ("none", "linear") or ROPE_FACTORS in file.tensors:
        raise CheckpointError(
            f"{file.path} stretches its rotary frequencies ({scaling}); from foreign GGUF files "
            "only plain and linearly scaled ones are read: import the Hugging Face directory"
        )
    factor = value("rope.scaling.factor", value("rope.scale_linear", 1.0))  # its older name
    linear = scaling == "linear" and factor != 1.0
    embedding = file.tensors.get("token_embd.weight")
    heads = value("attention.head_count")
    try:
        m = ModelConfig(
            vocab_size=embedding.shape[0] if embedding else None,
            num_layers=value("block_count"),
            d_model=value("embedding_length"),
            num_heads=heads,
            num_kv_heads=value("attention.head_count_kv", heads),
            d_ff=value("feed_forward_length"),
            norm_eps=value("attention.layer_norm_rms_epsilon"),
            rope_theta=value("rope.freq_base", 10000.0),
            rope_scaling=RopeScaling(type="linear", factor=factor) if linear else None,
            sub_norm=architecture == "bitnet",
            qk_norm=architecture == "qwen3",
            tie_embeddings="output.weight" not in file.tensors,
            bias=_biases(file),
        )
    except ValidationError as error:
        raise CheckpointError(f"{file.path}: {_one_line(error)}") from error
    head_width = m.d_model // m.num_heads
    rotated = value("rope.dimension_count", head_width)
    if rotated != head_width:
        raise CheckpointError(
            f"{file.path} rotates {rotated} of the {head_width} numbers of a head, and the decoder "
            "all of them; import another model"
        )
    return m


def _value(file: GgufFile, architecture: Architecture, key: str, default: Any = None) -> Any:
    """A hyperparameter. CheckpointError if it is missing and has no default."""
    found = file.metadata.get(f"{architecture}.{key}", default)
    if found is None:
        raise CheckpointError(
            f"{file.path} has no {architecture}.{key} in its metadata; convert the model again "
            "with a current llama.cpp"
        )
    # Stored as fp32: 1e-5 is meant, not 9.99999974e-06.
    return float(str(np.float32(found))) if isinstance(found, float) else found


def _scale_rounding(file: GgufFile, types: set[str]) -> float:
    """Largest relative error of the scales: fp16 or bf16 unless something carries the rest."""
    exact = "blk.0.attn_q.scale" in file.tensors or types <= {"I2_S", "F32"}
    return 2.0**-22 if exact else 2.0**-8 if "BF16" in types else 2.0**-11


def _biases(file: GgufFile) -> bool | Literal["attention", "qkv"]:
    if "blk.0.ffn_down.bias" in file.tensors:
        return True
    if "blk.0.attn_output.bias" in file.tensors:
        return "attention"
    return "qkv" if "blk.0.attn_q.bias" in file.tensors else False


def _check_tensors(
    file: GgufFile, shapes: dict[str, tuple[int, ...]], m: ModelConfig, architecture: Architecture
) -> None:
    """Names and shapes against the decoder's parameters."""
    wanted = {to_gguf(name): shape for name, shape in shapes.items()}
    missing = sorted(set(wanted) - set(file.tensors))
    if missing:
        raise CheckpointError(
            f"{file.path}: {len(missing)} tensors are missing: {', '.join(missing[:5])}"
        )
    for name, shape in wanted.items():
        if file.tensors[name].shape != shape:
            raise CheckpointError(
                f"{file.path}: {name} is {list(file.tensors[name].shape)}, not {list(shape)} as "
                "its metadata says"
            )
    unexpected = [name for name in file.tensors if name not in wanted and not _is_extra(name, m)]
    if unexpected:
        raise CheckpointError(
            f"{file.path}: {len(unexpected)} tensors that {architecture} as we compute it has no "
            f"use for: {', '.join(sorted(unexpected)[:5])}"
        )


def _is_extra(name: str, m: ModelConfig) -> bool:
    """Tensors that are not parameters of ours, and understood all the same."""
    module, _, kind = name.rpartition(".")
    if name == ROPE_FACTORS or kind in ("scale", "bias"):
        return True
    return not m.norm_affine and (module == "output_norm" or module.endswith("_norm"))


def _read(file: GgufFile, m: ModelConfig, architecture: Architecture, name: str) -> Tensor:
    """fp32 [logical shape]"""
    tensor = file.tensors[to_gguf(name)]
    dtype = _FLOATS.get(tensor.type.name)
    if dtype is None:
        raise CheckpointError(
            f"{file.path}: {tensor.name} is of the type {tensor.type.name}; {', '.join(_FLOATS)} "
            f"are read, and {', '.join(TERNARY_TYPES)} in the linear layers"
        )
    values = file.bytes_of(tensor).view(dtype).view(tensor.shape).float()
    scale = file.tensors.get(f"{tensor.name.removesuffix('.weight')}.scale")
    if scale is not None:
        values = values * _scale_tensor(file, scale)
    return _unpermuted(values, name, m, architecture)


def _read_codes(file: GgufFile, m: ModelConfig, architecture: Architecture, name: str) -> Ternary:
    tensor = file.tensors[to_gguf(name)]
    try:
        codes_FD, scale = codes_and_scale(file, tensor)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {tensor.name}: {error}") from error
    rest = file.tensors.get(f"{tensor.name.removesuffix('.weight')}.scale")
    if rest is not None:
        scale = scale * _scale_tensor(file, rest)
    return Ternary(_unpermuted(codes_FD, name, m, architecture), scale)


def codes_and_scale(
    file: GgufFile, tensor: GgufTensor, *, common: bool = True
) -> tuple[Tensor, Tensor]:
    """int8 [F, D] as stored, and the fp32 scalar scale; or, without `common`, one a block if they
    differ.

    ValueError for damaged blocks, and with `common` for scales that differ.
    """
    raw, shape = file.bytes_of(tensor), tensor.shape
    if tensor.type.name in _BLOCKS:
        codes_FD, d_FB = unpack_blocks(raw.view(shape[0], -1), _BLOCKS[tensor.type.name])
        scales = d_FB[d_FB != 0].float()
    elif tensor.type.name == "I2_S":
        rows, columns = shape
        tail = raw[rows * columns // 4 :]
        codes_FD = unpack_i2_s(raw[: rows * columns // 4], (rows, columns))
        scales = tail[:4].clone().view(torch.float32)
    else:
        values = raw.view(_FLOATS[tensor.type.name]).view(shape).float()
        codes_FD, scales = values.sign().to(torch.int8), values[values != 0].abs()
    if not common and scales.numel() and bool(scales.min() != scales.max()):
        return codes_FD, scales
    return codes_FD, _common_scale(scales)


def _common_scale(scales: Tensor) -> Tensor:
    """Scalar. ValueError if there are several: these weights were not trained as ternary."""
    if not scales.numel():
        return torch.tensor(0.0)
    low, high = scales.min(), scales.max()
    if float(low) != float(high) or not bool(torch.isfinite(high)):
        raise ValueError(
            f"its scales range from {float(low):g} to {float(high):g} within one matrix: it was "
            "quantized block by block after training, which the decoder does not compute"
        )
    return high


def _scale_tensor(file: GgufFile, tensor: GgufTensor) -> Tensor:
    if tensor.type.name != "F32" or tensor.num_bytes != 4:
        raise CheckpointError(f"{file.path}: {tensor.name} is not one F32 number")
    return file.bytes_of(tensor).clone().view(torch.float32).squeeze()


def _unpermuted(t: Tensor, name: str, m: ModelConfig, architecture: Architecture) -> Tensor:
    rows = permuted_rows(name, m, architecture)
    return t if rows is None else rows.from_gguf(t)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
