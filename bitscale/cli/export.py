"""`bitscale export`."""

import argparse
from pathlib import Path

# One line a format; bitscale/convert/formats.py has their writers.
FORMATS = {
    "packed": "bitscale's own: codes at 2 bits and one scale a matrix, safetensors (default)",
    "compact": "the same at 1.6 bits, five codes a byte",
    "hf": "Hugging Face directory of the 16- or 32-bit latents, not quantized",
    "hf-dequantized": "Hugging Face directory of scale x code in 16 or 32 bit: loads anywhere",
    "hf-bitnet": "Hugging Face directory packed at 2 bits for its bitnet layers (--linear)",
    "megatron": "megatron-core torch_dist directory of the latents, for any TP and PP",
    "gguf-tq2_0": "GGUF file for llama.cpp, 2.06 bits a weight, blocks of 256 columns",
    "gguf-tq1_0": "the same at 1.69 bits: smaller, slower",
    "gguf-i2_s": "GGUF file for bitnet.cpp on x86, 2 bits, fp32 scales",
    "gguf-bf16": "GGUF file of scale x code, or of 16-bit latents; also gguf-f16, gguf-f32",
    "gguf-f16": "in fp16",
    "gguf-f32": "in fp32",
}
# Formats of weights that are not quantized, and what computes them as they were trained.
_LATENTS = {
    "hf": "transformers computes these latents in 16 bit; hf-dequantized and hf-bitnet compute the "
    "ternary model",
    "megatron": "megatron-core's own layers compute these latents in 16 bit; its GPTModel with "
    "ternary_layer_spec (docs/parallelism.md) computes the ternary model",
}
_EPILOG = """\
formats:
{formats}

examples:
  bitscale export runs/quickstart/run packed
  bitscale export runs/quickstart/run/checkpoints/step-00000200 out --format hf-dequantized
  bitscale export runs/quickstart/run out --format hf-bitnet --linear autobitlinear
  bitscale export runs/quickstart/run model.gguf --format gguf-tq2_0
  bitscale export runs/quickstart/run out --format megatron --dtype fp32
  bitscale export runs/sixteen-bit out --format packed --quantize b158
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    formats = "\n".join(f"  {name:<15} {what}" for name, what in FORMATS.items())
    parser = subparsers.add_parser(
        "export",
        help="write a model as packed ternary weights or for other programs",
        description="Write a model for other programs, with a certificate (docs/conversion.md).",
        epilog=_EPILOG.format(formats=formats),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="MODEL",
        type=Path,
        help="run, checkpoint, export, Hugging Face directory, GGUF file, or a checkpoint of "
        "DeepSpeed or Megatron-core",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory or file")
    parser.add_argument("--format", choices=FORMATS, default="packed", metavar="FORMAT")
    parser.add_argument(
        "--linear",
        choices=("bitlinear", "autobitlinear", "online"),
        help="hf-bitnet: divide by weight_scale, multiply by it, or quantize latents on the fly",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="hf, megatron, gguf: of what is not packed"
    )
    parser.add_argument(
        "--gguf-scale",
        choices=("exact", "fp16"),
        help="gguf-tq formats: .scale tensors beside the fp16 scales (default), or without",
    )
    parser.add_argument(
        "--gguf-tokenizer", choices=("none",), help="gguf formats: leave the tokenizer out"
    )
    parser.add_argument(
        "--quantize",
        metavar="PRESET",
        help="round a 16-bit model to the nearest codes first, as a baseline (docs/quantizers.md)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="whose model section describes a DeepSpeed checkpoint that does not do so itself",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.config import load_config, quant_config
    from bitscale.convert.formats import ExportOptions, export
    from bitscale.sources.as_model import open_model

    source = open_model(args.source, args.config and load_config(args.config))
    quantize = None if args.quantize is None else quant_config(args.quantize)
    options = ExportOptions(args.dtype, args.linear, args.gguf_scale, args.gguf_tokenizer)
    content = export(source, args.out, args.format, options, quantize)
    files = [args.out, *args.out.rglob("*")]
    mib = sum(file.stat().st_size for file in files if file.is_file()) / 2**20
    digest = content["codes_sha256"]
    codes = "no codes" if digest is None else f"codes sha256 {digest[:16]}"
    print(f"exported {source.path} to {args.out} ({args.format}): {mib:.2f} MiB, {codes}")
    if args.format in _LATENTS and source.strength.weight:
        print(f"note: trained at λ = {source.strength.weight:g}, and {_LATENTS[args.format]}")
    return 0
