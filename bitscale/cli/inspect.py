"""`bitscale inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitscale.convert.inspection import Description, TensorFacts

_EPILOG = """\
examples:
  bitscale inspect runs/quickstart/run
  bitscale inspect model.gguf --tensors
  bitscale inspect hf-directory --headers --json facts.json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what a model file or directory holds",
        description="Say what a file or directory is: architecture, precision, bits per weight, "
        "zeros and scales, recipe. Reads bitscale's own forms, Hugging Face directories, "
        "DeepSpeed's and Megatron-core's checkpoints, safetensors, GGUF, PyTorch files of plain "
        "tensors, token shards; runs no code of theirs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="file or directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not each kind")
    parser.add_argument("--headers", action="store_true", help="do not read the tensors' values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all of it there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.cli.json_file import refuse_unwritable, write_json

    refuse_unwritable(args.json)
    from bitscale.sources.inspection import inspect  # and torch, which takes seconds

    description = inspect(args.path, read_values=not args.headers)
    print("\n".join(show(description, each=args.tensors)))
    if args.json:
        write_json(args.json, description.to_tree())
    return 0


def show(description: Description, *, each: bool) -> list[str]:
    """Lines of text: the facts, then a table of the tensors or of kinds of tensors."""
    lines = [f"{description.path}: {description.kind}"]
    for key, value in description.facts.items():
        lines += _fact(key, value)
    lines += _certificate(description.certificate)
    if description.tensors:
        groups = [(t.name, [t]) for t in description.tensors] if each else _alike(description)
        rows = [_row(name, group) for name, group in groups]
        lines += ["", *_table([_HEAD, *rows])]
    return lines


_HEAD = ("tensors", "name", "stored", "shape", "bits/weight", "values", "zeros", "scale")


def _fact(key: str, value: Any) -> list[str]:
    name = key.replace("_", " ")
    if isinstance(value, dict):
        return [f"  {name}:", *(f"    {k} = {v}" for k, v in value.items())]
    return [f"  {name}: {value:,}" if isinstance(value, int) else f"  {name}: {value}"]


def _certificate(content: dict[str, Any] | None) -> list[str]:
    if content is None:
        return ["  certificate: none"]
    codes = content["codes_sha256"]
    made = "post-training rounding" if content["post_training_quantization"] else "trained"
    return [
        f"  certificate: {content['target']} of step {content['source']['step']:,}, "
        f"{content['quant']['preset']} ({made}), codes sha256 {codes[:16] if codes else 'none'}"
    ]


def _alike(description: Description) -> list[tuple[str, list[TensorFacts]]]:
    """Tensors whose names differ in the number of the layer, if they are stored alike."""
    import re

    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorFacts]] = {}
    for tensor in description.tensors:
        name = re.sub(r"\.\d+\.", ".*.", tensor.name)
        groups.setdefault((name, tensor.stored, tensor.shape), []).append(tensor)
    return [(key[0], group) for key, group in groups.items()]


def _row(name: str, group: Sequence[TensorFacts]) -> tuple[str, ...]:
    weights, first = sum(t.num_weights for t in group), group[0]
    bits = 8 * sum(t.num_bytes for t in group) / max(weights, 1)
    zeros = [t.zeros * t.num_weights for t in group if t.zeros is not None]
    scales = [t.scale for t in group if t.scale is not None]
    shape = "x".join(map(str, first.shape)) or "scalar"
    span = f"{min(scales):.4g}" if scales else ""
    if scales and max(scales) != min(scales):
        span += f" to {max(scales):.4g}"
    kinds = sorted({t.values for t in group if t.values})
    values = ", ".join(kinds)
    share = f"{sum(zeros) / max(weights, 1):.1%}" if zeros else ""
    return (str(len(group)), name, first.stored, shape, f"{bits:.3g}", values, share, span)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    numbers = {0, 4, 6}  # aligned to the right
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
