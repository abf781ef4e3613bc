"""Tiny decoders trained for a moment in this process, and their checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bitscale.config import Config
from bitscale.convert.model_source import ModelSource, parameter_shapes, ternary_names
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.model.bitlinear import set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import TERNARY, Strength

VOCAB_SIZE = 96
# The shapes that conversion has to get right, by what is particular about them.
MODELS: dict[str, str] = {
    "tied": "model.tie_embeddings=true",
    "untied": "model={tie_embeddings: false, num_kv_heads: null, rope_theta: 5e5}",
    "sub_norm": "model={sub_norm: true, mlp: relu2_glu, tie_embeddings: false}",
    "qk_norm": "model.qk_norm=true",
    "bias": "model={bias: true, rope_scaling: {type: linear, factor: 2.0}}",
    "qkv_bias": "model.bias=qkv",
    "olmo": "model={norm: layernorm, norm_affine: false}",
    "olmo2": "model={post_norm: true, qk_norm: width}",
}


def make_source(cfg: Config, strength: Strength = TERNARY, *, num_steps: int = 30) -> ModelSource:
    """A decoder trained for `num_steps` at `strength` on a sequence with a pattern."""
    vocab_size = cfg.model.vocab_size or VOCAB_SIZE
    m = cfg.model.model_copy(update={"vocab_size": vocab_size})
    cfg = cfg.model_copy(update={"model": m})
    torch.manual_seed(0)
    model = Decoder(m, cfg.quant, seed=1)
    set_strength(model, strength)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        start = torch.randint(0, vocab_size, (8, 1))
        ids = (start + torch.arange(17) ** 2) % vocab_size
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    return ModelSource(
        path=Path("memory"),
        kind="checkpoint",
        form="fp32 masters",
        model=m,
        quant=cfg.quant,
        dtype=cfg.train.dtype,
        strength=strength,
        step=num_steps,
        tokens=0,
        seq_len=cfg.data.seq_len,
        reset_attention=False,
        corpora=(),
        config_hash="",
        tokenizer_sha256="",
        tokenizer_file=None,
        eod_token=None,
        versions={},
        recipe={},
        shapes=parameter_shapes(m, cfg.quant),
        ternary_names=ternary_names(m, cfg.quant),
        read=partial(_read, masters),
    )


def _read(masters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return masters[name]


def make_checkpoint(
    make_config: Callable[..., Config],
    out: Path,
    *overrides: str,
    strength: Strength = TERNARY,
    num_steps: int = 30,
) -> Path:
    """`make_source` of the tiny configuration with `overrides`, written as a checkpoint."""
    cfg = make_config("data.seq_len=64", "transition={at: {step: 0}}", *overrides)
    return write_checkpoint(make_source(cfg, strength, num_steps=num_steps), out, {})
