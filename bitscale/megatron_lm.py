"""The layer spec for Megatron-LM's own scripts, which take it by name:

    BITSCALE_TRANSITION_STEP=2000 BITSCALE_RAMP_SHAPE=linear BITSCALE_RAMP_STEPS=500 \\
    torchrun --nproc-per-node 8 pretrain_gpt.py --spec bitscale.megatron_lm ternary_layer_spec \\
        --transformer-impl local --normalization RMSNorm --swiglu --disable-bias-linear ...

Megatron-LM has no arguments for what a spec needs, so these come from the environment:

| variable | default | meaning |
|---|---|---|
| BITSCALE_QUANT | b158 | preset: b158, absmedian, weight_only or trilm |
| BITSCALE_KERNEL | auto | reference, cpu, triton or auto |
| BITSCALE_TRANSITION_STEP | 0 | iteration from which the layers are quantized |
| BITSCALE_RAMP_SHAPE | none | linear, paper, exponential, sigmoid, cosine (docs/schedules.md) |
| BITSCALE_RAMP_STEPS | 0 | iterations to λ = 1 |

λ is a pure function of Megatron-LM's iteration, so a resumed run continues where it was. Megatron's
optimizer keeps its state through the transition: the Parameters are the same objects.
"""

import importlib
import os
from typing import Any, get_args

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from bitscale.config.schema import RampShape
from bitscale.errors import ConfigError
from bitscale.model.megatron import ternary_layer_spec as make_layer_spec
from bitscale.quant.schedule import SIXTEEN_BIT, Strength, ramp_value


def _whole_number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdigit():
        raise ConfigError(f"environment variable {name}={text!r} is not a whole number of steps")
    return int(text)


def _ramp_shape() -> str:
    shape = os.environ.get("BITSCALE_RAMP_SHAPE", "none")
    if shape not in get_args(RampShape):
        raise ConfigError(
            f"environment variable BITSCALE_RAMP_SHAPE={shape!r} is unknown; use one of "
            f"{', '.join(get_args(RampShape))}"
        )
    return shape


_START, _LENGTH = _whole_number("BITSCALE_TRANSITION_STEP"), _whole_number("BITSCALE_RAMP_STEPS")
_SHAPE = _ramp_shape()


def strength_at(iteration: int) -> Strength:
    """λ of weights and activations in Megatron-LM's 0-based `iteration`."""
    if iteration < _START:
        return SIXTEEN_BIT
    value = ramp_value(_SHAPE, iteration - _START, _LENGTH)
    return Strength(value, value)


def _present() -> tuple[Strength, int]:
    training: Any = importlib.import_module("megatron.training")
    arguments = training.get_args()
    # Set by the training loop; a script that only evaluates knows just the checkpoint's.
    iteration = getattr(arguments, "curr_iteration", None)
    iteration = int(arguments.iteration if iteration is None else iteration)
    return strength_at(iteration), iteration


ternary_layer_spec = make_layer_spec(
    get_gpt_layer_local_spec(normalization="RMSNorm"),
    os.environ.get("BITSCALE_QUANT", "b158"),
    source=_present,
    kernel=os.environ.get("BITSCALE_KERNEL", "auto"),
)
