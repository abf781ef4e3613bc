"""Any model as a training checkpoint of step 0: fp32 masters, new moments.

One parameter is in memory at a time. The result is what `bitscale train --resume` starts from,
and `bitscale export`, `eval` and `verify` read.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitscale.checkpoint import ANY, Meta, write_meta
from bitscale.config import (
    Config,
    QuantConfig,
    config_hash,
    parse_config,
    quant_spec,
    section_items,
    to_tree,
)
from bitscale.convert.latents import latents_of_codes
from bitscale.convert.loaded import DTYPES
from bitscale.convert.model_source import ModelSource
from bitscale.convert.staging import new_directory, refuse_existing
from bitscale.convert.tensor_file import TensorSpec, write_tensors
from bitscale.data.progress import ByteProgress
from bitscale.engine.fragments import MOMENTS
from bitscale.errors import CheckpointError

_STATE_NAME = "state-00000-of-00001.safetensors"
_KINDS = ("master", *MOMENTS)


def write_checkpoint(
    source: ModelSource, out: Path, versions: Mapping[str, str], cfg: Config | None = None
) -> Path:
    """Write `source` as a checkpoint to the new directory `out`.

    Weights of which only codes exist become latents that quantize to them and their scale again.
    `cfg` is the run that will go on from it; default: one made up of what the source says.

    Raises CheckpointError if `cfg` describes another model, codes have no latents under its
    quantizer, or `out` exists.
    """
    refuse_existing(out)
    cfg = _own_config(source, out) if cfg is None else _fill_in(cfg, source)
    if not source.has_latents:
        _check_quantizer(cfg.quant, source)
    shapes = {name: list(shape) for name, shape in source.shapes.items()}
    meta = Meta(
        step=0,
        tokens=0,
        lambda_weight=source.strength.weight,
        lambda_activation=source.strength.activation,
        config=to_tree(cfg),
        config_hash=config_hash(cfg),
        identity=_identity(source, cfg),
        shapes=shapes,
        world_size=1,
        versions=dict(versions),
        adam_steps=dict.fromkeys(shapes, 0),
    )
    write_state(out, meta, _values(source, cfg), source.tokenizer_file)
    return out


def write_state(
    out: Path,
    meta: Meta,
    values: Iterator[tuple[str, str, Tensor]],
    tokenizer_file: Path | None = None,
) -> None:
    """Write the new directory `out`, a checkpoint of one rank, as `values` come.

    Args:
        values: (parameter, kind, fp32 tensor), parameters in the order of `meta.shapes`, the kinds
            master, exp_avg, exp_avg_sq of each one after the other.
    """
    with new_directory(out) as staging:
        state = staging / _STATE_NAME
        specs = [TensorSpec("rng_state", torch.uint8, tuple(torch.get_rng_state().shape))]
        for name, shape in meta.shapes.items():
            flat = (prod(shape),)
            specs += [TensorSpec(f"{name}|{kind}|0", torch.float32, flat) for kind in _KINDS]
        sha256 = hashlib.sha256()
        with ByteProgress(out.name, sum(spec.num_bytes for spec in specs)) as progress:
            write_tensors(state, specs, _tensors(values), progress, seen=sha256.update)
        if tokenizer_file is not None:
            _copy_tokenizer(tokenizer_file, staging)
        meta.files[_STATE_NAME] = {
            "bytes": state.stat().st_size,
            "sha256": sha256.hexdigest(),
        }
        write_meta(staging, meta)


def _tensors(values: Iterator[tuple[str, str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield "rng_state", torch.get_rng_state()
    for name, kind, value in values:
        yield f"{name}|{kind}|0", value.flatten()


def _values(source: ModelSource, cfg: Config) -> Iterator[tuple[str, str, Tensor]]:
    spec, dtype = quant_spec(cfg.quant), DTYPES[cfg.train.dtype]
    for name in source.shapes:
        if name in source.ternary_names and not source.has_latents:
            master = latents_of_codes(source.ternary(name), spec, dtype, name).float()
        else:
            master = source.latent(name)
        zeros = torch.zeros(()).expand(master.numel())  # no memory, and no room on the disk
        for kind in _KINDS:
            yield name, kind, master if kind == "master" else zeros


def _own_config(source: ModelSource, out: Path) -> Config:
    """A configuration that says what is known, and the least of what is not."""
    is_ternary = source.strength.weight == 1.0
    tree: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": json.loads(source.model.model_dump_json(exclude_none=True)),
        "data": {
            "corpora": [{"path": path} for path in source.corpora] or [{"path": "unknown"}],
            "seq_len": source.seq_len,
            "reset_attention": source.reset_attention,
        },
        "train": {
            "steps": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "dtype": source.dtype,
        },
        "optim": {"lr": 1e-4, "warmup": {"steps": 0}},
        "transition": {"at": {"step": 0}} if is_ternary else {},
        "quant": json.loads(source.quant.model_dump_json(exclude_none=True)),
    }
    return parse_config(tree, where=str(source.path))


def _fill_in(cfg: Config, source: ModelSource) -> Config:
    """`cfg`, whose model must be the source's; an unset vocabulary size becomes the source's."""
    vocab_size = cfg.model.vocab_size or source.model.vocab_size
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": vocab_size})})
    ours, theirs = _sizes(cfg), source.model.model_dump()
    theirs["num_kv_heads"] = theirs["num_kv_heads"] or theirs["num_heads"]
    for key, value in theirs.items():
        if ours[key] != value and key not in ("init_std", "head_bits"):
            raise CheckpointError(
                f"model.{key} is {ours[key]!r} in the configuration and {value!r} in "
                f"{source.path}; set it to the latter"
            )
    return cfg


def _sizes(cfg: Config) -> dict[str, Any]:
    tree = cfg.model.model_dump()
    tree["num_kv_heads"] = tree["num_kv_heads"] or tree["num_heads"]
    return tree


def _check_quantizer(quant: QuantConfig, source: ModelSource) -> None:
    if source.spec.deadzone_bias:
        raise CheckpointError(
            f"{source.path} holds a bias made of weights whose code is 0, and not those weights "
            f"(quant.preset={source.quant.preset!r}); start from the training checkpoint"
        )
    if quant.preset != source.quant.preset:
        raise CheckpointError(
            f"quant.preset is {quant.preset!r} in the configuration, and {source.path} holds codes "
            f"of {source.quant.preset!r}; set it to the latter"
        )


def _identity(source: ModelSource, cfg: Config) -> dict[str, str]:
    """As `run.identity` writes it: the model, the tokenizer if known, and for codes the quantizer
    are given; nothing has been read of any corpus."""
    items = section_items(cfg, "model")
    is_ternary = source.strength.weight == 1.0
    for key, value in section_items(cfg, "quant").items():
        if key != "quant.kernel":
            items[key] = value if is_ternary else ANY
    items["tokenizer"] = source.tokenizer_sha256 or ANY
    free = ("data.corpora", "data.seq_len", "data.reset_attention", "data.seed")
    return items | dict.fromkeys((*free, "train.global_batch_size"), ANY)


def _copy_tokenizer(file: Path, out: Path) -> None:
    shutil.copyfile(file, out / file.name)
    settings = file.parent / "tokenizer_config.json"
    if settings.is_file():  # it names the end-of-document token
        shutil.copyfile(settings, out / settings.name)
