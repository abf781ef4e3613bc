"""Our parameters in megatron-core's GPTModel, whose linear_qkv and linear_fc1 fuse several of them.

ours                              theirs
embed.weight                      embedding.word_embeddings.weight
layers.0.attn_norm.weight         decoder.layers.0.input_layernorm.weight, in a checkpoint
                                  decoder.layers.0.self_attention.linear_qkv.layer_norm_weight
layers.0.attn.{q,k,v}.*           decoder.layers.0.self_attention.linear_qkv.*
layers.0.attn.o.*                 decoder.layers.0.self_attention.linear_proj.*
layers.0.attn.{q,k}_norm.weight   decoder.layers.0.self_attention.{q,k}_layernorm.weight
layers.0.mlp_norm.weight          decoder.layers.0.pre_mlp_layernorm.weight, in a checkpoint
                                  decoder.layers.0.mlp.linear_fc1.layer_norm_weight
layers.0.mlp.{gate,up}.*          decoder.layers.0.mlp.linear_fc1.*, gate above up
layers.0.mlp.down.*               decoder.layers.0.mlp.linear_fc2.*
norm.weight, head.weight          decoder.final_layernorm.weight, output_layer.weight

linear_qkv holds, for each key/value head, the queries that share it, its keys and its values.

Shapes: leading dimension rows, then whatever a weight or a bias has.
"""

import torch
from torch import Tensor

OUTSIDE = {
    "embed": "embedding.word_embeddings",
    "norm": "decoder.final_layernorm",
    "head": "output_layer",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn.o": "self_attention.linear_proj",
    "attn.q_norm": "self_attention.q_layernorm",
    "attn.k_norm": "self_attention.k_layernorm",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp.down": "mlp.linear_fc2",
}
QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
# Transformer Engine's layer spec keeps a norm in the linear layer that it feeds, and megatron-core
# saves the local spec's under the same keys.
FUSED_NORMS = {"attn_norm": f"{QKV}.layer_norm", "mlp_norm": f"{FC1}.layer_norm"}


def fused_qkv(q: Tensor, k: Tensor, v: Tensor, *, kv_heads: int) -> Tensor:
    """linear_qkv's rows: q ... q k v of each key/value head."""
    parts = [t.view(kv_heads, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def part_of_qkv(fused: Tensor, *, role: str, kv_heads: int, head_width: int) -> Tensor:
    """The rows of the queries ("q"), keys ("k") or values ("v") of a linear_qkv."""
    groups = fused.view(kv_heads, -1, *fused.shape[1:])
    num_queries = groups.shape[1] - 2 * head_width
    start = {"q": 0, "k": num_queries, "v": num_queries + head_width}[role]
    size = num_queries if role == "q" else head_width
    return groups[:, start : start + size].flatten(0, 1)
