"""bitscale: 16-bit pretraining that turns into 1.58-bit quantization-aware training mid-run.

    import bitscale

    bitscale.bitlinearize(model, "b158", exclude="lm_head")  # ternary from here on
    bitscale.set_strength(model, bitscale.Strength(0.5, 0.5))  # half way between 16 bit and ternary
    bitscale.unbitlinearize(model)

These names load torch at their first use; `import bitscale` alone does not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitscale.config.presets import preset
    from bitscale.config.spec import QuantSpec
    from bitscale.model.bitlinear import set_strength
    from bitscale.model.bitlinearize import bitlinearize, unbitlinearize
    from bitscale.quant.schedule import Strength

__version__ = "0.1.0"

__all__ = [
    "QuantSpec",
    "Strength",
    "bitlinearize",
    "preset",
    "set_strength",
    "unbitlinearize",
]

_MODULES = {
    "QuantSpec": "bitscale.config.spec",
    "Strength": "bitscale.quant.schedule",
    "bitlinearize": "bitscale.model.bitlinearize",
    "preset": "bitscale.config.presets",
    "set_strength": "bitscale.model.bitlinear",
    "unbitlinearize": "bitscale.model.bitlinearize",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bitscale' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
