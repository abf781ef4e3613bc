"""bitscale's packed forms: ternary layers at 2 or 1.6 bits a weight, all else in 16 (or 32) bit.

    model.safetensors   NAME.weight uint8 [F/4, D] (packed, 2 bits) or [F, ceil(D/5)] (compact,
                        base 3; layouts: quant/pack.py) with NAME.weight_scale fp32 scalar for
                        every ternary layer; other tensors as they are, but for a NAME.bias with
                        what the quantizer adds (quant.deadzone_bias)
    config.json         shape, quantizer, provenance and the SHA-256 over all codes
    tokenizer.*         copied from the corpus that the model was trained on

The codes are those of the last training step, to the bit: made from the weights in the dtype
that the run computed with, and dequantized once, never re-quantized.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitscale.config import ModelConfig, QuantConfig, quant_spec
from bitscale.convert.certificate import (
    CERTIFICATE_NAME,
    CodesDigest,
    certificate,
    codes_digest,
    to_json,
)
from bitscale.convert.loaded import DTYPES, LoadedModel, decoder_on_meta
from bitscale.convert.model_source import (
    ModelSource,
    parameter_shapes,
    refuse_unless_ternary,
    ternary_names,
)
from bitscale.convert.staging import new_directory, refuse_existing
from bitscale.convert.tensor_file import TensorSpec, write_sharded
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import PackedBitLinear, bit_linears, set_strength
from bitscale.quant.pack import base3_width, pack_2bit, pack_base3, unpack_2bit, unpack_base3
from bitscale.quant.reference import Quant, Ternary
from bitscale.quant.schedule import TERNARY

Form = Literal["packed", "compact"]
FORMATS: dict[Form, str] = {"packed": "bitscale-packed-1", "compact": "bitscale-compact-1"}


def export_packed(source: ModelSource, out: Path, form: Form = "packed") -> dict[str, Any]:
    """Write `source` to the new directory `out`; returns its certificate.

    Raises CheckpointError if the model is not fully ternary or a layer does not fit the layout,
    and if `out` exists; nothing is left half-written.
    """
    refuse_unless_ternary(source)
    refuse_existing(out)
    refuse_unpackable(source.quant, f"the {form} form")
    if form == "packed":
        refuse_rows(source)
    codes = CodesDigest()
    with new_directory(out) as staging:
        specs, tensors = _specs(source, form), _tensors(source, form, codes)
        write_sharded(staging, specs, tensors, max_shard_bytes=2**63)
        digest, tokenizer = codes.hexdigest(), _copy_tokenizer(source, staging)
        description = _describe(source, form, digest) | {"tokenizer_file": tokenizer}
        (staging / "config.json").write_text(to_json(description))
        content = certificate(source, form, computes=TERNARY, digest=digest)
        (staging / CERTIFICATE_NAME).write_text(to_json(content))
    return content


def is_packed(path: Path) -> bool:
    """Whether `path` looks like a directory that `export_packed` wrote."""
    try:
        content = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    named = str(content.get("format")) if isinstance(content, dict) else ""
    return named.startswith(("bitscale-packed", "bitscale-compact"))


def packed_source(path: Path) -> ModelSource:
    """The model of a packed directory, which holds codes and no latent weights.

    Raises CheckpointError for damaged or foreign files.
    """
    try:
        description = json.loads((path / "config.json").read_text())
        form = _form(path, description)
        file = safe_open(path / "model.safetensors", framework="pt")
        m = ModelConfig.model_validate_json(json.dumps(description["model"]))
        quant = QuantConfig.model_validate_json(json.dumps(description["quant"]))
        names = ternary_names(m, quant)
        shapes = parameter_shapes(m, quant)
        if quant_spec(quant).deadzone_bias:
            shapes |= {f"{name.removesuffix('.weight')}.bias": shapes[name][:1] for name in names}
        read = partial(_read, path, file, shapes)
        source = ModelSource(
            path=path,
            kind=form,
            form="2-bit codes" if form == "packed" else "base-3 codes",
            model=m,
            quant=quant,
            dtype=description["dtype"],
            strength=TERNARY,
            step=description["step"],
            tokens=description["tokens"],
            seq_len=description["seq_len"],
            reset_attention=description["reset_attention"],
            corpora=tuple(description["corpora"]),
            config_hash=description["config_hash"],
            tokenizer_sha256=description["tokenizer_sha256"],
            tokenizer_file=_tokenizer_file(path, description),
            eod_token=description.get("eod_token"),
            versions=description["versions"],
            recipe=_recipe(path),
            shapes=shapes,
            ternary_names=names,
            read=read,
            read_codes=partial(_read_codes, path, file, shapes, form),
            biases_finished=True,
        )
    except (ValueError, KeyError, AttributeError, TypeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a packed model ({error})") from error
    if codes_digest(names, source.ternary) != description["codes_sha256"]:
        raise CheckpointError(f"{path}: the codes do not match codes_sha256 in config.json")
    return source


def load_packed(path: Path) -> LoadedModel:
    """The inference model of a packed directory; its forward pass is the one that was trained.

    Raises CheckpointError for damaged or foreign files.
    """
    source = packed_source(path)
    m = source.model
    model = decoder_on_meta(m, source.quant)
    for name, layer in list(bit_linears(model)):
        codes = source.ternary(f"{name}.weight")
        bias = source.finished_bias(name)
        packed = packed_layer(codes, bias, layer.quant, compact=source.kind == "compact")
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, packed)
    others = {name: source.weight(name) for name, _ in model.named_parameters()}
    if m.tie_embeddings:
        others["head.weight"] = others["embed.weight"]
    model.load_state_dict(others, strict=False, assign=True)
    set_strength(model, TERNARY)  # of an 8-bit head, and of a SubLN that came in with λ
    return LoadedModel(
        model,
        TERNARY,
        source.step,
        source.tokenizer_sha256,
        source.seq_len,
        source.reset_attention,
        source.corpora,
    )


def packed_layer(
    weight: Ternary, bias_F: Tensor | None, quant: Quant, *, compact: bool = False
) -> PackedBitLinear:
    """The finished layer; at 1.6 bits if `compact`, or if 4 does not divide its rows."""
    codes_FD, scale = weight
    rows, columns = codes_FD.shape
    if compact or rows % 4:
        return PackedBitLinear(pack_base3(codes_FD), scale, bias_F, quant, columns)
    return PackedBitLinear(pack_2bit(codes_FD), scale, bias_F, quant)


def _form(path: Path, description: dict[str, Any]) -> Form:
    named = description.get("format")
    for form, name in FORMATS.items():
        if named == name:
            return form
    known = " and ".join(repr(name) for name in FORMATS.values())
    raise CheckpointError(f"{path}: config.json has format {named!r}, this version reads {known}")


def _read(path: Path, file: Any, shapes: dict[str, tuple[int, ...]], name: str) -> Tensor:
    return _tensor(path, file, name, shapes[name])


def _read_codes(
    path: Path, file: Any, shapes: dict[str, tuple[int, ...]], form: Form, name: str
) -> Ternary:
    packed = _tensor(path, file, name, _packed_shape(shapes[name], form))
    scale = _tensor(path, file, f"{name}_scale", ())
    try:
        if form == "compact":
            return Ternary(unpack_base3(packed, shapes[name][1]), scale)
        return Ternary(unpack_2bit(packed), scale)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error


def _tensor(path: Path, file: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError:
        raise CheckpointError(
            f"{path}: tensors do not fit the model in config.json: {name} is missing"
        ) from None
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{path}: tensors do not fit the model in config.json: {name} is "
            f"{list(tensor.shape)}, not {list(shape)}"
        )
    return tensor


def _tokenizer_file(path: Path, description: dict[str, Any]) -> Path | None:
    name = description.get("tokenizer_file")
    return None if name is None else path / Path(name).name


def _recipe(path: Path) -> dict[str, Any]:
    """From the certificate; exports of before there was one have none."""
    file = path / CERTIFICATE_NAME
    return dict(json.loads(file.read_text())["recipe"]) if file.is_file() else {}


def refuse_unpackable(quant: QuantConfig, form: str = "the packed form") -> None:
    """Raise CheckpointError if codes and one scale a matrix cannot compute what was trained."""
    spec = quant_spec(quant)
    weight = spec.weight
    reasons = {
        f"codes {weight.code_min}..{weight.code_max}, not ternary": not weight.is_ternary,
        f"a scale per {weight.granularity}, not one a matrix": weight.granularity != "matrix",
        "scales of its own, one a row": spec.learns_scale,
        "codes drawn anew at every step": weight.rounding == "stochastic",
        "a division by 1 / scale": spec.product == "codes",
        "sums x + (x̂ - x) instead of x̂": spec.straight_through == "added",
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(
                f"quant.preset={quant.preset!r} trains with {reason}: {form} would "
                "not compute what was trained; keep the checkpoint, or train with preset b158"
            )


def refuse_rows(source: ModelSource) -> None:
    """Raise CheckpointError if a matrix does not fit into four rows a byte."""
    for name in source.ternary_names:
        if source.shapes[name][0] % 4:
            raise CheckpointError(
                f"{name} has {source.shapes[name][0]} rows; the 2-bit layout packs 4 rows a byte: "
                "choose model sizes that are multiples of 4, or --format compact"
            )


def _packed_shape(shape: tuple[int, ...], form: Form) -> tuple[int, int]:
    rows, columns = shape
    return (rows // 4, columns) if form == "packed" else (rows, base3_width(columns))


def _specs(source: ModelSource, form: Form) -> Iterator[TensorSpec]:
    """What `_tensors` yields, without making it."""
    dtype = DTYPES[source.dtype]
    for name in sorted(source.shapes):
        shape = source.shapes[name]
        if name.endswith(".bias"):
            continue
        if name not in source.ternary_names:
            yield TensorSpec(name, dtype, shape)
            continue
        yield TensorSpec(name, torch.uint8, _packed_shape(shape, form))
        yield TensorSpec(f"{name}_scale", torch.float32, ())
        layer = name.removesuffix(".weight")
        if f"{layer}.bias" in source.shapes or source.spec.deadzone_bias:
            yield TensorSpec(f"{layer}.bias", dtype, shape[:1])


def _tensors(source: ModelSource, form: Form, digest: CodesDigest) -> Iterator[tuple[str, Tensor]]:
    """In name order, in which `digest` takes codes: each matrix is quantized once."""
    for name in sorted(source.shapes):
        if name.endswith(".bias"):
            continue
        if name not in source.ternary_names:
            yield name, source.weight(name)
            continue
        codes_FD, scale = source.ternary(name)
        digest.add(name, codes_FD)
        yield name, pack_2bit(codes_FD) if form == "packed" else pack_base3(codes_FD)
        yield f"{name}_scale", scale
        layer = name.removesuffix(".weight")
        bias = source.finished_bias(layer)
        if bias is not None:
            yield f"{layer}.bias", bias


def _describe(source: ModelSource, form: Form, digest: str) -> dict[str, Any]:
    return {
        "format": FORMATS[form],
        "model": source.model.model_dump(),
        "quant": source.quant.model_dump(),
        "dtype": source.dtype,
        "codes_sha256": digest,
        "step": source.step,
        "tokens": source.tokens,
        "seq_len": source.seq_len,
        "reset_attention": source.reset_attention,
        "corpora": list(source.corpora),
        "config_hash": source.config_hash,
        "tokenizer_sha256": source.tokenizer_sha256,
        "eod_token": source.eod_token,
        "versions": dict(source.versions),
    }


def _copy_tokenizer(source: ModelSource, out: Path) -> str | None:
    """Name of the copied file; None if the corpus has moved since the run."""
    if source.tokenizer_file is None or not source.tokenizer_file.is_file():
        return None
    shutil.copyfile(source.tokenizer_file, out / source.tokenizer_file.name)
    return source.tokenizer_file.name
