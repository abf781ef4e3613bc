"""`bitscale inspect` of DeepSpeed's and Megatron-core's checkpoints (others: convert/)."""

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from bitscale.convert import inspection
from bitscale.convert.certificate import read_certificate
from bitscale.convert.inspection import Description, Listed, TensorFacts, describe
from bitscale.sources import holds_training_state, locate, open_tensors
from bitscale.sources.foreign import Tensors


def inspect(path: Path, *, read_values: bool = True) -> Description:
    """`convert.inspection.inspect`, and of other trainers' checkpoints what they hold, by their own
    names: masters, or weights where there is no optimizer state."""
    if not holds_training_state(path):
        return inspection.inspect(path, read_values=read_values)
    tensors = open_tensors(locate(path))
    stored = "F32 master" if tensors.adam_steps else tensors.dtype.upper().replace("FP", "F")
    width = 2 if stored == "BF16" else 4
    listed = Listed()
    for name, shape in tensors.shapes.items():
        facts = TensorFacts(name, stored, shape, width * prod(shape))
        listed.add(facts, partial(tensors.read, name, "master"))
    certificate = read_certificate(tensors.path)
    opened = f"{tensors.format} checkpoint", _facts(tensors), listed, certificate
    return describe(tensors.path, opened, read_values=read_values)


def _facts(tensors: Tensors) -> dict[str, Any]:
    facts: dict[str, Any] = {"step": tensors.step}
    if tensors.model:
        facts["model"] = {k: v for k, v in tensors.model.items() if v is not None}
    moments = "AdamW, two moments (8 bytes a weight more)" if tensors.adam_steps else "none"
    facts["optimizer_state"] = moments
    if tensors.world_size > 1:
        facts["saved_by"] = f"{tensors.world_size} ranks"
    if tensors.stated:
        facts["stated"] = dict(tensors.stated)
    return facts
