"""A model as a `torch_dist` checkpoint that megatron-core's GPTModel loads, at any TP and PP.

    latest_checkpointed_iteration.txt   "release": weights without an optimizer
    release/.metadata, __0_0.distcp     16- or 32-bit latents (torch_dist_out.py)
    release/common.pt                   what Megatron-LM's arguments have to be
    release/metadata.json               {"sharded_backend": "torch_dist", ...}
    release/bitscale.json, tokenizer.*

Keys are those of homogeneous layers: all stacked in `decoder.layers.ROLE`, [layers, ...].
"""

import argparse
import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitscale.config import ModelConfig
from bitscale.convert.certificate import CERTIFICATE_NAME, certificate, to_json
from bitscale.convert.loaded import DTYPES
from bitscale.convert.megatron_names import FC1, FUSED_NORMS, INSIDE, OUTSIDE, QKV, fused_qkv
from bitscale.convert.model_source import ModelSource
from bitscale.convert.staging import new_directory, refuse_existing
from bitscale.convert.torch_dist_out import Chunk, write_torch_dist
from bitscale.data.progress import ByteProgress
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import is_scale
from bitscale.quant.schedule import SIXTEEN_BIT

RELEASE = "release"  # Megatron-LM's name for weights that no run of its own has trained
_LINEARS = (QKV, INSIDE["attn.o"], FC1, INSIDE["mlp.down"])
_Make = Callable[[], Tensor]


def export_megatron(
    source: ModelSource, out: Path, dtype: Literal["bf16", "fp32"] | None = None
) -> dict[str, Any]:
    """Write the latent weights, in `dtype` (default: the run's), to the new directory `out`.

    megatron-core's own layers compute them in 16 bit, `ternary_layer_spec` at any λ. Returns the
    certificate. Raises CheckpointError for what a GPTModel cannot hold and if `out` exists.
    """
    m, dtype = source.model, dtype or source.dtype
    _refuse_unheld(m)
    refuse_existing(out)
    chunks = list(_chunks(source, DTYPES[dtype]))
    omitted = [name for name in source.shapes if is_scale(name)]
    content = certificate(
        source, "megatron", computes=SIXTEEN_BIT, digest=None, stored=dtype, omitted=omitted
    )
    with new_directory(out) as staging:
        release = staging / RELEASE
        release.mkdir()
        with ByteProgress(out.name, sum(chunk.num_bytes for chunk in chunks)) as progress:
            write_torch_dist(release, chunks, _extra_states(m), progress)
        common = {"args": _arguments(source, dtype), "checkpoint_version": 3.0, "iteration": 0}
        torch.save(common, release / "common.pt")
        description = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (release / "metadata.json").write_text(json.dumps(description))
        (release / CERTIFICATE_NAME).write_text(to_json(content))
        if source.tokenizer_file is not None and source.tokenizer_file.is_file():
            shutil.copyfile(source.tokenizer_file, release / source.tokenizer_file.name)
        (staging / "latest_checkpointed_iteration.txt").write_text(RELEASE)
    return content


def _refuse_unheld(m: ModelConfig) -> None:
    """Raise CheckpointError, naming the key and the formats that hold it."""
    any_shape = "--format packed and compact hold any shape"
    reasons = {
        "model.norm='layernorm' (its LayerNorm has a bias)": (m.norm == "layernorm", "hf"),
        f"model.sub_norm={m.sub_norm!r}": (bool(m.sub_norm), "hf and gguf"),
        "model.post_norm=true": (m.post_norm, "hf"),
        "model.qk_norm='width'": (m.qk_norm == "width", "hf"),
        "model.bias='attention'": (m.bias == "attention", "hf and gguf"),
        "model.rope_scaling, whose frequencies are arguments of the program": (
            m.rope_scaling is not None,
            "hf and gguf",
        ),
    }
    for what, (applies, holders) in reasons.items():
        if applies:
            raise CheckpointError(
                f"megatron-core's GPTModel has no {what}; --format {holders} may hold it, and "
                f"{any_shape}"
            )


def _chunks(source: ModelSource, dtype: torch.dtype) -> Iterator[Chunk]:
    m, read = source.model, partial(source.latent, dtype=dtype)

    def whole(module: str, shape: tuple[int, ...], make: _Make) -> Chunk:
        return Chunk(f"{module}.weight", shape, (0,) * len(shape), shape, dtype, make)

    yield whole(OUTSIDE["embed"], source.shapes["embed.weight"], partial(read, "embed.weight"))
    for layer in range(m.num_layers):
        for key, shape, make in _layer(source, dtype, f"layers.{layer}"):
            stacked, offsets = (m.num_layers, *shape), (layer, *(0 for _ in shape))
            yield Chunk(f"decoder.layers.{key}", stacked, offsets, (1, *shape), dtype, make)
    yield whole(OUTSIDE["norm"], (m.d_model,), _norm(source, "norm.weight"))
    if not m.tie_embeddings:
        yield whole(OUTSIDE["head"], source.shapes["head.weight"], partial(read, "head.weight"))


def _layer(
    source: ModelSource, dtype: torch.dtype, block: str
) -> Iterator[tuple[str, tuple[int, ...], _Make]]:
    """(key, shape, how to make it) of one block."""
    m, read = source.model, partial(source.latent, dtype=dtype)
    for norm, key in FUSED_NORMS.items():
        yield f"{key}_weight", (m.d_model,), _norm(source, f"{block}.{norm}.weight")
    if m.qk_norm:
        for role in ("attn.q_norm", "attn.k_norm"):
            name = f"{block}.{role}.weight"
            yield f"{INSIDE[role]}.weight", source.shapes[name], partial(read, name)
    gated = ("gate", "up") if m.mlp != "relu2" else ("up",)
    linears = {
        QKV: [f"{block}.attn.{role}" for role in "qkv"],
        INSIDE["attn.o"]: [f"{block}.attn.o"],
        FC1: [f"{block}.mlp.{role}" for role in gated],
        INSIDE["mlp.down"]: [f"{block}.mlp.down"],
    }
    for key, modules in linears.items():
        for parameter in ("weight", "bias"):
            names = [f"{module}.{parameter}" for module in modules]
            if names[0] not in source.shapes:
                continue
            rows = sum(source.shapes[name][0] for name in names)
            shape = (rows, *source.shapes[names[0]][1:])
            yield f"{key}.{parameter}", shape, partial(_fused, source, dtype, key, names)


def _fused(source: ModelSource, dtype: torch.dtype, key: str, names: list[str]) -> Tensor:
    parts = [source.latent(name, dtype) for name in names]
    if key == QKV:
        return fused_qkv(*parts, kv_heads=source.model.num_kv_heads or source.model.num_heads)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _norm(source: ModelSource, name: str) -> _Make:
    """A norm's weight; 1 for a norm without any."""
    if name in source.shapes:
        return partial(source.latent, name)
    return partial(torch.ones, source.model.d_model)


def _extra_states(m: ModelConfig) -> dict[str, bytes]:
    """What megatron-core's linear layers ask for beside their weights, and ignore."""
    buffer = io.BytesIO()
    torch.save([None], buffer)  # one object for each rank that shares the key
    keys = [
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{m.num_layers}"
        for linear in _LINEARS
        for layer in range(m.num_layers)
    ]
    return dict.fromkeys(keys, buffer.getvalue())


def _arguments(source: ModelSource, dtype: Literal["bf16", "fp32"]) -> argparse.Namespace:
    """Megatron-LM's arguments of this model (`--use-checkpoint-args` reads them)."""
    m = source.model
    kv_heads = m.num_kv_heads or m.num_heads
    return argparse.Namespace(
        num_layers=m.num_layers,
        hidden_size=m.d_model,
        ffn_hidden_size=m.d_ff,
        num_attention_heads=m.num_heads,
        kv_channels=m.d_model // m.num_heads,
        group_query_attention=kv_heads != m.num_heads,
        num_query_groups=kv_heads,
        normalization="RMSNorm",
        norm_epsilon=m.norm_eps,
        qk_layernorm=bool(m.qk_norm),
        swiglu=m.mlp == "swiglu",
        squared_relu=m.mlp != "swiglu",
        gated_linear_unit=m.mlp != "relu2",
        add_bias_linear=m.bias is True,
        add_qkv_bias=m.bias == "qkv",
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(m.rope_theta) if m.rope_theta.is_integer() else m.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=False,
        apply_layernorm_1p=False,
        untie_embeddings_and_output_weights=not m.tie_embeddings,
        vocab_size=m.vocab_size,
        padded_vocab_size=m.vocab_size,
        seq_length=source.seq_len,
        max_position_embeddings=source.seq_len,
        params_dtype=DTYPES[dtype],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_experts=None,
    )
