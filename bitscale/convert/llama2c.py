"""llama2.c's checkpoints (`.bin`, the headerless version 0) as a ModelSource.

    7 int32    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
               (vocab_size < 0: the head has weights of its own)
    fp32       embedding; then, each for all layers: attention norm, wq, wk, wv, wo,
               feed-forward norm, w1 (gate), w2 (down), w3 (up); final norm;
               seq_len x head / 2 cosines and as many sines, unused; the head, if it has its own

Its rotary embedding turns neighbours (2i, 2i + 1) of a head, ours and Hugging Face's the pairs
(i, i + head / 2): rows of wq and wk are reordered.

Shapes: D model width, E head width.
"""

from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitscale.config import ModelConfig, QuantConfig
from bitscale.convert.model_source import (
    ModelSource,
    parameter_shapes,
    ternary_names,
    tokenizer_in,
)
from bitscale.data.corpus import file_sha256
from bitscale.errors import CheckpointError
from bitscale.quant.schedule import SIXTEEN_BIT

_HEADER = np.dtype("<i4")
_HEADER_BYTES = 7 * 4
_MAGIC = 0x616B3432  # "ak42": later versions begin with it
# In the order of the file; `*` stands for the layer.
_BLOCK_TENSORS = (
    "layers.*.attn_norm.weight",
    "layers.*.attn.q.weight",
    "layers.*.attn.k.weight",
    "layers.*.attn.v.weight",
    "layers.*.attn.o.weight",
    "layers.*.mlp_norm.weight",
    "layers.*.mlp.gate.weight",
    "layers.*.mlp.down.weight",
    "layers.*.mlp.up.weight",
)


class _Place(NamedTuple):
    offset: int  # in fp32 numbers, from the end of the header
    shape: tuple[int, ...]


def is_llama2c(path: Path) -> bool:
    return path.suffix == ".bin" and path.is_file()


def llama2c_source(path: Path, seq_len: int | None = None) -> ModelSource:
    """The model of a `.bin` file. CheckpointError if its size is not what its header says."""
    m, file_seq_len = _read_header(path)
    shapes = parameter_shapes(m, QuantConfig())
    places = _places(m, shapes, file_seq_len)
    tokenizer = tokenizer_in(path.parent)
    return ModelSource(
        path=path,
        kind="llama2c",
        form="llama2.c, fp32 weights",
        model=m,
        quant=QuantConfig(),
        dtype="fp32",
        strength=SIXTEEN_BIT,
        step=0,
        tokens=0,
        seq_len=seq_len or file_seq_len,
        reset_attention=False,
        corpora=(),
        config_hash="",
        tokenizer_sha256="" if tokenizer is None else file_sha256(tokenizer),
        tokenizer_file=tokenizer,
        eod_token=None,
        versions={},
        recipe={},
        shapes=shapes,
        ternary_names=ternary_names(m, QuantConfig()),
        read=partial(_read, path, places, m),
    )


def _read_header(path: Path) -> tuple[ModelConfig, int]:
    header = np.fromfile(path, dtype=_HEADER, count=7)
    if header.size == 7 and header[0] == _MAGIC:
        raise CheckpointError(
            f"{path}: version {header[1]} of llama2.c's format, and bitscale reads version 0; "
            "export it with `python export.py --version 0`"
        )
    numbers = header.tolist() if header.size == 7 else [0] * 7
    d, f, num_layers, heads, kv_heads, vocab, seq_len = numbers
    sizes = (d, f, num_layers, heads, kv_heads, abs(vocab), seq_len)
    if min(sizes) < 1 or max(sizes) > 2**24 or d % heads or heads % kv_heads or d // heads % 2:
        raise CheckpointError(
            f"{path}: its first 28 bytes are no llama2.c header ({', '.join(map(str, sizes))}); "
            "name a checkpoint that llama2.c wrote"
        )
    m = ModelConfig(
        vocab_size=abs(vocab),
        num_layers=num_layers,
        d_model=d,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        d_ff=f,
        tie_embeddings=vocab > 0,
    )
    num_parameters = sum(prod(shape) for shape in parameter_shapes(m, QuantConfig()).values())
    expected = _HEADER_BYTES + 4 * (num_parameters + seq_len * (d // heads))
    if path.stat().st_size != expected:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, and its header makes it {expected}; truncated, "
            "or not llama2.c's version 0"
        )
    return m, seq_len


def _places(m: ModelConfig, shapes: dict[str, tuple[int, ...]], seq_len: int) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    offset = 0

    def place(name: str) -> None:
        nonlocal offset
        places[name] = _Place(offset, shapes[name])
        offset += prod(shapes[name])

    place("embed.weight")
    for pattern in _BLOCK_TENSORS:
        for layer in range(m.num_layers):
            place(pattern.replace("*", str(layer)))
    place("norm.weight")
    offset += seq_len * (m.d_model // m.num_heads)  # cosines and sines
    if not m.tie_embeddings:
        place("head.weight")
    return places


def _read(path: Path, places: dict[str, _Place], m: ModelConfig, name: str) -> Tensor:
    offset, shape = places[name]
    start = _HEADER_BYTES + 4 * offset
    numbers = np.fromfile(path, dtype="<f4", count=prod(shape), offset=start)
    tensor = torch.from_numpy(numbers).view(shape)
    return _half_split(tensor, m) if name.endswith(("attn.q.weight", "attn.k.weight")) else tensor


def _half_split(w_FD: Tensor, m: ModelConfig) -> Tensor:
    """Rows of each head from (0, 1, 2, ...) to (0, 2, 4, ..., 1, 3, 5, ...)."""
    pairs = w_FD.view(-1, m.d_model // m.num_heads // 2, 2, w_FD.shape[1])
    return pairs.transpose(1, 2).reshape(w_FD.shape)
