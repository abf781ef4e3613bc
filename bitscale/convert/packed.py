"""bitscale's packed form: ternary layers at 2 bits a weight, everything else in 16 (or 32) bit.

    model.safetensors   NAME.weight uint8 [F/4, D] (layout: quant/pack.py) with NAME.weight_scale
                        fp32 scalar for every ternary layer; other tensors as they are, but
                        for a NAME.bias with what the quantizer adds (quant.deadzone_bias)
    config.json         shape, quantizer, provenance and the SHA-256 over all codes
    tokenizer.*         copied from the corpus that the model was trained on

The codes are those of the last training step, to the bit: made from the weights in the dtype
that the run computed with, and dequantized once, never re-quantized.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitscale.checkpoint import Reader, give_ordinary_mode
from bitscale.config import Config, ModelConfig, QuantConfig, parse_config, quant_spec
from bitscale.convert.loaded import DTYPES, LoadedModel, decoder_on_meta
from bitscale.data.corpus import load_corpus
from bitscale.errors import CheckpointError, DataError
from bitscale.model.bitlinear import PackedBitLinear, bit_linears, set_strength
from bitscale.quant.pack import pack_2bit, unpack_2bit
from bitscale.quant.reference import finished_bias, ternarize
from bitscale.quant.schedule import TERNARY, quant_strength

FORMAT = "bitscale-packed-1"


def export_packed(source: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint at `source` to the new directory `out`; returns its config.json.

    Raises CheckpointError if the model is not fully ternary or a layer does not fit the layout,
    and if `out` exists; nothing is left half-written.
    """
    reader = Reader(source)
    if reader.meta.lambda_weight != 1.0:
        raise CheckpointError(
            f"{source} is at λ = {reader.meta.lambda_weight:g}, not 1: its weights are not "
            "ternary; train past the end of the transition's ramp first"
        )
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another directory or remove it")
    cfg = parse_config(reader.meta.config, where=str(source))
    refuse_unpackable(cfg)
    residual = quant_strength(max(reader.meta.step - 1, 0), cfg).residual
    if residual:
        raise CheckpointError(
            f"{source} is at a residual of {residual:g} x wᵀ, not 0: its outputs still contain "
            "16-bit weights; train past the end of transition.residual first"
        )
    tensors, digest = _pack_all(reader, cfg)
    description = _describe(reader, cfg, digest)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        save_file(tensors, staging / "model.safetensors")
        give_ordinary_mode(staging / "model.safetensors")
        description["tokenizer_file"] = _copy_tokenizer(cfg, staging)
        (staging / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        staging.rename(out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"{out}: not written: {error}") from error
    return description


def is_packed(path: Path) -> bool:
    """Whether `path` is a directory that `export_packed` wrote."""
    return (path / "model.safetensors").is_file() and (path / "config.json").is_file()


def load_packed(path: Path) -> LoadedModel:
    """The inference model of a packed directory; its forward pass is the one that was trained.

    Raises CheckpointError for damaged or foreign files.
    """
    try:
        description = json.loads((path / "config.json").read_text())
        if description.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: config.json has format {description.get('format')!r}, "
                f"this version reads {FORMAT!r}"
            )
        tensors = load_file(path / "model.safetensors")
        m = ModelConfig.model_validate_json(json.dumps(description["model"]))
        quant = QuantConfig.model_validate_json(json.dumps(description["quant"]))
    except (ValueError, KeyError, AttributeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a packed model ({error})") from error
    if codes_digest(tensors) != description["codes_sha256"]:
        raise CheckpointError(f"{path}: the codes do not match codes_sha256 in config.json")
    model = decoder_on_meta(m, quant)
    try:
        for name, layer in list(bit_linears(model)):
            packed = PackedBitLinear(
                tensors.pop(f"{name}.weight"),
                tensors.pop(f"{name}.weight_scale"),
                tensors.pop(f"{name}.bias", None),
                layer.quant,
            )
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, packed)
        if m.tie_embeddings:
            tensors["head.weight"] = tensors["embed.weight"]
        model.load_state_dict(tensors, strict=False, assign=True)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: tensors do not fit the model in config.json: {error}"
        ) from error
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(f"{path}: tensors missing: {', '.join(missing)}")
    set_strength(model, TERNARY)  # of an 8-bit head, and of a SubLN that came in with λ
    return LoadedModel(
        model,
        TERNARY,
        description["step"],
        description["tokenizer_sha256"],
        description["seq_len"],
        description["reset_attention"],
        tuple(description["corpora"]),
    )


def codes_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and codes of all ternary layers, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith(".weight_scale"):
            weight = name.removesuffix("_scale")
            digest.update(weight.encode())
            digest.update(unpack_2bit(tensors[weight]).numpy().tobytes())
    return digest.hexdigest()


def refuse_unpackable(cfg: Config) -> None:
    """Raise CheckpointError if codes and one scale a matrix cannot compute what was trained."""
    spec = quant_spec(cfg.quant)
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
                f"quant.preset={cfg.quant.preset!r} trains with {reason}: the packed form would "
                "not compute what was trained; keep the checkpoint, or train with preset b158"
            )


def _pack_all(reader: Reader, cfg: Config) -> tuple[dict[str, Tensor], str]:
    ternary = {f"{name}.weight" for name, _ in bit_linears(decoder_on_meta(cfg.model, cfg.quant))}
    tensors: dict[str, Tensor] = {}
    for name, master in reader.parameters():
        weight = master.to(DTYPES[cfg.train.dtype])
        if name not in ternary:
            tensors.setdefault(name, weight)  # a finished bias is there already
            continue
        if weight.shape[0] % 4:
            raise CheckpointError(
                f"{name} has {weight.shape[0]} rows; the 2-bit layout packs 4 rows a byte: "
                "choose model sizes that are multiples of 4"
            )
        codes, scale = ternarize(weight, cfg.quant)
        tensors[name] = pack_2bit(codes)
        tensors[f"{name}_scale"] = scale
        bias_name = f"{name.removesuffix('.weight')}.bias"
        bias = finished_bias(weight, _bias(reader, cfg, bias_name), cfg.quant)
        if bias is not None:
            tensors[bias_name] = bias
    return tensors, codes_digest(tensors)


def _bias(reader: Reader, cfg: Config, name: str) -> Tensor | None:
    if name not in reader.meta.shapes:
        return None
    bias = reader.read(name, "master", 0, math.prod(reader.meta.shapes[name]))
    return bias.to(DTYPES[cfg.train.dtype])


def _describe(reader: Reader, cfg: Config, digest: str) -> dict[str, Any]:
    meta = reader.meta
    return {
        "format": FORMAT,
        "model": meta.config["model"],
        "quant": meta.config["quant"],
        "dtype": cfg.train.dtype,
        "codes_sha256": digest,
        "step": meta.step,
        "tokens": meta.tokens,
        "seq_len": cfg.data.seq_len,
        "reset_attention": cfg.data.reset_attention,
        "corpora": [corpus.path for corpus in cfg.data.corpora],
        "config_hash": meta.config_hash,
        "tokenizer_sha256": meta.identity["tokenizer"],
        "versions": meta.versions,
    }


def _copy_tokenizer(cfg: Config, out: Path) -> str | None:
    """Name of the copied file; None if the corpus has moved since the run."""
    try:
        source = load_corpus(cfg.data.corpora[0].path).tokenizer_path
    except DataError:
        return None
    shutil.copyfile(source, out / source.name)
    return source.name
