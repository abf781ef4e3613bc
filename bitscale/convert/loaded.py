"""A checkpoint as a model for inference: no DeepSpeed, no optimizer, one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bitscale.checkpoint import Reader
from bitscale.config import ModelConfig, QuantConfig, override, parse_amendments, parse_config
from bitscale.errors import CheckpointError, ConfigError
from bitscale.model.bitlinear import bit_linears, is_scale, set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.learned import initial_scale
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


def load_checkpoint(path: Path, overrides: Sequence[str] = ()) -> LoadedModel:
    """The model of a training checkpoint, in the dtype that the run computed with.

    `overrides`, such as quant.preset=absmedian, may give it another quantizer; scales that it
    learns and the checkpoint has not start from the weights. Raises ConfigError for any other key.
    """
    for text in overrides:
        if not text.startswith("quant."):
            raise ConfigError(
                f"{text!r}: only the quantizer of a trained checkpoint can be another; give keys "
                "of quant, such as quant.preset=absmedian"
            )
    reader = Reader(path)
    meta = reader.meta
    cfg = parse_config(override(meta.config, overrides), where=str(path))
    model = decoder_on_meta(cfg.model, cfg.quant)
    state = {name: tensor.to(DTYPES[cfg.train.dtype]) for name, tensor in reader.parameters()}
    if cfg.model.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    if overrides:
        state = {name: tensor for name, tensor in state.items() if not is_scale(name)}
        for name, layer in bit_linears(model):
            if layer.alpha is not None:
                weight_FD = state[f"{name}.weight"]
                state[f"{name}.alpha"] = initial_scale(weight_FD).to(weight_FD.dtype)
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
