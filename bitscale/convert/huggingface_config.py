"""Our ModelConfig as a Hugging Face `config.json`, and back.

Which family can hold a model follows from its norms and biases. What a family cannot hold, or the
decoder cannot compute, is refused by name, never dropped.
"""

from collections.abc import Mapping
from typing import Any, Literal

from bitscale.config import ModelConfig, RopeScaling
from bitscale.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "bitnet"]
CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "bitnet": "BitNetForCausalLM",
}
_OLMO_EPS = 1e-5  # not in its config.json
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "relu2": "relu2_glu"}
_THETA = {"bitnet": 500000.0}  # transformers' defaults; other families: 10000


def family_of(m: ModelConfig) -> Family:
    """The family that computes this model. CheckpointError, naming what no family has."""
    if m.mlp == "relu2":
        raise _unheld("model.mlp='relu2' (a feed-forward without gate)")
    if m.post_norm or m.qk_norm == "width":
        return _olmo2(m)
    if m.norm == "layernorm":
        if m.norm_affine:
            raise _unheld("model.norm='layernorm' with weights")
        if m.norm_eps != _OLMO_EPS:
            raise _unheld(f"model.norm='layernorm' with norm_eps={m.norm_eps:g} (OLMo's is 1e-5)")
        _refuse_together(m, "OLMo's norm", qk_norm=bool(m.qk_norm), bias=bool(m.bias))
        return "olmo"
    if m.sub_norm == "transition":
        raise _unheld("a SubLN that is still coming in (model.sub_norm='transition' in its ramp)")
    if m.sub_norm:
        mlp_bias = m.bias is True or m.bias == "qkv"
        _refuse_together(m, "model.sub_norm=true", qk_norm=bool(m.qk_norm), bias=mlp_bias)
        return "bitnet"
    if m.qk_norm:
        _refuse_together(m, "model.qk_norm=true", bias=m.bias in (True, "qkv"))
        return "qwen3"
    return "qwen2" if m.bias == "qkv" else "llama"


def _olmo2(m: ModelConfig) -> Family:
    if not (m.post_norm and m.qk_norm == "width"):
        raise _unheld(f"model.post_norm={m.post_norm} with model.qk_norm={m.qk_norm!r}")
    layernorm, bias = m.norm == "layernorm", bool(m.bias)
    _refuse_together(
        m, "model.post_norm=true", sub_norm=bool(m.sub_norm), norm=layernorm, bias=bias
    )
    return "olmo2"


def to_huggingface_config(m: ModelConfig, *, dtype: str, seq_len: int) -> dict[str, Any]:
    """The architecture's part of config.json. Raises CheckpointError as `family_of`."""
    family = family_of(m)
    config: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "intermediate_size": m.d_ff,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads or m.num_heads,
        "head_dim": m.d_model // m.num_heads,
        "hidden_act": "silu" if m.mlp == "swiglu" else "relu2",
        "max_position_embeddings": seq_len,
        "initializer_range": m.init_std,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_bias": m.bias is not False,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],  # until transformers 4.55
        **_rope_to(m),
    }
    if family != "olmo":
        config["rms_norm_eps"] = m.norm_eps
    if family == "llama":
        config["mlp_bias"] = m.bias is True
    return config


def from_huggingface_config(tree: Mapping[str, Any], seq_len: int) -> ModelConfig:
    """The ModelConfig that computes what the `config.json` describes, on `seq_len` tokens at most.

    Raises CheckpointError for what the decoder cannot compute, by key and value.
    """
    family = tree.get("model_type")
    if family not in CLASSES:
        raise CheckpointError(
            f"config.json: model_type {family!r} is not one that bitscale reads "
            f"({', '.join(CLASSES)}); convert the model to one of them, if it is one"
        )
    _refuse_features(tree, seq_len)
    d_model, num_heads = _whole(tree, "hidden_size"), _whole(tree, "num_attention_heads")
    head_width = tree.get("head_dim") or (128 if family == "qwen3" else d_model // num_heads)
    if head_width * num_heads != d_model:
        raise _uncomputable(f"head_dim={head_width} x {num_heads} heads != hidden_size={d_model}")
    activation = tree.get("hidden_act", "relu2" if family == "bitnet" else "silu")
    if activation not in _ACTIVATIONS:
        raise _uncomputable(f"hidden_act={activation!r}")
    theta, scaling = _rope_from(tree, _THETA.get(family, 10000.0))
    kv_heads = tree.get("num_key_value_heads")
    m = ModelConfig(
        vocab_size=_whole(tree, "vocab_size"),
        num_layers=_whole(tree, "num_hidden_layers"),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=None if kv_heads in (None, num_heads) else kv_heads,
        d_ff=_whole(tree, "intermediate_size"),
        mlp=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm="layernorm" if family == "olmo" else "rmsnorm",
        norm_affine=family != "olmo",
        norm_eps=_OLMO_EPS if family == "olmo" else float(_needed(tree, "rms_norm_eps")),
        rope_theta=theta,
        rope_scaling=scaling,
        sub_norm=family == "bitnet",
        qk_norm="width" if family == "olmo2" else family == "qwen3",
        post_norm=family == "olmo2",
        tie_embeddings=bool(tree.get("tie_word_embeddings", False)),
        bias=_bias_from(tree),
        init_std=float(tree.get("initializer_range", 0.02)) or 0.02,
    )
    if num_heads % (m.num_kv_heads or num_heads):
        raise _uncomputable(f"num_key_value_heads={m.num_kv_heads} for {num_heads} heads")
    return m


def _refuse_features(tree: Mapping[str, Any], seq_len: int) -> None:
    window = tree.get("sliding_window")
    if not tree.get("use_sliding_window", tree["model_type"] == "mistral"):
        window = None
    if window is not None and window < seq_len:
        raise CheckpointError(
            f"config.json: sliding_window={window} is shorter than the {seq_len} tokens of a "
            f"sequence, and the decoder attends to all of them; import with --seq-len {window}"
        )
    if tree.get("clip_qkv") is not None:
        raise _uncomputable(f"clip_qkv={tree['clip_qkv']}")
    for key in ("num_experts", "num_local_experts"):
        if tree.get(key):
            raise _uncomputable(f"{key}={tree[key]} (a mixture of experts)")


def _bias_from(tree: Mapping[str, Any]) -> bool | Literal["attention", "qkv"]:
    if tree["model_type"] == "qwen2":
        return "qkv"
    attention, mlp = bool(tree.get("attention_bias")), bool(tree.get("mlp_bias"))
    if mlp and not attention:
        raise _uncomputable("mlp_bias=true without attention_bias")
    return "attention" if attention and not mlp else mlp


def _rope_to(m: ModelConfig) -> dict[str, Any]:
    """As transformers 5 has it, and under the keys of before (`rope_theta`, `rope_scaling`)."""
    scaling = m.rope_scaling
    if scaling is None:
        rope: dict[str, Any] = {"rope_type": "default"}
    elif scaling.type == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    else:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    older = {} if scaling is None else {"rope_scaling": {**rope, "rope_theta": m.rope_theta}}
    parameters = {**rope, "rope_theta": m.rope_theta}
    return {"rope_parameters": parameters, "rope_theta": m.rope_theta, **older}


def _rope_from(tree: Mapping[str, Any], default: float) -> tuple[float, RopeScaling | None]:
    parameters = {**(tree.get("rope_scaling") or {}), **(tree.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta") or tree.get("rope_theta") or default)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    for place in (parameters, tree):
        partial = place.get("partial_rotary_factor")
        if partial not in (None, 1, 1.0):
            raise _uncomputable(f"partial_rotary_factor={partial}")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(type="linear", factor=float(_needed(parameters, "factor")))
    if kind != "llama3":
        raise _uncomputable(f"rope_type={kind!r}")
    return theta, RopeScaling(
        type="llama3",
        factor=float(_needed(parameters, "factor")),
        low_freq_factor=float(_needed(parameters, "low_freq_factor")),
        high_freq_factor=float(_needed(parameters, "high_freq_factor")),
        original_context=int(_needed(parameters, "original_max_position_embeddings")),
    )


def _needed(tree: Mapping[str, Any], key: str) -> Any:
    if tree.get(key) is None:
        raise CheckpointError(f"config.json has no {key!r}; complete it from the model's publisher")
    return tree[key]


def _whole(tree: Mapping[str, Any], key: str) -> int:
    value = _needed(tree, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json: {key}={value!r} is not a positive whole number; mend it"
        )
    return value


def _refuse_together(m: ModelConfig, what: str, **features: bool) -> None:
    for name, present in features.items():
        if present:
            raise _unheld(f"{what} together with model.{name}={getattr(m, name)!r}")


def _unheld(what: str) -> CheckpointError:
    return CheckpointError(
        f"no Hugging Face architecture has {what}; --format packed holds any shape"
    )


def _uncomputable(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: the decoder cannot compute {what}; import a model without it"
    )
