"""The certificate of an export: what it was made of, and a digest that any format can be held to.

Written as `bitscale.json` beside an export (or as one string into a file's metadata).
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from bitscale import __version__
from bitscale.config import QuantConfig
from bitscale.convert.model_source import ModelSource
from bitscale.errors import CheckpointError
from bitscale.quant.reference import Ternary
from bitscale.quant.schedule import Strength

FORMAT = "bitscale-certificate-1"
CERTIFICATE_NAME = "bitscale.json"


def codes_digest(names: Iterable[str], ternary: Callable[[str], Ternary]) -> str:
    """SHA-256 over name and int8 codes [F, D], row by row, of all ternary matrices in name order.

    Names are ours (`layers.0.attn.q.weight`): the same codes have the same digest in any format.
    """
    digest = CodesDigest()
    for name in sorted(names):
        digest.add(name, ternary(name).codes_FD)
    return digest.hexdigest()


class CodesDigest:
    """The same, for a writer that makes codes once and in name order."""

    def __init__(self) -> None:
        self._sha256, self._last = hashlib.sha256(), ""

    def add(self, name: str, codes_FD: Tensor) -> None:
        assert name > self._last, (name, self._last)
        self._last = name
        self._sha256.update(name.encode())
        self._sha256.update(codes_FD.contiguous().numpy().data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def certificate(
    source: ModelSource,
    target: str,
    *,
    computes: Strength,
    digest: str | None,
    **details: object,
) -> dict[str, Any]:
    """What an export of `source` to the format `target` says of itself, as plain JSON types.

    Args:
        computes: λ at which bitscale's decoder is the function that a reader of the format
            computes.
        digest: `codes_digest`, if the export holds codes (whether or not as such).
        details: what else the format chose.
    """
    return {
        "format": FORMAT,
        "bitscale": __version__,
        "target": target,
        "source": {"kind": source.kind, "step": source.step, "tokens": source.tokens},
        "trained_at": source.strength._asdict(),
        "computes": computes._asdict(),
        "codes_sha256": digest,
        "post_training_quantization": source.post_training,
        "model": source.model.model_dump(),
        "quant": source.quant.model_dump(),
        "quantizer": asdict(source.spec),
        "dtype": source.dtype,
        "seq_len": source.seq_len,
        "reset_attention": source.reset_attention,
        "corpora": list(source.corpora),
        "recipe": dict(source.recipe),
        "config_hash": source.config_hash,
        "tokenizer_sha256": source.tokenizer_sha256,
        "versions": dict(source.versions),
        **details,
    }


def read_certificate(directory: Path) -> dict[str, Any] | None:
    """The certificate beside an export; None if there is none. CheckpointError if it is damaged."""
    file = directory / CERTIFICATE_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r}, this version reads {FORMAT!r}")
        QuantConfig.model_validate_json(json.dumps(content["quant"]))
        Strength(**content["trained_at"])
        if content["dtype"] not in ("bf16", "fp32") or not isinstance(content["source"], dict):
            raise ValueError("dtype or source")
        if not all(isinstance(scale, float) for scale in (content.get("scales") or {}).values()):
            raise ValueError("scales are not numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: damaged ({' '.join(str(error).split())[:120]}); remove it to go without"
        ) from error
    return dict(content)


def to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
