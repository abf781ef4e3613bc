"""Megatron-core's `torch_dist` checkpoints of a GPTModel, as Megatron-LM saves them.

    .metadata, __R_W.distcp     tensors (torch_dist.py)
    common.pt                   iteration, Adam's step count, Megatron-LM's arguments
    metadata.json               {"sharded_backend": "torch_dist", ...}

Keys: `decoder.layers.ROLE` holds all layers, stacked along a first dimension, or each layer is a
key of its own, `decoder.layers.3.ROLE`. `optimizer.state.KIND.KEY` are of the key's shape; KIND is
exp_avg, exp_avg_sq, and for the fp32 master fp32_param (optimizer of 16-bit parameters) or
param (distributed optimizer, `fully_reshardable`); an fp32 model is its own master. Tensor and
pipeline parallelism do not show: every tensor is whole.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitscale.data.corpus import file_sha256
from bitscale.errors import CheckpointError
from bitscale.sources.foreign import Tensors
from bitscale.sources.pickles import Inert, load_tensors
from bitscale.sources.torch_dist import TorchDist

# Of Megatron-LM's arguments, beside numbers and text. Nothing of them is imported (pickles.py).
_HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "megatron.*",
    "pathlib.*Path",
    "signal.Signals",
)
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_MASTERS = ("optimizer.state.fp32_param.", "optimizer.state.param.")


class _Key(NamedTuple):
    """A tensor of the model: in the checkpoint, and which layer of it."""

    key: str
    layer: int | None = None


def is_megatron(path: Path) -> bool:
    """Whether `path` is a directory of torch's distributed checkpoint format."""
    return (path / ".metadata").is_file()


def open_megatron(path: Path) -> Tensors:
    """The state in such a directory. CheckpointError if it is damaged, or saved in a form that
    does not tell names."""
    common = _load_common(path)
    found = TorchDist(path)
    _refuse_buckets(path, found)
    keys = dict(_model_keys(found))
    shapes = {
        name: found.shapes[at.key] if at.layer is None else found.shapes[at.key][1:]
        for name, at in keys.items()
    }
    has_moments = any(key.startswith("optimizer.state.") for key in found.shapes)

    def read(name: str, kind: str) -> Tensor:
        at = keys[name]
        if kind == "master":
            key = _master_key(found, at.key, has_moments)
        else:
            key = f"optimizer.state.{kind}.{at.key}"
        if found.shapes.get(key) != found.shapes[at.key]:
            raise CheckpointError(
                f"{path}: {key} is {_shown(found, key)}, {at.key} is {_shown(found, at.key)}; "
                "the optimizer is not Adam, or saved flat by an older Megatron-core: load it "
                "there and save it once with --dist-ckpt-optim-fully-reshardable"
            )
        return found.read(key, at.layer)

    step = _iteration(path, common)
    args = common.get("args")
    count = _adam_step(path, common) if has_moments else 0
    stated = _stated(args, path) if isinstance(args, Inert) else {}
    embedding = _embedding(path, shapes)
    return Tensors(
        path=path,
        format="Megatron-core torch_dist",
        shapes=shapes,
        read=read,
        step=step,
        adam_steps=dict.fromkeys(shapes, count) if has_moments else {},
        stated=stated,
        model=_model(args, shapes[embedding][0]) if isinstance(args, Inert) else {},
        dtype="bf16" if found.dtype(embedding) == torch.bfloat16 else "fp32",
    )


def _load_common(path: Path) -> Mapping[str, Any]:
    description = path / "metadata.json"
    try:
        backend = json.loads(description.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{description}: missing or damaged ({error}); only distributed checkpoints that "
            "Megatron-core wrote are known"
        ) from error
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path}: saved as {backend!r}; save with --ckpt-format torch_dist, or convert it "
            "with Megatron-LM"
        )
    file = path / "common.pt"
    common = load_tensors(file, file, _HARMLESS)
    if not isinstance(common, dict):
        raise CheckpointError(f"{file}: holds {type(common).__name__}, not Megatron's common state")
    return common


def _refuse_buckets(path: Path, found: TorchDist) -> None:
    for key in found.shapes:
        if re.match(r"(chained_\d+\.)?optimizer\.distributed\.", key):
            raise CheckpointError(
                f"{path}: its optimizer state is saved by buckets ({key}), which do not tell "
                "parameters apart; save it once with --dist-ckpt-optim-fully-reshardable"
            )


def _model_keys(found: TorchDist) -> Mapping[str, _Key]:
    """The model's tensors, one name a layer."""
    keys = {}
    for key, shape in found.shapes.items():
        if key.startswith("optimizer."):
            continue
        stacked = _STACKED.fullmatch(key)
        if stacked is None:
            keys[key] = _Key(key)
            continue
        for layer in range(shape[0]):
            keys[f"decoder.layers.{layer}.{stacked[1]}"] = _Key(key, layer)
    return keys


def _master_key(found: TorchDist, key: str, has_moments: bool) -> str:
    for prefix in _MASTERS:
        if prefix + key in found.shapes:
            return prefix + key
    if has_moments and found.dtype(key) != torch.float32:
        raise CheckpointError(
            f"{found.path}: {key} is {found.dtype(key)} and its fp32 master is not there; save "
            "it without --use-precision-aware-optimizer"
        )
    return key


def _shown(found: TorchDist, key: str) -> str:
    return str(list(found.shapes[key])) if key in found.shapes else "missing"


def _embedding(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    for key in shapes:
        if key.endswith("word_embeddings.weight"):
            return key
    raise CheckpointError(
        f"{path}: no embedding.word_embeddings.weight in it, so not of a GPTModel; use another "
        "checkpoint"
    )


def _iteration(path: Path, common: Mapping[str, Any]) -> int:
    if "iteration" in common:
        return int(common["iteration"])
    match = re.fullmatch(r"iter_(\d+)", path.name)
    if match is None:
        raise CheckpointError(f"{path}/common.pt: does not say its iteration; use another")
    return int(match[1])


def _adam_step(path: Path, common: Mapping[str, Any]) -> int:
    """Adam's count, one for all parameters."""
    state: Any = common.get("optimizer", {})
    while isinstance(state, dict):
        if "common_step" in state.get("state", {}):
            return int(state["state"]["common_step"])
        for group in state.get("param_groups", ()):
            if "step" in group:
                return int(group["step"])
        # A layer down: of the precision's wrapper, or the first of several chained optimizers.
        state = state.get("optimizer", state.get(0))
    raise CheckpointError(
        f"{path}/common.pt: does not say how many steps Adam has done; use another checkpoint"
    )


def _stated(args: Inert, path: Path) -> dict[str, str]:
    """What Megatron-LM's arguments say, by the keys of run.identity."""
    _refuse_other_models(args, path)
    stated = {}

    def state(ours: str, theirs: str, convert: Any) -> None:
        value = args.get(theirs)
        if value is not None:
            stated[ours] = json.dumps(convert(value))

    state("model.num_heads", "num_attention_heads", int)
    state("model.norm_eps", "norm_epsilon", float)
    state("model.rope_theta", "rotary_base", float)
    state("model.norm", "normalization", str.lower)
    state("model.tie_embeddings", "untie_embeddings_and_output_weights", lambda apart: not apart)
    # Two activations have weights of one shape.
    if args.get("swiglu") or args.get("gated_linear_unit") is not None:
        stated["model.mlp"] = json.dumps(_mlp(args))
    state("data.seq_len", "seq_length", int)
    state("data.reset_attention", "reset_attention_mask", bool)
    state("train.global_batch_size", "global_batch_size", int)
    if args.get("consumed_train_samples") is not None:
        stated["data.position"] = f"{args.get('consumed_train_samples')} sequences"
    tokenizer = args.get("tokenizer_model")
    if isinstance(tokenizer, str) and Path(tokenizer).is_file():
        stated["tokenizer"] = file_sha256(Path(tokenizer))
    return stated


# What our decoder does not compute: the argument, and the only value that it has here.
_ONLY = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "apply_layernorm_1p": (False,),
    "num_experts": (None,),
    "window_size": (None,),
    "multi_latent_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,),
}


def _refuse_other_models(args: Inert, path: Path) -> None:
    for argument, known in _ONLY.items():
        value = args.get(argument, known[0])
        if value not in known:
            raise CheckpointError(
                f"{path}: trained with {argument}={value!r}, which this decoder does not compute "
                f"(it has {known[0]!r}); no setting of model changes that"
            )
    if args.get("swiglu") is False and not args.get("squared_relu"):
        raise CheckpointError(
            f"{path}: trained with GELU (neither swiglu nor squared_relu), which this decoder does "
            "not compute; no setting of model changes that"
        )


_SIZES = {
    "num_layers": "num_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "ffn_hidden_size",
    "norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
}


def _model(args: Inert, vocab_size: int) -> dict[str, Any]:
    """The model that Megatron-LM's arguments describe; {} if they do not say its sizes."""
    keys: dict[str, Any] = {ours: args.get(theirs) for ours, theirs in _SIZES.items()}
    if None in keys.values():
        return {}
    keys["vocab_size"] = vocab_size
    keys["norm"] = str(args.get("normalization", "LayerNorm")).lower()
    keys["mlp"] = _mlp(args)
    if args.get("group_query_attention"):
        keys["num_kv_heads"] = args.get("num_query_groups")
    keys["qk_norm"] = bool(args.get("qk_layernorm"))
    biases = {"add_bias_linear": True, "add_qkv_bias": "qkv"}
    keys["bias"] = next((bias for argument, bias in biases.items() if args.get(argument)), False)
    keys["tie_embeddings"] = not args.get("untie_embeddings_and_output_weights")
    return keys


def _mlp(args: Inert) -> str:
    if args.get("swiglu"):
        return "swiglu"
    return "relu2_glu" if args.get("gated_linear_unit") else "relu2"
