"""Our parameter names and those of Hugging Face's Llama family (Llama, Mistral, Qwen3, BitNet).

ours                              theirs
embed.weight                      model.embed_tokens.weight
layers.0.attn_norm.weight         model.layers.0.input_layernorm.weight
layers.0.attn.{q,k,v,o}.weight    model.layers.0.self_attn.{q,k,v,o}_proj.weight
layers.0.attn.{q,k}_norm.weight   model.layers.0.self_attn.{q,k}_norm.weight
layers.0.attn.sub_norm.weight     model.layers.0.self_attn.attn_sub_norm.weight
layers.0.mlp_norm.weight          model.layers.0.post_attention_layernorm.weight
layers.0.mlp.{gate,up,down}.*     model.layers.0.mlp.{gate,up,down}_proj.*
layers.0.mlp.sub_norm.weight      model.layers.0.mlp.ffn_sub_norm.weight
norm.weight, head.weight          model.norm.weight, lm_head.weight

OLMo 2's norms follow what they are named after (`post_norm`): attn_norm is its
post_attention_layernorm, mlp_norm its post_feedforward_layernorm.
"""

import re

_OUTSIDE = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.sub_norm": "self_attn.attn_sub_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.sub_norm": "mlp.ffn_sub_norm",
}
_INSIDE_POST_NORM = _INSIDE | {
    "attn_norm": "post_attention_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_INSIDE_BACK = {theirs: ours for ours, theirs in _INSIDE.items()}
_INSIDE_POST_NORM_BACK = {theirs: ours for ours, theirs in _INSIDE_POST_NORM.items()}


def to_huggingface(name: str, *, post_norm: bool = False) -> str:
    """Hugging Face's name of our parameter `name`. KeyError if it has none there."""
    module, _, parameter = name.rpartition(".")
    block = re.match(r"layers\.(\d+)\.(.+)", module)
    if block is None:
        return f"{_OUTSIDE[module]}.{parameter}"
    inside = _INSIDE_POST_NORM if post_norm else _INSIDE
    return f"model.layers.{block[1]}.{inside[block[2]]}.{parameter}"


def from_huggingface(name: str, *, post_norm: bool = False) -> str | None:
    """Our name of Hugging Face's parameter `name`; None if we have no such thing."""
    module, _, parameter = name.rpartition(".")
    block = re.match(r"model\.layers\.(\d+)\.(.+)", module)
    if block is None:
        ours = _OUTSIDE_BACK.get(module)
        return None if ours is None else f"{ours}.{parameter}"
    ours = (_INSIDE_POST_NORM_BACK if post_norm else _INSIDE_BACK).get(block[2])
    return None if ours is None else f"layers.{block[1]}.{ours}.{parameter}"
