"""A model as a directory that transformers loads: 16-bit latents, dequantized, or packed 2-bit.

Shapes: F outputs, D inputs of a linear layer.

Packed is transformers' `bitnet` quantization (layout: quant/pack.py), with either convention:

    bitlinear       y = Σ / (weight_scale · input_scale), so weight_scale = 1 / scale
    autobitlinear   y = (x̂ codesᵀ + bias) · weight_scale, so weight_scale = scale, and a bias is
                    stored divided by it
    online          no codes: 16- or 32-bit latents, which AutoBitLinear quantizes itself
"""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitscale.config import ModelConfig
from bitscale.config.presets import INT8_ROWS
from bitscale.convert import names
from bitscale.convert.certificate import CERTIFICATE_NAME, certificate, codes_digest, to_json
from bitscale.convert.huggingface_config import to_huggingface_config
from bitscale.convert.huggingface_tokenizer import write_tokenizer
from bitscale.convert.loaded import DTYPES
from bitscale.convert.model_source import ModelSource, dequantized, refuse_unless_ternary
from bitscale.convert.packed import refuse_rows, refuse_unpackable
from bitscale.convert.staging import new_directory, refuse_existing
from bitscale.convert.tensor_file import TensorSpec, write_sharded
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import is_scale
from bitscale.quant.pack import pack_2bit
from bitscale.quant.reference import Ternary
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

Linear = Literal["bitlinear", "autobitlinear", "online"]
Dtype = Literal["bf16", "fp32"]
_Read = Callable[[str], Tensor]
_Codes = Callable[[str], Ternary]


class _Entry(NamedTuple):
    """A tensor to be written, and how to make it when its turn comes."""

    spec: TensorSpec
    make: Callable[[], Tensor]


def export_latent(source: ModelSource, out: Path, dtype: Dtype | None = None) -> dict[str, Any]:
    """Write the latent weights, in `dtype` (default: the run's) to the new directory `out`.

    A reader computes them in 16 bit, whatever λ they were trained at. Returns the certificate.
    Raises CheckpointError for what transformers cannot hold and if `out` exists.
    """
    dtype = dtype or source.dtype
    read = partial(source.latent, dtype=DTYPES[dtype])
    make = partial(_latent_entries, source, read, dtype)
    entries = _entries(source, read, dtype, make)
    # Learned scales mean nothing to 16-bit weights.
    omitted = [name for name in source.shapes if is_scale(name)]
    return _write(source, out, entries, dtype, "hf", SIXTEEN_BIT, None, omitted=omitted)


def export_dequantized(
    source: ModelSource, out: Path, dtype: Dtype | None = None
) -> dict[str, Any]:
    """Write scale · code to the new directory `out`: weights as trained, activations in 16 bit."""
    dtype = dtype or source.dtype
    refuse_unless_ternary(source)
    _refuse_undequantizable(source)
    ternary = lru_cache(maxsize=1)(source.ternary)
    make = partial(_dequantized_entries, source, ternary, dtype)
    entries = _entries(source, source.weight, dtype, make)
    activation = 0.0 if source.spec.activation is not None else 1.0
    computes = Strength(1.0, activation)
    return _write(source, out, entries, dtype, "hf-dequantized", computes, ternary)


def export_bitnet(
    source: ModelSource, out: Path, linear: Linear, dtype: Dtype | None = None
) -> dict[str, Any]:
    """Write transformers' `bitnet` quantization with the convention `linear` to `out`."""
    dtype = dtype or source.dtype
    refuse_unless_ternary(source)
    _refuse_unlike_bitnet(source, linear, dtype)
    ternary = None if linear == "online" else lru_cache(maxsize=1)(source.ternary)
    if ternary is None:
        # Rounded to the run's dtype, from which its codes were made.
        make = partial(_latent_entries, source, source.weight, dtype)
    else:
        refuse_rows(source)
        make = partial(_packed_entries, source, ternary, dtype, linear)
    entries = _entries(source, source.weight, dtype, make)
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if linear == "bitlinear" else "autobitlinear",
        "quantization_mode": "online" if linear == "online" else "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    return _write(
        source,
        out,
        entries,
        dtype,
        "hf-bitnet",
        TERNARY,
        ternary,
        config={"quantization_config": quantization},
        linear=linear,
    )


def _write(
    source: ModelSource,
    out: Path,
    entries: list[_Entry],
    dtype: Dtype,
    target: str,
    computes: Strength,
    ternary: _Codes | None,
    config: dict[str, Any] | None = None,
    **details: object,
) -> dict[str, Any]:
    refuse_existing(out)
    m = source.model if computes == SIXTEEN_BIT else _with_bias(source)
    if m.head_bits == 8 and computes != SIXTEEN_BIT:
        raise CheckpointError(
            "model.head_bits=8: transformers computes the head in 16 bit; --format packed holds it"
        )
    tree = to_huggingface_config(m, dtype=dtype, seq_len=source.seq_len)
    digest, scales = (None, None) if ternary is None else _digest_and_scales(source, ternary)
    content = certificate(
        source, target, computes=computes, digest=digest, stored=dtype, scales=scales, **details
    )
    with new_directory(out) as staging:
        specs = [entry.spec for entry in entries]
        write_sharded(staging, specs, ((entry.spec.name, entry.make()) for entry in entries))
        tree |= {**write_tokenizer(source, staging), **(config or {}), "bitscale": _short(content)}
        (staging / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
        (staging / CERTIFICATE_NAME).write_text(to_json(content))
    return content


def _short(content: dict[str, Any]) -> dict[str, Any]:
    """What stays with config.json when the certificate beside it is lost."""
    keys = ("bitscale", "target", "source", "codes_sha256", "config_hash", "tokenizer_sha256")
    return {key: content[key] for key in keys}


def _entries(
    source: ModelSource, read: _Read, dtype: Dtype, linear_weight: Callable[[str], list[_Entry]]
) -> list[_Entry]:
    """Every tensor of the directory; those of a quantized layer from `linear_weight(name)`."""
    entries: list[_Entry] = []
    for name, shape in source.shapes.items():
        layer, _, parameter = name.rpartition(".")
        if name in source.ternary_names:
            entries += linear_weight(name)
        elif f"{layer}.weight" not in source.ternary_names:  # their biases come with them
            assert parameter == "weight", name
            entries.append(_entry(_theirs(source.model, name), dtype, shape, partial(read, name)))
    return entries + _missing_norms(source.model, dtype)


def _missing_norms(m: ModelConfig, dtype: Dtype) -> list[_Entry]:
    """Weights of 1 for an RMSNorm without any: no architecture but OLMo goes without."""
    if m.norm_affine or m.norm == "layernorm":
        return []
    blocks = [f"layers.{i}" for i in range(m.num_layers)]
    names = [f"{block}.{norm}_norm" for block in blocks for norm in ("attn", "mlp")] + ["norm"]
    make = partial(torch.ones, m.d_model)
    return [_entry(_theirs(m, f"{name}.weight"), dtype, (m.d_model,), make) for name in names]


def _theirs(m: ModelConfig, name: str) -> str:
    return names.to_huggingface(name, post_norm=m.post_norm)


def _entry(name: str, dtype: Dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> _Entry:
    """A floating-point tensor, rounded to `dtype`."""
    return _Entry(TensorSpec(name, DTYPES[dtype], shape), lambda: make().to(DTYPES[dtype]))


def _latent_entries(source: ModelSource, read: _Read, dtype: Dtype, name: str) -> list[_Entry]:
    make = partial(read, name)
    entries = [_entry(_theirs(source.model, name), dtype, source.shapes[name], make)]
    bias = f"{name.removesuffix('.weight')}.bias"
    if bias in source.shapes:
        make = partial(read, bias)
        entries.append(_entry(_theirs(source.model, bias), dtype, source.shapes[bias], make))
    return entries


def _dequantized_entries(
    source: ModelSource, ternary: _Codes, dtype: Dtype, name: str
) -> list[_Entry]:
    def weight() -> Tensor:
        return dequantized(ternary(name), DTYPES[dtype])

    entries = [_entry(_theirs(source.model, name), dtype, source.shapes[name], weight)]
    return entries + _bias_entries(source, ternary, dtype, name, None)


def _packed_entries(
    source: ModelSource, ternary: _Codes, dtype: Dtype, linear: Linear, name: str
) -> list[_Entry]:
    rows, columns = source.shapes[name]
    theirs = _theirs(source.model, name)

    def scale() -> Tensor:
        value = ternary(name).scale.reshape(1)
        return 1.0 / value if linear == "bitlinear" else value

    weight = TensorSpec(theirs, torch.uint8, (rows // 4, columns))
    return [
        _Entry(weight, lambda: pack_2bit(ternary(name).codes_FD)),
        _Entry(TensorSpec(f"{theirs}_scale", torch.float32, (1,)), scale),
        *_bias_entries(source, ternary, dtype, name, linear),
    ]


def _bias_entries(
    source: ModelSource, ternary: _Codes, dtype: Dtype, name: str, linear: Linear | None
) -> list[_Entry]:
    layer = name.removesuffix(".weight")
    if f"{layer}.bias" not in source.shapes and not source.spec.deadzone_bias:
        return []

    def bias() -> Tensor:
        value = source.finished_bias(layer)
        assert value is not None
        # AutoBitLinear multiplies the sum by its scale after it has added the bias.
        is_scaled = linear == "autobitlinear"
        return value.float() / ternary(name).scale if is_scaled else value

    theirs = _theirs(source.model, f"{layer}.bias")
    # Divided, it is no number of the run's dtype any more.
    kept: Dtype = "fp32" if linear == "autobitlinear" else dtype
    return [_entry(theirs, kept, source.shapes[name][:1], bias)]


def _with_bias(source: ModelSource) -> ModelConfig:
    """The finished model: what the quantizer adds as a bias needs an architecture that has one."""
    added = bool(source.spec.deadzone_bias)
    return source.model.model_copy(update={"bias": True}) if added else source.model


def _digest_and_scales(source: ModelSource, ternary: _Codes) -> tuple[str, dict[str, float] | None]:
    """`codes_digest`, and the exact scale of every matrix (an fp32 number is a JSON number); None
    if a matrix has several."""
    scales: dict[str, Tensor] = {}

    def recorded(name: str) -> Ternary:
        codes = ternary(name)
        scales[name] = codes.scale
        return codes

    digest = codes_digest(source.ternary_names, recorded)
    if source.spec.weight.granularity != "matrix":
        return digest, None
    return digest, {name: float(scale) for name, scale in scales.items()}


def _refuse_undequantizable(source: ModelSource) -> None:
    spec = source.spec
    reasons = {
        "a Hadamard rotation of inputs": spec.hadamard is not None,
        "a norm of inputs without weights": spec.norm != "none",
        "codes drawn anew at every step": spec.weight.rounding == "stochastic",
    }
    _refuse_quantizer(source, reasons, "a plain linear layer has no such thing")


def _refuse_unlike_bitnet(source: ModelSource, linear: Linear, dtype: Dtype) -> None:
    refuse_unpackable(source.quant)
    spec, activation = source.spec, source.spec.activation
    plain = activation is not None and (
        (activation.measure, activation.numerator, activation.code_max, activation.eps)
        == (INT8_ROWS.measure, INT8_ROWS.numerator, INT8_ROWS.code_max, INT8_ROWS.eps)
    )
    weight = spec.weight
    online = weight.measure == "absmean" and weight.eps == INT8_ROWS.eps
    reasons = {
        "activations other than absmax to 127 with eps 1e-5": not plain,
        "a Hadamard rotation of inputs": spec.hadamard is not None,
        "a norm of inputs without weights": spec.norm != "none",
        "a scale other than absmean, which online quantization takes": (
            linear == "online" and not online
        ),
        "a bias made of weights, which online quantization has not": (
            linear == "online" and spec.deadzone_bias > 0
        ),
    }
    _refuse_quantizer(source, reasons, "transformers' bitnet layers would compute another model")
    if linear == "online" and not source.has_latents:
        raise CheckpointError(
            f"{source.path} holds codes, and --linear online stores 16-bit latents; export from "
            "the training checkpoint, or use --linear autobitlinear"
        )
    if linear == "online" and dtype == "bf16" and source.dtype == "fp32":
        raise CheckpointError(
            "--dtype bf16 would round fp32 latents before they are quantized online, and flip "
            "codes; use --dtype fp32"
        )


def _refuse_quantizer(source: ModelSource, reasons: dict[str, bool], why: str) -> None:
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(
                f"quant.preset={source.quant.preset!r} has {reason}: {why}; --format packed holds "
                "it, or keep the checkpoint"
            )
