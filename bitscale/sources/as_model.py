"""Other programs' checkpoints as models to convert: DeepSpeed's and Megatron-core's `ModelSource`.

The model is described by the certificate of an export, by a configuration, or by the checkpoint
itself: Megatron-LM's arguments, or the identity that a DeepSpeed run put into its client state.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bitscale.config import Config, parse_config
from bitscale.convert import open_source
from bitscale.convert.certificate import read_certificate
from bitscale.convert.huggingface_in import ScaleConvention
from bitscale.convert.model_source import ModelSource, ternary_names, tokenizer_in
from bitscale.data.corpus import file_sha256
from bitscale.errors import CheckpointError
from bitscale.quant.schedule import SIXTEEN_BIT, Strength
from bitscale.sources import holds_training_state, locate, open_tensors
from bitscale.sources.foreign import ForeignSource, Tensors


def open_model(
    path: Path,
    cfg: Config | None = None,
    *,
    seq_len: int | None = None,
    scales: ScaleConvention | None = None,
) -> ModelSource:
    """What `open_source` opens, and DeepSpeed's and Megatron-core's checkpoints besides.

    Args:
        cfg: whose model section describes a checkpoint that does not do so itself.
        seq_len, scales: of `open_source`.

    Raises CheckpointError if there is no model, or nothing describes it.
    """
    if not holds_training_state(path):
        return open_source(path, seq_len=seq_len, scales=scales)
    found = locate(path)
    tensors = open_tensors(found)
    content = read_certificate(found) or {}
    described = _described(tensors, content, cfg, seq_len)
    source = ForeignSource(tensors, described)
    return _as_model(source, described, content)


def _described(
    tensors: Tensors, content: Mapping[str, Any], cfg: Config | None, seq_len: int | None
) -> Config:
    """A configuration whose model, quantizer and dtype are the checkpoint's."""
    if not content and cfg is not None and not tensors.model:
        return _with_vocabulary(cfg, tensors)
    model = content.get("model") or tensors.model
    if not model:
        raise CheckpointError(
            f"{tensors.path} ({tensors.format}) does not describe its model; name the "
            "configuration of a run with its model section: --config FILE"
        )
    stated_length = json.loads(tensors.stated.get("data.seq_len", "null"))
    seq_len = seq_len or content.get("seq_len") or stated_length
    if seq_len is None:
        raise CheckpointError(f"{tensors.path} names no length of a sequence; pass --seq-len N")
    tree = {
        "run": {"dir": str(tensors.path)},
        "model": _given(model),
        "data": {"corpora": [{"path": "unknown"}], "seq_len": seq_len},
        "train": {
            "steps": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "dtype": content.get("dtype") or tensors.dtype,
        },
        "optim": {"lr": 1e-4, "warmup": {"steps": 0}},
        "quant": _given(content.get("quant") or tensors.quant),
    }
    return parse_config(tree, where=str(tensors.path))


def _with_vocabulary(cfg: Config, tensors: Tensors) -> Config:
    if cfg.model.vocab_size is not None:
        return cfg
    rows = [s[0] for name, s in tensors.shapes.items() if name.endswith(_EMBEDDINGS)]
    if not rows:
        raise CheckpointError(
            f"{tensors.path} ({tensors.format}) has no embedding by any known name "
            f"({', '.join(_EMBEDDINGS)}), which would tell the vocabulary; set model.vocab_size"
        )
    model = cfg.model.model_copy(update={"vocab_size": rows[0]})
    return cfg.model_copy(update={"model": model})


def _given(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}


_EMBEDDINGS = ("embed.weight", "embed_tokens.weight", "word_embeddings.weight")


def _as_model(source: ForeignSource, cfg: Config, content: Mapping[str, Any]) -> ModelSource:
    tensors, shapes = source.tensors, {n: tuple(s) for n, s in source.meta.shapes.items()}
    made_of, trained_at = content.get("source", {}), content.get("trained_at")
    tokenizer_file = tokenizer_in(tensors.path)
    kind: Literal["megatron", "deepspeed"] = "megatron"
    if tensors.format.startswith("DeepSpeed"):
        kind = "deepspeed"
    form = "fp32 masters" if source.has_optimizer_state else "weights without an optimizer"

    def read(name: str) -> Tensor:
        return source.read(name, "master", 0, prod(shapes[name])).view(shapes[name])

    return ModelSource(
        path=tensors.path,
        kind=kind,
        form=f"{tensors.format}, {form}",
        model=cfg.model,
        quant=cfg.quant,
        dtype=cfg.train.dtype,
        strength=Strength(**trained_at) if trained_at else SIXTEEN_BIT,
        step=made_of.get("step", tensors.step),
        tokens=made_of.get("tokens", 0),
        seq_len=cfg.data.seq_len,
        reset_attention=content.get("reset_attention", cfg.data.reset_attention),
        corpora=tuple(content.get("corpora", ())),
        config_hash=content.get("config_hash", ""),
        tokenizer_sha256=_fingerprint(content, tensors, tokenizer_file),
        tokenizer_file=tokenizer_file,
        eod_token=None,
        versions=content.get("versions", tensors.versions),
        recipe=content.get("recipe", {}),
        shapes=shapes,
        ternary_names=ternary_names(cfg.model, cfg.quant),
        read=read,
        read_as=SIXTEEN_BIT,
    )


def _fingerprint(content: Mapping[str, Any], tensors: Tensors, tokenizer_file: Path | None) -> str:
    if tokenizer_file is not None:
        return file_sha256(tokenizer_file)
    return str(content.get("tokenizer_sha256") or tensors.stated.get("tokenizer", ""))
