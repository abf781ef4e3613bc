"""Any model's linear layers and convolutions as BitLinear and BitConv2d, and back.

A converted layer is the same module object with another class, as in
`torch.nn.utils.parametrize`: its Parameters, buffers, hooks, dtype, device and training flag are
not copied but stay, an optimizer built before keeps owning the weights, and what was tied is tied.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from bitscale.config.presets import preset
from bitscale.config.spec import QuantSpec, max_exact_inputs
from bitscale.errors import ConfigError
from bitscale.model.bitlinear import (
    QUANTIZATION,
    BitConv2d,
    BitLinear,
    check_strength,
    kernels_for,
)
from bitscale.quant.quantizer import tile_counts
from bitscale.quant.reference import Quant, as_spec
from bitscale.quant.schedule import TERNARY, Strength

Patterns = str | Sequence[str]


def bitlinearize(
    model: nn.Module,
    spec: Quant | str = "b158",
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    fused: Mapping[str, int | Sequence[int]] | None = None,
    strength: Strength = TERNARY,
    kernel: str = "reference",
) -> tuple[str, ...]:
    """Quantize `model`'s nn.Linear and nn.Conv2d layers in place; returns their names in order.

    `spec` is a preset's name, a QuantSpec or a configuration's `quant` section. `include` and
    `exclude` are patterns (`fnmatch`: * ? [...]) of qualified names, as in `named_modules()`;
    layers that are quantized already are left as they are. `fused` tells which weights hold
    several logical matrices stacked by rows, each to have its own scale: {pattern: rows of each},
    or {pattern: number of equal parts}. `strength` is λ from now on (change it with
    `set_strength`). `kernel` computes b158 and absmedian on the device where the weights are now:
    reference, cpu, triton, or auto (`set_kernels` changes it). A preset with learned scales
    (paretoq) adds a Parameter `alpha` to every layer; an optimizer built before does not own it.

    Raises KernelUnavailable if `kernel` does not run there; ConfigError if a pattern matches
    nothing or nothing is left to convert, for a subclass of the two layers, whose own forward
    pass would be lost, if a weight does not fit `spec` or `kernel`, and for λ outside [0, 1].
    """
    check_strength(strength)
    resolved = preset(spec) if isinstance(spec, str) else as_spec(spec)
    kept = resolved if isinstance(spec, str) else spec
    chosen = _choose(model, _as_tuple(include), _as_tuple(exclude))
    parts = _fused_rows(chosen, fused or {})
    # Everything is checked before anything is changed.
    for name, layer in chosen.items():
        _check_layer(name, layer, resolved, parts.get(name))
    _check_fast_path(model, chosen)
    tables = {
        name: kernels_for(name, kernel, layer.weight.device.type, resolved, parts.get(name))
        for name, layer in chosen.items()
        if isinstance(layer, nn.Linear)
    }
    for name, layer in chosen.items():
        if isinstance(layer, nn.Linear):
            layer.__class__ = BitLinear
            layer._set_up(kept, strength, parts.get(name), tables[name])  # type: ignore[operator]
        else:
            layer.__class__ = BitConv2d
            layer.quant, layer.strength = kept, strength  # type: ignore[assignment]
    return tuple(chosen)


def unbitlinearize(model: nn.Module) -> tuple[str, ...]:
    """Turn every BitLinear and BitConv2d of `model` back in place; returns their names in order.

    Weights keep their latent values: the model is the 16-bit one again; learned scales are gone.
    """
    converted = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BitLinear | BitConv2d)
    ]
    for _, module in converted:
        module.__class__ = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d  # type: ignore[assignment]
        for attribute in QUANTIZATION:
            module.__dict__.pop(attribute, None)
        module._parameters.pop("alpha", None)
    return tuple(name for name, _ in converted)


def _choose(
    model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]
) -> dict[str, nn.Module]:
    """{first qualified name: layer} of what is to be converted."""
    # A module used twice has several names; it is one layer, and any of them may be matched.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Conv2d):
            names.setdefault(module, []).append(name)
    every_name = [name for aliases in names.values() for name in aliases]
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in every_name):
                raise ConfigError(
                    f"bitlinearize: {key}={pattern!r} matches no linear layer or convolution; "
                    f"there are {_some(every_name)}"
                )
    chosen = {
        aliases[0]: module
        for module, aliases in names.items()
        if _matches(aliases, include)
        and not _matches(aliases, exclude)
        and not isinstance(module, BitLinear | BitConv2d)
    }
    if not chosen:
        raise ConfigError(
            "bitlinearize: nothing to convert: every matching layer is excluded or quantized "
            f"already, of {_some(every_name)}"
        )
    return chosen


def _fused_rows(
    chosen: Mapping[str, nn.Module], fused: Mapping[str, int | Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """{layer: rows of each of its logical matrices}."""
    rows: dict[str, tuple[int, ...]] = {}
    for pattern, parts in fused.items():
        matching = [name for name in chosen if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(
                f"bitlinearize: fused={pattern!r} matches no layer that is converted; "
                f"these are {_some(list(chosen))}"
            )
        for name in matching:
            layer = chosen[name]
            if not isinstance(layer, nn.Linear):
                raise ConfigError(f"bitlinearize: fused={pattern!r}: {name} is no linear layer")
            rows[name] = _split_rows(name, layer.out_features, parts)
    return rows


def _split_rows(name: str, num_rows: int, parts: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(parts, int):
        if parts < 1 or num_rows % parts:
            raise ConfigError(
                f"bitlinearize: {name} has {num_rows} rows, not divisible into {parts} equal "
                "matrices; give the rows of each"
            )
        return (num_rows // parts,) * parts
    if sum(parts) != num_rows or min(parts) < 1:
        raise ConfigError(
            f"bitlinearize: {name} has {num_rows} rows, but fused matrices of "
            f"{' + '.join(map(str, parts))} = {sum(parts)} were given"
        )
    return tuple(parts)


def _check_layer(
    name: str, layer: nn.Module, spec: QuantSpec, rows: tuple[int, ...] | None
) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise ConfigError(
            f"bitlinearize: {name} is a {type(layer).__name__}, whose own forward pass would be "
            f"lost or which its parent may not call; exclude it (exclude={name!r})"
        )
    rows_only = spec.norm != "none" or spec.product == "codes" or spec.hadamard is not None
    if isinstance(layer, nn.Conv2d) and (spec.learns_scale or spec.deadzone_bias):
        raise ConfigError(
            f"bitlinearize: {name} is a Conv2d, for which learned scales and the bias of dead "
            "weights are not defined; exclude it or use another preset"
        )
    if isinstance(layer, nn.Conv2d) and rows_only:
        raise ConfigError(
            f"bitlinearize: {name} is a Conv2d, for which norm={spec.norm!r} with "
            f"product={spec.product!r} and hadamard={spec.hadamard} is not defined; exclude it or "
            "use another preset"
        )
    columns = layer.weight[0].numel()
    if spec.hadamard is not None and columns % spec.hadamard:
        raise ConfigError(
            f"bitlinearize: {name} has {columns} inputs, which the preset's Hadamard blocks of "
            f"{spec.hadamard} do not divide; exclude it or use another preset"
        )
    sums_integers = spec.product == "integer" and isinstance(layer, nn.Linear)
    if sums_integers and columns > max_exact_inputs(spec):
        raise ConfigError(
            f"bitlinearize: {name} has {columns} inputs, and fp32 holds sums of products of the "
            f"preset's codes exactly up to {max_exact_inputs(spec)}; exclude it or use "
            "product='dequantized'"
        )
    for num_rows in rows or (layer.weight.shape[0],):
        try:
            tile_counts(num_rows, columns, spec.weight)
        except ConfigError as error:
            raise ConfigError(f"bitlinearize: {name}: {error}") from None


def _check_fast_path(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """In evaluation, PyTorch's encoder layer hands the weights to a kernel, past any forward."""
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for parent in _parents(chosen):
        if isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer):
            raise ConfigError(
                f"bitlinearize: {parent or 'the model'} is an nn.TransformerEncoderLayer, whose "
                "fast path reads the weights past BitLinear; call "
                "torch.backends.mha.set_fastpath_enabled(False) first"
            )


def _parents(names: Mapping[str, nn.Module]) -> Iterator[str]:
    for name in names:
        while name:
            name = name.rpartition(".")[0]
            yield name


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _as_tuple(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{len(names)} layers: {shown}{', ...' if len(names) > 5 else ''}"
