"""DeepSpeed's own checkpoints (`engine.save_checkpoint`) at ZeRO stage 1, 2 and 3.

    global_step3/mp_rank_00_model_states.pt                        stages 1, 2: shapes, steps
    global_step3/zero_pp_rank_R_mp_rank_00_model_states.pt         stage 3: the same, of rank R
    global_step3/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt  masters and moments of rank R

Each rank holds flat tensors: at stages 1 and 2 a stretch of each parameter group, with a list of
what is where in it; at stage 3 an equal part of every parameter, one after the other. The files
are mapped: only what is read of them comes into memory.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitscale.errors import CheckpointError
from bitscale.sources.foreign import Shape, Tensors
from bitscale.sources.pickles import Inert, load_tensors, plain

# What DeepSpeed 0.19 puts beside tensors.
HARMLESS = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
)
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Piece(NamedTuple):
    """A flat stretch of a parameter, in parameter order, on one rank."""

    rank: int
    group: int
    start: int  # in that rank's flat tensor of the group
    numel: int


def is_zero(path: Path) -> bool:
    """Whether `path` is a directory that `engine.save_checkpoint` wrote."""
    return path.is_dir() and any(path.glob("*mp_rank_*_states.pt"))


def open_zero(path: Path) -> Tensors:
    """The state in such a directory. CheckpointError if it is damaged, incomplete or sharded over
    tensor-parallel ranks."""
    files = _optimizer_files(path)
    try:
        ranks = [load_tensors(file, file, HARMLESS)["optimizer_state_dict"] for file in files]
        stage = int(plain(ranks[0].get("zero_stage", 1)))
        model = load_tensors(_model_file(path, stage), path, HARMLESS)
        _check_complete(path, ranks)
        shapes = {n: tuple(s) for group in model["param_shapes"] for n, s in group.items()}
        index = _index_stage3 if stage == 3 else _index_stages12
        pieces = index(ranks, model["param_shapes"])
        flats = [_Flats(path, rank, stage) for rank in ranks]
        adam_steps = {
            name: flats[found[0].rank].adam_step(found[0].group) for name, found in pieces.items()
        }
        step = int(model["global_steps"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not laid out as DeepSpeed 0.19 saves ZeRO checkpoints ({error!r}); convert "
            "it with DeepSpeed's ds_to_universal.py and resume from the result"
        ) from error

    def read(name: str, kind: str) -> Tensor:
        parts = [flats[p.rank].read(kind, p.group, p.start, p.numel) for p in pieces[name]]
        numel = sum(part.numel() for part in parts)
        if numel != math.prod(shapes[name]):
            raise CheckpointError(
                f"{path}: {name} ({kind}) has {numel} of {math.prod(shapes[name])} elements; "
                "a rank's file is missing or damaged: use another checkpoint"
            )
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(shapes[name])

    found = Tensors(
        path=path,
        format=f"DeepSpeed ZeRO-{stage}",
        shapes=shapes,
        read=read,
        step=step,
        adam_steps=adam_steps,
        stated={},
        world_size=len(files),
    )
    return as_deepspeed_says(found, model)


def as_deepspeed_says(tensors: Tensors, model: Mapping[str, Any]) -> Tensors:
    """`tensors` with what a model_states file, `model`, says of the run."""
    stated = _stated(model)
    described = _section(stated, "model")
    bf16 = (model.get("ds_config") or {}).get("bf16") or {}
    return replace(
        tensors,
        stated=stated,
        versions={"deepspeed": str(model.get("ds_version"))},
        model=described if described.keys() >= set(_NEEDED) else {},
        quant=_section(stated, "quant"),
        dtype="bf16" if bf16.get("enabled") else "fp32",
    )


def _stated(model: Mapping[str, Any]) -> dict[str, str]:
    """What a model_states file says of the run: DeepSpeed's configuration, and in the client
    state `seq_length` and `identity` (a dict as in our own meta.json)."""
    stated = {}
    batch = (model.get("ds_config") or {}).get("train_batch_size")
    if isinstance(batch, int):
        stated["train.global_batch_size"] = json.dumps(batch)
    if isinstance(model.get("global_samples"), int):
        stated["data.position"] = f"{model['global_samples']} sequences"
    if isinstance(model.get("seq_length"), int):
        stated["data.seq_len"] = json.dumps(model["seq_length"])
    identity = model.get("identity")
    if isinstance(identity, dict):
        stated |= {str(key): str(value) for key, value in identity.items()}
    return stated


_NEEDED = ("num_layers", "d_model", "num_heads", "d_ff")


def _section(stated: Mapping[str, str], section: str) -> dict[str, Any]:
    """The keys of a section that the stated identity has, such as {"d_model": 64}."""
    prefix = f"{section}."
    keys = {key.removeprefix(prefix): v for key, v in stated.items() if key.startswith(prefix)}
    try:
        return {key: json.loads(value) for key, value in keys.items()}
    except ValueError:
        return {}


def _optimizer_files(path: Path) -> list[Path]:
    """Those of tensor-parallel rank 0, by rank."""
    found = {}
    for file in path.iterdir():
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match and int(match[2]):
            raise CheckpointError(
                f"{path}: {file.name} is of tensor-parallel rank {int(match[2])}; convert the "
                "checkpoint with DeepSpeed's ds_to_universal.py and resume from the result"
            )
        if match:
            found[int(match[1])] = file
    if not found:
        raise CheckpointError(
            f"{path}: no *_optim_states.pt, so of ZeRO stage 0, which keeps Adam's state by number "
            "and not by name; load it with DeepSpeed at stage 1 and save it once"
        )
    return [found[rank] for rank in sorted(found)]


def _model_file(path: Path, stage: int) -> Path:
    name = "mp_rank_00_model_states.pt"
    file = path / (f"zero_pp_rank_0_{name}" if stage == 3 else name)
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing; it names the parameters: use a complete checkpoint"
        )
    return file


def _check_complete(path: Path, ranks: list[Any]) -> None:
    count = ranks[0]["partition_count"]
    wanted = max(count) if isinstance(count, list) else int(count)
    if len(ranks) != wanted:
        raise CheckpointError(
            f"{path}: {len(ranks)} optimizer files instead of {wanted}; use a complete checkpoint"
        )


def _index_stages12(ranks: list[Any], _: Any) -> dict[str, list[_Piece]]:
    pieces: dict[str, list[_Piece]] = {}
    for rank, state in enumerate(ranks):
        for group, stretch in enumerate(state["param_slice_mappings"]):
            for name, address in stretch.items():
                piece = _Piece(rank, group, *_start_and_numel(address))
                pieces.setdefault(name, []).append(piece)
    return pieces


def _start_and_numel(address: Inert) -> tuple[int, int]:
    return address.state["start"], address.state["numel"]


def _index_stage3(
    ranks: list[Any], param_shapes: list[Mapping[str, Shape]]
) -> dict[str, list[_Piece]]:
    pieces: dict[str, list[_Piece]] = {}
    for group, shapes in enumerate(param_shapes):
        offset = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // len(ranks))
            for rank in range(len(ranks)):
                held = min(part, numel - rank * part)  # the last parts are padded
                if held > 0:
                    pieces.setdefault(name, []).append(_Piece(rank, group, offset, held))
            offset += part
    return pieces


class _Flats:
    """One rank's flat tensors."""

    def __init__(self, path: Path, state: Mapping[str, Any], stage: int) -> None:
        self._path = path
        if stage == 3:
            self._masters = state["fp32_flat_groups"]
            self._adam = state["optimizer_state_dict"]
        else:
            self._masters = state["single_partition_of_fp32_groups"]
            self._adam = state["base_optimizer_state"]

    def read(self, kind: str, group: int, start: int, numel: int) -> Tensor:
        flat = self._masters[group] if kind == "master" else self._of(group)[kind]
        part: Tensor = flat.detach()[start : start + numel]
        return part

    def adam_step(self, group: int) -> int:
        state = self._of(group)
        for kind in _MOMENTS:
            if kind not in state:
                raise CheckpointError(
                    f"{self._path}: its optimizer keeps {', '.join(map(str, state))}, not {kind}: "
                    "it is not Adam; continue from the weights alone (export them to Hugging Face)"
                )
        count = state["step"] if "step" in state else self._adam["param_groups"][group]["step"]
        return int(count)

    def _of(self, group: int) -> Mapping[str, Any]:
        # "elastic" checkpoints keep the bare list
        found: Mapping[str, Any] = (
            self._adam[group] if isinstance(self._adam, list) else self._adam["state"][group]
        )
        return found
