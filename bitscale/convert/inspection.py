"""What a file or directory is: kind, architecture, and every tensor's precision, zeros and scale.

Read: our checkpoints, packed and compact exports, Hugging Face directories, safetensors, GGUF,
PyTorch files that hold nothing but tensors, token shards. Nothing in a file is executed.

Tensors are read one after the other. Whatever is stored, `values` says what the numbers are: a
16-bit matrix whose weights are all 0 or ± one number is ternary.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitscale.checkpoint import read_meta, resolve
from bitscale.convert.certificate import CERTIFICATE_NAME, read_certificate
from bitscale.convert.gguf_file import GgufFile, GgufTensor, is_gguf, open_gguf
from bitscale.convert.gguf_source import certificate_of, codes_and_scale
from bitscale.convert.model_source import ModelSource, checkpoint_source
from bitscale.convert.packed import is_packed, packed_source
from bitscale.convert.tensor_reader import weight_files
from bitscale.data.progress import ByteProgress
from bitscale.errors import CheckpointError
from bitscale.quant.pack import unpack_2bit
from bitscale.quant.reference import Ternary

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_SUPPORTED = (
    "a bitscale run, checkpoint or export, a Hugging Face directory, a DeepSpeed or Megatron-core "
    "checkpoint, .safetensors, .gguf, a PyTorch file of plain tensors, and .bin/.idx token shards"
)
_TOKEN_SHARD = (".bin", ".idx")


class TensorFacts(NamedTuple):
    """One tensor."""

    name: str
    stored: str  # F32, BF16, 2-bit, base-3, TQ2_0, ...
    shape: tuple[int, ...]  # logical
    num_bytes: int
    values: str = ""  # ternary, NaN or infinity; "": others, or not read
    zeros: float | None = None  # share of weights
    scale: float | None = None  # of ternary values

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Description:
    """What was found; `facts` in the order to be shown."""

    path: Path
    kind: str
    facts: dict[str, Any]
    tensors: list[TensorFacts]
    certificate: dict[str, Any] | None = None

    def to_tree(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            **self.facts,
            "certificate": self.certificate,
            "tensors": [tensor._asdict() for tensor in self.tensors],
        }


@dataclass
class Listed:
    """Tensors that are known and may be read."""

    facts: list[TensorFacts] = field(default_factory=list)
    readers: list[Callable[[], "Tensor | Ternary | None"]] = field(default_factory=list)

    def add(self, facts: TensorFacts, read: "Callable[[], Tensor | Ternary | None]") -> None:
        self.facts.append(facts)
        self.readers.append(read)


# Kind, facts, tensors, certificate.
Opened = tuple[str, dict[str, Any], Listed, dict[str, Any] | None]


def inspect(path: Path, *, read_values: bool = True) -> Description:
    """Describe `path`; without `read_values` only headers are read.

    Raises CheckpointError if it is of no supported kind, damaged, or a pickle that holds more
    than tensors.
    """
    if not path.exists() and not path.with_name(f"{path.name}.idx").exists():
        raise CheckpointError(f"{path} does not exist; name {_SUPPORTED}")
    return describe(path, _open(path), read_values=read_values)


def describe(path: Path, opened: Opened, *, read_values: bool) -> Description:
    """What was opened, with sums; the tensors' values are read one after the other."""
    kind, facts, listed, certificate = opened
    tensors = listed.facts
    if read_values:
        tensors = list(_with_values(path, listed))
    total = sum(tensor.num_weights for tensor in tensors)
    if tensors:
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        facts |= {"weights": total, "bytes": num_bytes}
        facts["bits_per_weight"] = round(8 * num_bytes / max(total, 1), 3)
    return Description(path, kind, facts, tensors, certificate)


def _open(path: Path) -> Opened:
    if is_gguf(path):
        return _gguf(path)
    if path.suffix == ".safetensors" and path.is_file():
        return "safetensors file", _file_metadata(path), _safetensors([path]), None
    if path.suffix in _TOKEN_SHARD and path.with_suffix(".idx").is_file():
        return _token_shard(path.with_suffix(""))
    if path.is_file():
        return "PyTorch file of tensors", {}, _pickled(path), None
    if not path.is_dir():
        return _token_shard(path)
    if is_packed(path):
        return _export(path)
    if (path / "config.json").is_file():
        return _huggingface(path)
    return _checkpoint(path)


def _with_values(path: Path, listed: Listed) -> Iterator[TensorFacts]:
    with ByteProgress(f"reading {path.name}", sum(f.num_bytes for f in listed.facts)) as progress:
        for facts, read in zip(listed.facts, listed.readers, strict=True):
            yield facts._replace(**values_of(read()))
            progress.add(facts.num_bytes)


def values_of(content: Tensor | Ternary | None) -> dict[str, Any]:
    """`values`, `zeros` and `scale` of TensorFacts."""
    if content is None:
        return {}
    if isinstance(content, Ternary):
        zeros = float((content.codes_FD == 0).float().mean())
        scale = float(content.scale) if content.scale.numel() == 1 else None
        return {"values": "ternary", "zeros": zeros, "scale": scale}
    if not content.is_floating_point() or not content.numel():
        return {}
    if content.itemsize == 1:  # 8-bit floats, which PyTorch stores and does not compute with
        content = content.float()
    if not bool(torch.isfinite(content).all()):
        return {"values": "NaN or infinity"}
    zeros = float((content == 0).float().mean())
    magnitudes = content[content != 0].abs() if content.dim() == 2 else content[:0]
    if magnitudes.numel() and bool(magnitudes.min() == magnitudes.max()):
        return {"values": "ternary", "zeros": zeros, "scale": float(magnitudes.max())}
    return {"zeros": zeros}


# --- Kinds ---


_MOMENTS = {
    "adamw": "AdamW, two moments (8 bytes a weight more)",
    "lion": "Lion, one moment (4 bytes a weight more)",
}


def _checkpoint(path: Path) -> Opened:
    try:
        found = resolve(path)
    except CheckpointError as error:
        if (path / "meta.json").is_file() or (path / "checkpoints").is_dir():
            raise
        raise CheckpointError(f"{path} cannot be inspected; name {_SUPPORTED}") from error
    meta, source = read_meta(found), checkpoint_source(found)
    listed = Listed()
    for name, shape in source.shapes.items():
        facts = TensorFacts(name, "F32 master", shape, 4 * prod(shape))
        ternary = source.is_ternary and name in source.ternary_names
        listed.add(facts, _reader(source, name, ternary))
    facts_of = _model_facts(source) | {
        "checkpoint": found.name,
        "lambda": f"{meta.lambda_weight:g} weights, {meta.lambda_activation:g} activations",
        "optimizer_state": _MOMENTS[source.recipe["optim"].get("name", "adamw")],
        "saved_by": f"{meta.world_size} ranks",
    }
    return "bitscale checkpoint", facts_of, listed, None


def _export(path: Path) -> Opened:
    source = packed_source(path)
    listed, bits = Listed(), "2-bit" if source.kind == "packed" else "base-3"
    file = _raw_bytes(path / "model.safetensors")
    for name, shape in source.shapes.items():
        ternary = name in source.ternary_names
        stored = bits if ternary else {"bf16": "BF16", "fp32": "F32"}[source.dtype]
        listed.add(TensorFacts(name, stored, shape, file[name]), _reader(source, name, ternary))
    return f"bitscale {source.kind} export", _model_facts(source), listed, read_certificate(path)


def _reader(source: ModelSource, name: str, ternary: bool) -> Callable[[], Tensor | Ternary]:
    return lambda: source.ternary(name) if ternary else source.latent(name)


def _model_facts(source: ModelSource) -> dict[str, Any]:
    m, recipe = source.model, source.recipe
    facts: dict[str, Any] = {
        "architecture": f"{m.num_layers} layers of {m.d_model}, {m.num_heads} heads "
        f"({m.num_kv_heads or m.num_heads} key/value), d_ff {m.d_ff} {m.mlp}, vocabulary "
        f"{m.vocab_size}, {'tied' if m.tie_embeddings else 'untied'} head"
        + ", SubLN" * bool(m.sub_norm)
        + ", q/k norm" * bool(m.qk_norm)
        + ", biases" * bool(m.bias),
        "quantizer": source.quant.preset,
        "step": source.step,
        "tokens": source.tokens,
        "config_hash": source.config_hash,
        "tokenizer_sha256": source.tokenizer_sha256,
    }
    if "transition" in recipe:
        facts["transition"] = json.dumps(recipe["transition"].get("at"))
    return facts


def _gguf(path: Path) -> Opened:
    file = open_gguf(path)
    certificate = certificate_of(file)
    metadata = {
        key: value
        for key, value in file.metadata.items()
        if isinstance(value, str | int | float) and key != "bitscale.certificate"
    }
    facts: dict[str, Any] = {
        "gguf_version": file.version,
        "architecture": metadata.pop("general.architecture", None),
    }
    listed = Listed()
    for tensor in file.tensors.values():
        facts_of = TensorFacts(tensor.name, tensor.type.name, tensor.shape, tensor.num_bytes)
        listed.add(facts_of, _gguf_reader(file, tensor))
    return "GGUF file", facts | {"metadata": metadata}, listed, certificate


_GGUF_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _gguf_reader(file: GgufFile, tensor: GgufTensor) -> Callable[[], Tensor | Ternary | None]:
    def read() -> Tensor | Ternary | None:
        if tensor.type.name in _GGUF_FLOATS:
            dtype = _GGUF_FLOATS[tensor.type.name]
            return file.bytes_of(tensor).view(dtype).view(tensor.shape)
        if tensor.type.name not in ("TQ1_0", "TQ2_0", "I2_S") or len(tensor.shape) != 2:
            return None
        try:
            codes_FD, scale = codes_and_scale(file, tensor, common=False)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {tensor.name}: {error}") from error
        return Ternary(codes_FD, scale)

    return read


def _huggingface(path: Path) -> Opened:
    try:
        tree = json.loads((path / "config.json").read_text())
        assert isinstance(tree, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not a JSON object ({error})") from error
    facts: dict[str, Any] = {"architecture": ", ".join(tree.get("architectures") or ["?"])}
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "intermediate_size", "vocab_size", "hidden_act",
                "tie_word_embeddings", "quantization_config"):  # fmt: skip
        if tree.get(key) is not None:
            facts[key] = tree[key]
    # Beside the model there may be a second copy (consolidated.safetensors), or other things
    # (training_args.bin).
    files = sorted(weight_files(path)) or sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("*.bin"))
    listed = _safetensors(file for file in files if file.suffix != ".bin")
    for file in (file for file in files if file.suffix == ".bin"):
        pickled = _pickled(file)
        listed.facts += pickled.facts
        listed.readers += pickled.readers
    if not listed.facts:
        raise CheckpointError(f"{path}: config.json, but no *.safetensors or *.bin with weights")
    certificate = read_certificate(path) if (path / CERTIFICATE_NAME).is_file() else None
    return "Hugging Face directory", facts, listed, certificate


def _token_shard(prefix: Path) -> Opened:
    from bitscale.data.shards import TokenShard

    shard = TokenShard(prefix)
    facts = {
        "tokens": shard.num_tokens,
        "documents": shard.num_documents,
        "dtype": shard.dtype.name,
        "largest_id": int(shard.tokens(0, shard.num_tokens).max()) if shard.num_tokens else None,
    }
    return "Megatron token shard", facts, Listed(), None


# --- Files of tensors ---


def _safetensors(paths: Iterable[Path]) -> Listed:
    """Of several files; a uint8 matrix with a `_scale` beside it is one of packed 2-bit codes."""
    listed = Listed()
    for path in paths:
        sizes = _raw_bytes(path)
        try:
            file: Any = safe_open(path, framework="pt")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        for name, part in slices.items():
            shape, stored = tuple(part.get_shape()), str(part.get_dtype())
            if stored == "U8" and len(shape) == 2 and f"{name}_scale" in slices:
                facts = TensorFacts(name, "2-bit", (4 * shape[0], shape[1]), sizes[name])
                listed.add(facts, _packed_reader(path, file, name))
            else:
                listed.add(TensorFacts(name, stored, shape, sizes[name]), _file_reader(file, name))
    return listed


def _file_reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def _packed_reader(path: Path, file: Any, name: str) -> Callable[[], Ternary]:
    def read() -> Ternary:
        try:
            return Ternary(unpack_2bit(file.get_tensor(name)), file.get_tensor(f"{name}_scale"))
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error

    return read


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size - 8:
                raise ValueError(f"its header claims {size} bytes and the file ends before")
            header: dict[str, Any] = json.loads(file.read(size))
            if not all(isinstance(entry, dict) for entry in header.values()):
                raise ValueError("its header does not describe tensors")
            return header
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def _raw_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor in a safetensors file."""
    header = _header(path)
    try:
        ranges: Mapping[str, list[int]] = {
            name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
        }
        return {name: end - start for name, (start, end) in ranges.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _file_metadata(path: Path) -> dict[str, Any]:
    metadata = _header(path).get("__metadata__") or {}
    return {"metadata": metadata} if metadata else {}


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or not a safetensors file ({error}); copy it again")


def _pickled(path: Path) -> Listed:
    try:
        mapped = zipfile.is_zipfile(path)  # older ones are one pickle, read whole
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler of hostile bytes raises anything
        raise CheckpointError(
            f"{path}: not a file of plain tensors ({_reason(error)}); a pickle may run code, so "
            f"nothing else in one is read: name {_SUPPORTED}"
        ) from error
    listed = Listed()
    for name, tensor in _tensors_in("", content):
        stored = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        facts = TensorFacts(name, stored, tuple(tensor.shape), tensor.nbytes)
        listed.add(facts, lambda tensor=tensor: tensor)  # type: ignore[misc]
    if not listed.facts:
        raise CheckpointError(f"{path}: a PyTorch file without any tensor")
    return listed


def _tensors_in(prefix: str, content: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors_in(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _tensors_in(f"{prefix}.{i}" if prefix else str(i), value)


def _reason(error: Exception) -> str:
    """What the unpickler refused, of its long advice."""
    text = " ".join(str(error).split())
    found = re.search(r"(Unsupported (?:global|class|operand)[^.]*\.?[\w.]*)", text)
    if isinstance(error, pickle.UnpicklingError) and found:
        return found[1].strip()
    return text[:160] or type(error).__name__
