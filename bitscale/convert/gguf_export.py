"""A model as a GGUF file for llama.cpp (or, with I2_S, bitnet.cpp), written tensor by tensor.

Ternary weights are stored as the codes of the last training step, never quantized again. GGUF's
blocks carry their scale in fp16, which is off by up to 2^-12 of it; so by default every ternary
tensor gets what is missing as a one-element fp32 `.scale` tensor, by which llama.cpp multiplies the
layer's output (`exact`). Readers that know no such tensors get the fp16 scale; some refuse the
file: for them there is `fp16`, without these tensors.

llama.cpp quantizes activations to int8 per 256 inputs and not, as in training, per token: its
logits differ from ours by that (docs/conversion.md).

Shapes: F outputs, D inputs of a linear layer.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitscale.convert.certificate import certificate, codes_digest
from bitscale.convert.gguf_file import CERTIFICATE_KEY, TYPES
from bitscale.convert.gguf_layout import (
    ROPE_FACTORS,
    Architecture,
    choose_architecture,
    hyperparameters,
    permuted_rows,
    rope_factors,
    split_scale,
    to_gguf,
)
from bitscale.convert.gguf_tokenizer import Vocabulary, add_vocabulary, read_vocabulary
from bitscale.convert.model_source import ModelSource, refuse_unless_ternary
from bitscale.convert.packed import refuse_unpackable
from bitscale.convert.staging import new_path, refuse_existing
from bitscale.data.progress import ByteProgress
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import is_scale
from bitscale.quant.gguf_blocks import BLOCK, I2_S_LINE, pack_blocks, pack_i2_s
from bitscale.quant.reference import Ternary
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

Encoding = Literal["f32", "f16", "bf16", "tq1_0", "tq2_0", "i2_s"]
Scales = Literal["exact", "fp16"]
_FILE_TYPES: dict[Encoding, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "tq1_0": 36,
    "tq2_0": 37,
    "i2_s": 40,
}
_DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_COLUMNS = {"tq1_0": BLOCK, "tq2_0": BLOCK, "i2_s": I2_S_LINE}
_I2_S_TAIL = 32  # bytes after the codes: an fp32 scale, then nothing


class Plan(NamedTuple):
    """How the tensors of `source` are stored."""

    source: ModelSource
    architecture: Architecture
    encoding: Encoding  # of the ternary layers; a floating type holds code x scale, or latents
    dense: Literal["f32", "f16", "bf16"]  # embedding and head
    scales: Scales


class Stored(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding

    @property
    def num_bytes(self) -> int:
        kind = TYPES[self.encoding.upper()]
        size = math.prod(self.shape) // kind.block * kind.bytes
        return size + _I2_S_TAIL * (self.encoding == "i2_s")


def export_gguf(
    source: ModelSource,
    out: Path,
    encoding: Encoding,
    *,
    scales: Scales = "exact",
    dtype: Literal["bf16", "fp32"] | None = None,
    with_tokenizer: bool = True,
) -> dict[str, Any]:
    """Write `source` to the new file `out`; returns its certificate.

    `dtype`: of embedding and head beside ternary layers; default: that of the run.

    Raises CheckpointError if no GGUF architecture computes the model, a layer does not fit the
    blocks, a weight is not finite, the tokenizer is missing or unknown to llama.cpp, or `out`
    exists; nothing is left half-written.
    """
    plan = plan_gguf(source, encoding, scales, dtype)
    refuse_existing(out)
    vocabulary = _vocabulary(source) if with_tokenizer else None
    content = _certificate(plan)
    with new_path(out) as staging:
        _write(plan, staging, content, vocabulary)
    return content


def plan_gguf(
    source: ModelSource,
    encoding: Encoding,
    scales: Scales = "exact",
    dtype: Literal["bf16", "fp32"] | None = None,
) -> Plan:
    """Checks everything that shapes and configuration can tell; reads no tensor."""
    architecture = choose_architecture(source)
    is_dense = encoding in _DENSE
    if not is_dense or source.strength != SIXTEEN_BIT:
        refuse_unless_ternary(source)
        refuse_unpackable(source.quant, f"GGUF ({encoding})")
    if not is_dense:
        _refuse_columns(source, _COLUMNS[encoding], encoding)
    dense: Any = encoding if is_dense else {"bf16": "bf16", "fp32": "f32"}[dtype or source.dtype]
    return Plan(source, architecture, encoding, dense, "fp16" if encoding == "i2_s" else scales)


def _refuse_columns(source: ModelSource, columns: int, encoding: Encoding) -> None:
    bad = [name for name in sorted(source.ternary_names) if source.shapes[name][1] % columns]
    if bad:
        raise CheckpointError(
            f"{bad[0]} has {source.shapes[bad[0]][1]} columns and {encoding.upper()} stores blocks "
            f"of {columns} ({len(bad)} of {len(source.ternary_names)} layers do not divide); "
            "llama.cpp would fall back to another type: use gguf-bf16, packed or compact, or train "
            f"with model.d_model and model.d_ff that are multiples of {columns}"
        )


def _vocabulary(source: ModelSource) -> Vocabulary:
    path = source.tokenizer_file
    if path is None or not path.is_file():
        raise CheckpointError(
            f"{source.path}: the tokenizer is not where the run found it ({path or 'unknown'}); "
            "put the corpus back, or give --gguf-tokenizer none to write the file without one"
        )
    assert source.model.vocab_size is not None
    return read_vocabulary(path, source.model.vocab_size, source.eod_token)


def _certificate(plan: Plan) -> dict[str, Any]:
    source, codes = plan.source, plan.encoding not in _DENSE
    ternary = source.strength != SIXTEEN_BIT
    digest = codes_digest(source.ternary_names, source.ternary) if ternary else None
    computes = TERNARY if codes else Strength(1.0, 0.0, 0.0) if ternary else SIXTEEN_BIT
    details: dict[str, object] = {"gguf_scales": plan.scales} if codes else {}
    if plan.encoding == "i2_s":
        details["i2_s_platform"] = "x86"
    return certificate(source, f"gguf-{plan.encoding}", computes=computes, digest=digest, **details)


def _write(plan: Plan, path: Path, content: dict[str, Any], vocabulary: Vocabulary | None) -> None:
    writer = _gguf_writer(plan.architecture)
    _add_metadata(writer, plan, content, vocabulary)
    # Learned scales are in the codes; a model that is still 16 bit does not use them.
    names = [name for name in plan.source.shapes if not is_scale(name)]
    stored = [tensor for name in names for tensor in _stored(plan, name)] + _stored_extra(plan)
    for tensor in stored:
        kind = TYPES[tensor.encoding.upper()]
        # With a floating dtype the writer takes shape and type as they are given.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, kind.number
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        with ByteProgress(path.name, sum(tensor.num_bytes for tensor in stored)) as progress:
            for array in _arrays(plan, names):
                writer.write_tensor_data(array)
                progress.add(array.nbytes)
    finally:
        writer.close()


def _gguf_writer(architecture: Architecture) -> Any:
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise CheckpointError(
            "GGUF files are written with the package gguf, which is not installed; run "
            "`pip install 'gguf>=0.19'` (or bitscale[export])"
        ) from None
    return GGUFWriter(None, architecture)


def _add_metadata(
    writer: Any, plan: Plan, content: dict[str, Any], vocabulary: Vocabulary | None
) -> None:
    import json

    source = plan.source
    writer.add_name(f"bitscale step {source.step}")
    writer.add_file_type(_FILE_TYPES[plan.encoding])
    writer.add_quantization_version(2)
    values = hyperparameters(source.model, source.seq_len, plan.architecture)
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        add_vocabulary(writer, vocabulary)
    if plan.encoding == "i2_s":
        writer.add_string("bitscale.i2_s.platform", "x86")
    writer.add_string(CERTIFICATE_KEY, json.dumps(content))


def _stored(plan: Plan, name: str) -> list[Stored]:
    """What `_arrays` gives for our parameter `name`."""
    source, shape = plan.source, plan.source.shapes[name]
    if len(shape) == 1:
        if name.endswith(".bias") and f"{name[:-5]}.weight" in source.ternary_names:
            return []  # with its weight
        return [Stored(to_gguf(name), shape, "f32")]
    if name not in source.ternary_names:
        return [Stored(to_gguf(name), shape, plan.dense)]
    tensors = [Stored(to_gguf(name), shape, plan.encoding)]
    if plan.encoding in ("tq1_0", "tq2_0") and plan.scales == "exact":
        tensors.append(Stored(_beside(name, "scale"), (1,), "f32"))
    deadzone = source.spec.deadzone_bias and source.strength != SIXTEEN_BIT
    if f"{name[:-7]}.bias" in source.shapes or deadzone:
        tensors.append(Stored(_beside(name, "bias"), shape[:1], "f32"))
    return tensors


def _stored_extra(plan: Plan) -> list[Stored]:
    """Tensors that are no parameters of ours."""
    m = plan.source.model
    extra = [Stored(name, (m.d_model,), "f32") for name in _missing_norms(plan.source)]
    factors = rope_factors(m)
    return extra if factors is None else [*extra, Stored(ROPE_FACTORS, tuple(factors.shape), "f32")]


def _missing_norms(source: ModelSource) -> list[str]:
    """Norms without weights (model.norm_affine=false), which GGUF has none of."""
    if source.model.norm_affine:
        return []
    blocks = range(source.model.num_layers)
    names = [f"layers.{i}.{norm}.weight" for i in blocks for norm in ("attn_norm", "mlp_norm")]
    return [to_gguf(name) for name in [*names, "norm.weight"]]


def _arrays(plan: Plan, names: list[str]) -> Iterator[np.ndarray[Any, Any]]:
    source = plan.source
    for name in names:
        stored = _stored(plan, name)
        if not stored:
            continue
        if name in source.ternary_names and source.strength != SIXTEEN_BIT:
            tensors = _ternary_tensors(plan, name)
        else:
            tensors = _latent_tensors(plan, name, stored)
        for tensor, spec in zip(tensors, stored, strict=True):
            array = tensor.contiguous().view(torch.uint8).numpy()
            assert array.nbytes == spec.num_bytes, (spec, array.nbytes)
            yield array
    for _ in _missing_norms(source):
        yield np.ones(source.model.d_model, dtype=np.float32)
    factors = rope_factors(source.model)
    if factors is not None:
        yield factors.numpy()


def _latent_tensors(plan: Plan, name: str, stored: list[Stored]) -> list[Tensor]:
    """A parameter as it is, and the bias of its layer."""
    source = plan.source
    tensors = [_permuted(plan, name, source.weight(name))]
    if len(stored) == 2:
        bias = f"{name[:-7]}.bias"
        tensors.append(_permuted(plan, bias, source.weight(bias)))
    return [_cast(t, spec) for t, spec in zip(tensors, stored, strict=True)]


def _ternary_tensors(plan: Plan, name: str) -> list[Tensor]:
    codes_FD, scale = plan.source.ternary(name)
    if not math.isfinite(float(scale)):
        raise CheckpointError(
            f"{name} holds NaN or infinity (its scale is {float(scale)}); the run diverged: export "
            "an earlier checkpoint"
        )
    codes_FD = _permuted(plan, name, codes_FD)
    tensors = _encoded(plan, name, Ternary(codes_FD, scale))
    bias = plan.source.finished_bias(name.removesuffix(".weight"))
    if bias is not None:
        bias_name = f"{name.removesuffix('.weight')}.bias"
        spec = Stored(bias_name, tuple(bias.shape), "f32")
        tensors.append(_cast(_permuted(plan, bias_name, bias), spec))
    return tensors


def _encoded(plan: Plan, name: str, weight: Ternary) -> list[Tensor]:
    """The weight, and its `.scale` if there is one."""
    codes_FD, scale = weight
    match plan.encoding:
        case "tq1_0" | "tq2_0" as kind:
            if plan.scales == "exact":
                d, rest = split_scale(float(scale))
                return [pack_blocks(codes_FD, torch.tensor(d), kind), torch.tensor([rest])]
            return [pack_blocks(codes_FD, _fp16_scale(name, scale), kind)]
        case "i2_s":
            tail = torch.zeros(_I2_S_TAIL, dtype=torch.uint8)
            tail[:4] = scale.float().reshape(1).view(torch.uint8)
            return [torch.cat((pack_i2_s(codes_FD), tail))]
        case _:
            values = codes_FD.float() * scale
            return [_cast(values, Stored(name, tuple(values.shape), plan.encoding))]


def _fp16_scale(name: str, scale: Tensor) -> Tensor:
    """Refuses scales that fp16 holds with fewer than its 11 digits, or not at all."""
    if not 2.0**-14 <= float(scale) <= 65504.0:
        raise CheckpointError(
            f"{name} has the scale {float(scale):g}, outside the normal range of fp16 (6.1e-5 to "
            "65504): use --gguf-scale exact"
        )
    return scale


def _permuted(plan: Plan, name: str, t: Tensor) -> Tensor:
    rows = permuted_rows(name, plan.source.model, plan.architecture)
    return t if rows is None else rows.to_gguf(t)


def _cast(t: Tensor, spec: Stored) -> Tensor:
    cast = t.to(_DENSE[spec.encoding])
    if not bool(torch.isfinite(cast).all()):
        if bool(torch.isfinite(t).all()):
            raise CheckpointError(
                f"{spec.name} reaches {float(t.abs().max()):g}, beyond what f16 holds (65504); use "
                "gguf-bf16 or gguf-f32"
            )
        raise CheckpointError(
            f"{spec.name} holds NaN or infinity; the run diverged: export an earlier checkpoint"
        )
    return cast


def _beside(name: str, suffix: str) -> str:
    return to_gguf(f"{name.removesuffix('.weight')}.{suffix}")
