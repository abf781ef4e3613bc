"""A Hugging Face directory as a ModelSource: Llama, Mistral, Qwen2/3, OLMo, BitNet.

What its weights are, is found out in this order: packed codes (`quantization_config`), 16-bit
weights of which each matrix has one magnitude (dequantized codes), or latents. A `bitscale.json`
that fits adds what the files cannot say: exact scales, λ, recipe, step.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitscale.config import ModelConfig, QuantConfig
from bitscale.convert.certificate import read_certificate
from bitscale.convert.huggingface_config import from_huggingface_config
from bitscale.convert.model_source import (
    TOKENIZER_FILES,
    ModelSource,
    parameter_shapes,
    ternary_names,
)
from bitscale.convert.names import to_huggingface
from bitscale.convert.tensor_reader import TensorReader
from bitscale.data.corpus import file_sha256
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import is_scale
from bitscale.quant.pack import unpack_2bit
from bitscale.quant.reference import Ternary
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

Form = Literal["latent", "dequantized", "bitlinear", "autobitlinear", "online"]
ScaleConvention = Literal["divide", "multiply"]
_EXACT_SCALE_TOLERANCE = 2.0**-8  # relative: a scale may have been rounded to bf16
_FORMS: dict[Form, str] = {
    "latent": "16- or 32-bit weights",
    "dequantized": "dequantized codes",
    "bitlinear": "packed codes, divided by weight_scale",
    "autobitlinear": "packed codes, multiplied by weight_scale",
    "online": "latents quantized online",
}
_IGNORED = ("rotary_emb.inv_freq",)  # a table that older models store


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a directory with transformers' config.json."""
    try:
        tree = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and "model_type" in tree


def huggingface_source(
    path: Path, seq_len: int | None = None, scales: ScaleConvention | None = None
) -> ModelSource:
    """The model of a directory; nothing but names, shapes and one matrix is read yet.

    Args:
        seq_len: tokens of a sequence; default: config.json's max_position_embeddings.
        scales: how packed codes use weight_scale; default: as the linear_class says.

    Raises CheckpointError for what the decoder cannot compute and for files that do not fit.
    """
    tree = _read_config(path)
    content = read_certificate(path)
    seq_len = seq_len or (content or {}).get("seq_len") or tree.get("max_position_embeddings")
    if not isinstance(seq_len, int):
        raise CheckpointError(f"{path}: config.json names no length; import with --seq-len N")
    try:
        m, form = from_huggingface_config(tree, seq_len), _packed_form(path, tree)
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: config.json: {reason}; take the publisher's") from error
    quant = QuantConfig()
    if content is not None:
        quant = QuantConfig.model_validate_json(json.dumps(content["quant"]))
    tensors = TensorReader(path)
    shapes = {k: v for k, v in parameter_shapes(m, quant).items() if not is_scale(k)}
    _check_tensors(path, tensors, shapes, m, ternary_names(m, quant), form)
    exact = (content or {}).get("scales") or {}
    files = _Files(path, tensors, shapes, exact, form, scales, m.post_norm, quant.eps)
    if form == "latent" and files.holds_dequantized(min(ternary_names(m, quant))):
        files = replace(files, form="dequantized")
    return _source(path, files, m, quant, tree, content, seq_len)


def _source(
    path: Path,
    files: "_Files",
    m: ModelConfig,
    quant: QuantConfig,
    tree: Mapping[str, Any],
    content: Mapping[str, Any] | None,
    seq_len: int,
) -> ModelSource:
    content = content or {}
    made_of = content.get("source", {})
    trained_at = content.get("trained_at")
    is_latent = files.form in ("latent", "online")
    default = SIXTEEN_BIT if files.form == "latent" else TERNARY
    is_fp32 = "float32" in (tree.get("dtype"), tree.get("torch_dtype"))
    stored: Literal["bf16", "fp32"] = "fp32" if is_fp32 else "bf16"
    tokenizer_file, fingerprint = _tokenizer(path, content.get("tokenizer_sha256"))
    read_as = {"latent": SIXTEEN_BIT, "dequantized": Strength(1.0, 0.0)}.get(files.form, TERNARY)
    return ModelSource(
        path=path,
        kind="huggingface",
        form=f"{tree['model_type']}, {_FORMS[files.form]}",
        model=m,
        quant=quant,
        # Codes were made of weights in the run's dtype; online quantization takes what is stored.
        dtype=stored if files.form == "online" else content.get("dtype", stored),
        strength=Strength(**trained_at) if trained_at else default,
        step=made_of.get("step", 0),
        tokens=made_of.get("tokens", 0),
        seq_len=seq_len,
        reset_attention=content.get("reset_attention", False),
        corpora=tuple(content.get("corpora", ())),
        config_hash=content.get("config_hash", ""),
        tokenizer_sha256=fingerprint,
        tokenizer_file=tokenizer_file,
        eod_token=None,
        versions=content.get("versions", {}),
        recipe=content.get("recipe", {}),
        shapes=files.shapes,
        ternary_names=ternary_names(m, quant),
        read=files.read,
        read_codes=None if is_latent else files.read_codes,
        biases_finished=not is_latent,
        read_as=read_as,
        scale_rounding=2.0**-22 if files.exact_scales else 2.0**-8,
        post_training=content.get("post_training_quantization", False),
    )


@dataclass(frozen=True)
class _Files:
    """Reads our parameters out of their tensors."""

    path: Path
    tensors: TensorReader
    shapes: dict[str, tuple[int, ...]]
    exact_scales: Mapping[str, float]
    form: Form
    convention: ScaleConvention | None
    post_norm: bool
    smallest_scale: float

    def theirs(self, name: str) -> str:
        return to_huggingface(name, post_norm=self.post_norm)

    def read(self, name: str) -> Tensor:
        value = self.tensors.floating(self.theirs(name))
        layer, _, parameter = name.rpartition(".")
        if parameter == "bias" and self.form == "autobitlinear":
            # Stored so that it comes right when the sum is multiplied by the scale.
            value = value.float() * self._stored_scale(f"{layer}.weight")
        return value

    def read_codes(self, name: str) -> Ternary:
        if self.form == "dequantized":
            codes = self._dequantized(name)
            if codes is None:
                raise CheckpointError(
                    f"{self.path}: {name} has several magnitudes, and other matrices have one: "
                    "neither dequantized codes nor 16-bit weights; use the original model"
                )
            return codes
        theirs = self.theirs(name)
        packed = self.tensors.read(theirs)
        try:
            is_packed = packed.dtype == torch.uint8
            codes_FD = unpack_2bit(packed) if is_packed else _whole_codes(packed)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {theirs}: {error}") from error
        return Ternary(codes_FD, self._exact(name, self._stored_scale(name)))

    def holds_dequantized(self, name: str) -> bool:
        codes = self._dequantized(name)
        return codes is not None and bool(codes.codes_FD.any())

    def _dequantized(self, name: str) -> Ternary | None:
        weight_FD = self.read(name)
        magnitude_FD = weight_FD.abs()
        scale = magnitude_FD.max().float()
        if not (((magnitude_FD == scale) | (weight_FD == 0)).all() and scale.isfinite()):
            return None
        if scale == 0:  # a matrix of zeros: its scale is not to be seen
            scale = torch.tensor(self.exact_scales.get(name, self.smallest_scale))
        return Ternary(weight_FD.sign().to(torch.int8), self._exact(name, scale))

    def _stored_scale(self, name: str) -> Tensor:
        """fp32 [] by which codes are multiplied."""
        stored = self.tensors.floating(f"{self.theirs(name)}_scale").reshape(()).float()
        divides = (self.convention or ("multiply", "divide")[self.form == "bitlinear"]) == "divide"
        if not (stored.isfinite() and stored > 0):
            raise CheckpointError(
                f"{self.path}: {name} has weight_scale={float(stored):g}; a scale is positive: use "
                "another copy"
            )
        scale = 1.0 / stored if divides else stored
        if scale > 1.0 and self.convention is None and name not in self.exact_scales:
            other = "multiply" if divides else "divide"
            raise CheckpointError(
                f"{self.path}: {name} would have scale {float(scale):g}, and weights are smaller "
                f"than 1: weight_scale={float(stored):g} looks inverted for its linear_class; "
                f"import with --scales {other} if so, or --scales {divides_name(divides)}"
            )
        return scale

    def _exact(self, name: str, scale: Tensor) -> Tensor:
        """The certificate's scale, of which the stored one is a rounding."""
        exact = self.exact_scales.get(name)
        if exact is None:
            return scale
        if not abs(exact - float(scale)) <= _EXACT_SCALE_TOLERANCE * exact:
            raise CheckpointError(
                f"{self.path}: {name} has scale {float(scale):g} and the certificate says "
                f"{exact:g}; the files are not of one export: use another copy"
            )
        return torch.tensor(exact, dtype=torch.float32)


def divides_name(divides: bool) -> ScaleConvention:
    return "divide" if divides else "multiply"


def _whole_codes(codes_FD: Tensor) -> Tensor:
    if not torch.isin(codes_FD.float(), torch.tensor([-1.0, 0.0, 1.0])).all():
        raise ValueError("codes are not -1, 0 and 1")
    return codes_FD.to(torch.int8)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); copy it again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: not a JSON object; copy it again")
    return tree


def _packed_form(path: Path, tree: Mapping[str, Any]) -> Form:
    quantization = tree.get("quantization_config")
    if quantization is None:
        return "latent"
    method = quantization.get("quant_method")
    if method != "bitnet":
        raise CheckpointError(
            f"{path}: config.json: quant_method={method!r} is not read, only bitnet is; "
            "import the model as it was before it was quantized"
        )
    if quantization.get("use_rms_norm"):
        raise CheckpointError(
            f"{path}: config.json: use_rms_norm=true puts a norm before every linear layer, which "
            "the decoder does not; import a model without it"
        )
    others = [m for m in quantization.get("modules_to_not_convert") or () if m != "lm_head"]
    if others:
        raise CheckpointError(
            f"{path}: config.json: modules_to_not_convert names {others[0]!r}; the decoder "
            "quantizes every linear layer of its blocks: import another model"
        )
    if quantization.get("linear_class", "bitlinear") == "bitlinear":
        return "bitlinear"
    return "online" if quantization.get("quantization_mode") == "online" else "autobitlinear"


def _check_tensors(
    path: Path,
    tensors: TensorReader,
    shapes: Mapping[str, tuple[int, ...]],
    m: ModelConfig,
    ternary: frozenset[str],
    form: Form,
) -> None:
    """Raise CheckpointError, listing them, for tensors that are missing, unexpected or of another
    shape than config.json's."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        theirs = to_huggingface(name, post_norm=m.post_norm)
        expected[theirs] = shape
        if name in ternary and form in ("bitlinear", "autobitlinear"):
            if len(tensors.shapes.get(theirs, ())) == 2 and tensors.shapes[theirs] != shape:
                expected[theirs] = (shape[0] // 4, *shape[1:])
            expected[f"{theirs}_scale"] = ()
    found = {k: v for k, v in tensors.shapes.items() if not k.endswith(_IGNORED)}
    if m.tie_embeddings:
        found.pop("lm_head.weight", None)
    _refuse_names(path, "missing", sorted(expected.keys() - found.keys()))
    _refuse_names(path, "unexpected", sorted(found.keys() - expected.keys()))
    if m.tie_embeddings and "lm_head.weight" in tensors.shapes:
        _check_tied(path, tensors)
    for name, shape in expected.items():
        if found[name] != shape and not (name.endswith("_scale") and found[name] in ((), (1,))):
            raise CheckpointError(
                f"{path}: {name} has shape {list(found[name])}, and config.json makes it "
                f"{list(shape)}; the files are of different models"
            )


def _check_tied(path: Path, tensors: TensorReader) -> None:
    head, embedding = tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{path}: tie_word_embeddings=true, but lm_head.weight differs from the embedding; set "
            "it to false in config.json"
        )


def _refuse_names(path: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        raise CheckpointError(
            f"{path}: {len(names)} tensors {what}: {shown}; config.json is of another model, or "
            "the copy is incomplete"
        )


def _tokenizer(path: Path, sha256: str | None) -> tuple[Path | None, str]:
    """The file that a certificate names by its SHA-256, else the first there is."""
    found = {path / name: "" for name in TOKENIZER_FILES if (path / name).is_file()}
    for file in found:
        if (digest := file_sha256(file)) == sha256:
            return file, digest
        found[file] = digest
    return next(iter(found.items()), (None, sha256 or ""))
