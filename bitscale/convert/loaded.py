"""A checkpoint as a model for inference: no DeepSpeed, no optimizer, one process."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bitscale.checkpoint import Reader
from bitscale.config import ModelConfig, QuantConfig, parse_amendments, parse_config
from bitscale.errors import CheckpointError
from bitscale.model.bitlinear import set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import Strength, quant_strength

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LoadedModel(NamedTuple):
    model: Decoder
    strength: Strength  # λ at which it was trained last and now computes
    step: int
    tokenizer_fingerprint: str
    seq_len: int
    reset_attention: bool
    corpora: tuple[str, ...]  # paths of the corpora that it was trained on


def decoder_on_meta(m: ModelConfig, quant: QuantConfig) -> Decoder:
    """The modules without any memory behind their parameters."""
    with torch.device("meta"):
        return Decoder(m, quant)


def load_checkpoint(path: Path) -> LoadedModel:
    """The model of a training checkpoint, in the dtype that the run computed with."""
    reader = Reader(path)
    meta = reader.meta
    cfg = parse_config(meta.config, where=str(path))
    model = decoder_on_meta(cfg.model, cfg.quant)
    state = {name: tensor.to(DTYPES[cfg.train.dtype]) for name, tensor in reader.parameters()}
    if cfg.model.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit its own configuration: {error}") from error
    if cfg.model.tie_embeddings:
        model.head.weight = nn.Parameter(model.embed.weight.data)
    # The step that was trained last; ε follows from it, as λ does, which the checkpoint repeats.
    amendments = parse_amendments(meta.amendments, str(path))
    residual = quant_strength(max(meta.step - 1, 0), cfg, amendments).residual
    strength = Strength(meta.lambda_weight, meta.lambda_activation, residual)
    set_strength(model, strength)
    paths = tuple(corpus.path for corpus in cfg.data.corpora)
    return LoadedModel(
        model,
        strength,
        meta.step,
        meta.identity["tokenizer"],
        cfg.data.seq_len,
        cfg.data.reset_attention,
        paths,
    )
