"""Where our parameters are in checkpoints of other programs.

Three families of names are known: our own (someone trained our Decoder elsewhere), Hugging Face's
Llama family, and megatron-core's GPTModel, whose linear_qkv holds, for each key/value head, the
rows of its queries, its keys and its values, and whose linear_fc1 the gate above the up projection.

Shapes: E head width.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitscale.config import ModelConfig
from bitscale.convert.megatron_names import FC1, FUSED_NORMS, INSIDE, OUTSIDE, QKV, part_of_qkv
from bitscale.convert.names import to_huggingface
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import is_scale
from bitscale.model.norms import is_sub_norm

Shape = tuple[int, ...]
_LISTED = 6  # names in an error

# Not parameters, or a tied head's second name.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|_extra_state|^rng_state|attn\.rotary")
_TIED = {
    "head.weight": "embed.weight",
    "lm_head.weight": "model.embed_tokens.weight",
    "output_layer.weight": "embedding.word_embeddings.weight",
}


def _all(tensor: Tensor) -> Tensor:
    return tensor


class Place(NamedTuple):
    """One of our parameters in a foreign checkpoint."""

    tensor: str  # there
    shape: Shape  # that it has to have there
    take: Callable[[Tensor], Tensor] = _all  # our part of it


def find_places(
    shapes: Mapping[str, Shape], theirs: Mapping[str, Shape], m: ModelConfig, path: Path
) -> dict[str, Place]:
    """Where each parameter of `shapes` is among the tensors of `theirs`.

    What begins with the transition may be missing: learned scales, and SubLN that waits for it.

    Raises CheckpointError for other shapes, and then for missing and unexpected tensors.
    """
    prefix = _wrapper(theirs)
    inside = {tensor.removeprefix(prefix) for tensor in theirs}
    places = {name: _place(name, shape, inside, m) for name, shape in shapes.items()}
    places = {name: p._replace(tensor=prefix + p.tensor) for name, p in places.items()}
    for name, place in places.items():
        found = theirs.get(place.tensor)
        if found is not None and tuple(found) != tuple(place.shape):
            raise CheckpointError(
                f"{path}: {place.tensor} has shape {list(found)} there and {list(place.shape)} "
                f"here ({name}); set the model section to the checkpoint's{_padding(name, found)}"
            )
    missing = [name for name, place in places.items() if place.tensor not in theirs]
    waits = m.sub_norm == "transition"
    required = [
        places[name].tensor
        for name in missing
        if not is_scale(name) and not (waits and is_sub_norm(name))
    ]
    used = {place.tensor for place in places.values()}
    spare = dict(tied_copies(theirs)) if m.tie_embeddings else {}
    unexpected = [t for t in theirs if t not in used | spare.keys() and not _IGNORED.search(t)]
    if required or unexpected:
        raise CheckpointError(
            f"{path}: not the model of this configuration: missing {_listed(required)}; unexpected "
            f"{_listed(unexpected)}; set the model section to the checkpoint's, or use another"
        )
    return {name: place for name, place in places.items() if place.tensor in theirs}


def tied_copies(theirs: Collection[str]) -> Iterator[tuple[str, str]]:
    """(a head, the embedding) of those that `theirs` has both."""
    prefix = _wrapper(theirs)
    for copy, original in _TIED.items():
        if prefix + copy in theirs and prefix + original in theirs:
            yield prefix + copy, prefix + original


def _wrapper(theirs: Collection[str]) -> str:
    """What a wrapping module puts before every name, such as `module.`; "" if none does."""
    for tensor in theirs:
        for embedding in _TIED.values():
            if tensor.endswith(f".{embedding}"):
                return tensor.removesuffix(embedding)
    return ""


def _padding(name: str, found: Shape) -> str:
    if name not in ("embed.weight", "head.weight"):
        return ""
    return f" (model.vocab_size={found[0]}; Megatron-LM pads the vocabulary)"


def _listed(names: Collection[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "none") + more


def _place(name: str, shape: Shape, theirs: Collection[str], m: ModelConfig) -> Place:
    if "embedding.word_embeddings.weight" in theirs:
        return _in_megatron(name, shape, theirs, m)
    if "model.embed_tokens.weight" in theirs:
        try:
            return Place(to_huggingface(name, post_norm=m.post_norm), shape)
        except KeyError:
            pass
    return Place(name, shape)


# --- megatron-core ---


def _in_megatron(name: str, shape: Shape, theirs: Collection[str], m: ModelConfig) -> Place:
    module, _, parameter = name.rpartition(".")
    block = re.match(r"layers\.(\d+)\.(.+)", module)
    if block is None:
        return Place(f"{OUTSIDE.get(module, module)}.{parameter}", shape)
    layer, role = f"decoder.layers.{block[1]}", block[2]
    if role in ("attn.q", "attn.k", "attn.v"):
        kv_heads = m.num_kv_heads or m.num_heads
        head_width = m.d_model // m.num_heads
        rows = (m.num_heads + 2 * kv_heads) * head_width
        take = partial(part_of_qkv, role=role[-1], kv_heads=kv_heads, head_width=head_width)
        return Place(f"{layer}.{QKV}.{parameter}", (rows, *shape[1:]), take)
    if role in ("mlp.gate", "mlp.up"):
        return _of_fc1(f"{layer}.{FC1}.{parameter}", role, shape, theirs, m)
    fused = f"{layer}.{FUSED_NORMS.get(role, '')}_{parameter}"
    if role in FUSED_NORMS and fused in theirs:
        return Place(fused, shape)
    return Place(f"{layer}.{INSIDE.get(role, role)}.{parameter}", shape)


def _of_fc1(tensor: str, role: str, shape: Shape, theirs: Collection[str], m: ModelConfig) -> Place:
    half = f"{tensor}_{'w' if role == 'mlp.gate' else 'v'}"
    if half in theirs:  # saved apart
        return Place(half, shape)
    if m.mlp == "relu2":
        return Place(tensor, shape)
    first = 0 if role == "mlp.gate" else shape[0]
    take = partial(torch.narrow, dim=0, start=first, length=shape[0])
    return Place(tensor, (2 * shape[0], *shape[1:]), take)
