"""Models in and out of other forms, one file a format."""

from pathlib import Path

from bitscale.checkpoint import resolve
from bitscale.convert.clients import load_from_source
from bitscale.convert.gguf_file import is_gguf
from bitscale.convert.gguf_source import gguf_source
from bitscale.convert.huggingface_in import (
    ScaleConvention,
    huggingface_source,
    is_huggingface,
)
from bitscale.convert.llama2c import is_llama2c, llama2c_source
from bitscale.convert.loaded import LoadedModel, load_checkpoint
from bitscale.convert.model_source import ModelSource, checkpoint_source
from bitscale.convert.packed import export_packed, is_packed, load_packed, packed_source
from bitscale.errors import CheckpointError


def open_source(
    path: Path, *, seq_len: int | None = None, scales: ScaleConvention | None = None
) -> ModelSource:
    """The model that `path` holds, to be written elsewhere; CheckpointError if it holds none.

    `seq_len`, `scales`: of `huggingface_source`.
    """
    if is_huggingface(path):
        return huggingface_source(path, seq_len, scales)
    if scales is not None:
        raise CheckpointError(
            f"--scales {scales} is for Hugging Face directories, and {path} is none; leave it out"
        )
    if is_packed(path):
        return packed_source(path)
    if is_gguf(path):
        return gguf_source(path)
    if is_llama2c(path):
        return llama2c_source(path, seq_len)
    return checkpoint_source(resolve(path))


def load_model(path: Path) -> LoadedModel:
    """The model that `path` holds: an export, a run or checkpoint, a GGUF file, a Hugging Face
    directory or llama2.c's .bin; as a reader of that form computes it."""
    if is_packed(path):
        return load_packed(path)
    if is_gguf(path) or is_huggingface(path) or is_llama2c(path):
        return load_from_source(open_source(path))
    return load_checkpoint(resolve(path))


__all__ = [
    "LoadedModel",
    "ModelSource",
    "export_packed",
    "load_checkpoint",
    "load_model",
    "load_packed",
    "open_source",
]
