"""Hugging Face directories as the beginning of a run: weights only, step 0.

What is read and refused is `bitscale/convert/huggingface_in.py`'s.
"""

import json
from pathlib import Path

from torch import Tensor

from bitscale.convert.huggingface_in import huggingface_source, is_huggingface
from bitscale.errors import CheckpointError
from bitscale.sources.foreign import Tensors

__all__ = ["is_huggingface", "open_huggingface"]

# Keys of `model` that decide what the weights mean and do not show in their shapes.
_STATED = (
    "num_heads",
    "mlp",
    "norm",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
)


def open_huggingface(path: Path, seq_len: int) -> Tensors:
    """The weights in such a directory, for sequences of `seq_len`; one tensor in memory at a time.

    Raises CheckpointError for what our decoder cannot compute, and for packed codes.
    """
    source = huggingface_source(path, seq_len)
    if not source.has_latents:
        raise CheckpointError(
            f"{path}: {source.form}, of which the 16-bit weights are not known; make a checkpoint "
            f"of it with `bitscale import {path} OUT` and resume from OUT"
        )

    def read(name: str, kind: str) -> Tensor:
        assert kind == "master", "there is no optimizer state to read"
        return source.latent(name)

    model = source.model.model_dump(mode="json")
    stated = {f"model.{key}": json.dumps(model[key], sort_keys=True) for key in _STATED}
    if source.tokenizer_sha256:
        stated["tokenizer"] = source.tokenizer_sha256
    return Tensors(
        path=path,
        format=f"Hugging Face ({source.form})",
        shapes=source.shapes,
        read=read,
        step=0,
        adam_steps={},
        stated=stated,
    )
