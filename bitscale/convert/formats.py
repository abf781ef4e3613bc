"""The formats that `bitscale export` writes: one line each, one module each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitscale.config import QuantConfig
from bitscale.convert.gguf_export import Encoding, Scales, export_gguf
from bitscale.convert.huggingface_out import export_bitnet, export_dequantized, export_latent
from bitscale.convert.megatron_out import export_megatron
from bitscale.convert.model_source import ModelSource
from bitscale.convert.packed import export_packed
from bitscale.errors import CheckpointError


@dataclass(frozen=True)
class ExportOptions:
    """What the command line may choose; None: the format's own."""

    dtype: Literal["bf16", "fp32"] | None = None
    linear: Literal["bitlinear", "autobitlinear", "online"] | None = None
    gguf_scale: Scales | None = None
    gguf_tokenizer: Literal["none"] | None = None


Writer = Callable[[ModelSource, Path, ExportOptions], dict[str, Any]]


def _bitnet(source: ModelSource, out: Path, options: ExportOptions) -> dict[str, Any]:
    if options.linear is None:
        raise CheckpointError(
            "--format hf-bitnet needs --linear: bitlinear divides by weight_scale, autobitlinear "
            "multiplies by it, online quantizes latents when they are used; name one"
        )
    return export_bitnet(source, out, options.linear, options.dtype)


def _packed(source: ModelSource, out: Path, options: ExportOptions) -> dict[str, Any]:
    return export_packed(source, out)


def _gguf(encoding: Encoding) -> Writer:
    def write(source: ModelSource, out: Path, options: ExportOptions) -> dict[str, Any]:
        return export_gguf(
            source,
            out,
            encoding,
            scales=options.gguf_scale or "exact",
            dtype=options.dtype,
            with_tokenizer=options.gguf_tokenizer is None,
        )

    return write


_GGUF: dict[str, Encoding] = {
    "gguf-tq2_0": "tq2_0",
    "gguf-tq1_0": "tq1_0",
    "gguf-i2_s": "i2_s",
    "gguf-bf16": "bf16",
    "gguf-f16": "f16",
    "gguf-f32": "f32",
}
# Names and what they mean: bitscale/cli/export.py.
WRITERS: dict[str, Writer] = {
    "packed": _packed,
    "compact": lambda source, out, options: export_packed(source, out, "compact"),
    "hf": lambda source, out, options: export_latent(source, out, options.dtype),
    "hf-dequantized": lambda source, out, options: export_dequantized(source, out, options.dtype),
    "hf-bitnet": _bitnet,
    "megatron": lambda source, out, options: export_megatron(source, out, options.dtype),
    **{name: _gguf(encoding) for name, encoding in _GGUF.items()},
}
_WITH_LINEAR = ("hf-bitnet",)
_WITH_GGUF_SCALE = ("gguf-tq2_0", "gguf-tq1_0")
_WITH_DTYPE = ("hf", "hf-dequantized", "hf-bitnet", "megatron", *_WITH_GGUF_SCALE, "gguf-i2_s")


def export(
    source: ModelSource,
    out: Path,
    target: str,
    options: ExportOptions | None = None,
    quantize: QuantConfig | None = None,
) -> dict[str, Any]:
    """Write `source` to the new path `out` in the format `target`; returns the certificate.

    `quantize`: round a 16-bit model to the nearest codes of this quantizer first.

    Raises CheckpointError for what the format cannot hold, options that mean nothing to it, and
    a model to be quantized that is quantized already.
    """
    options = options or ExportOptions()
    for name, value, formats in (
        ("--linear", options.linear, _WITH_LINEAR),
        ("--dtype", options.dtype, _WITH_DTYPE),
        ("--gguf-scale", options.gguf_scale, _WITH_GGUF_SCALE),
        ("--gguf-tokenizer", options.gguf_tokenizer, tuple(_GGUF)),
    ):
        if value is not None and target not in formats:
            raise CheckpointError(
                f"{name} {value} means nothing to --format {target}, only to {', '.join(formats)}; "
                "leave it out"
            )
    if quantize is not None:
        if source.strength.weight != 0.0:
            raise CheckpointError(
                f"{source.path} is quantized already (λ = {source.strength.weight:g}), and "
                "quantizing again would move its scales; leave --quantize out"
            )
        source = source.rounded_to_nearest(quantize)
    return WRITERS[target](source, out, options)
