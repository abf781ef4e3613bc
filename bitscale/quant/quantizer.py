"""Codes and scales of one tensor under a `CodeSpec`, in plain PyTorch.

Shapes: F rows, D columns of a matrix; A × B tiles of it, each with its own scale: matrix 1 × 1,
row F × 1, group F × (D / size), row_shard n × 1, column_shard 1 × n. N elements a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bitscale.config.spec import SPARSE_BLOCK, CodeSpec
from bitscale.errors import ConfigError

_TWN_THRESHOLD = 0.75  # of the mean magnitude
TO_GRID = 1.5 * 2.0**22  # fp64 beside it are multiples of 2^-30


class Codes(NamedTuple):
    """t̂ = scale · codes, or codes / scale if the spec's scale_form is `multiply`."""

    codes: Tensor  # int8, shaped as the tensor
    scale: Tensor  # [] for one tile, else [A, B]; fp32, or the tensor's dtype if native


def quantize(
    x_FD: Tensor,
    part: CodeSpec,
    generator: torch.Generator | None = None,
    alpha_F: Tensor | None = None,
) -> Codes:
    """Codes of a matrix [F, D] (any floating dtype); no gradient.

    `generator` feeds rounding='stochastic' and defaults to torch's own. `alpha_F`: the learned
    scales, for measure='learned' and only there (initially `learned.initial_scale`).

    Raises:
        ConfigError: the matrix does not divide into the spec's groups, shards or blocks.
        ValueError: learned scales are missing or superfluous.
    """
    if (alpha_F is None) == (part.measure == "learned"):
        raise ValueError(
            f"measure={part.measure!r} with {'no ' if alpha_F is None else ''}learned scales: "
            "measure='learned' needs one for each row (learned.initial_scale), no other has any"
        )
    x_FD = x_FD.detach()
    num_tiles = tile_counts(x_FD.shape[0], x_FD.shape[1], part)
    arithmetic = x_FD.dtype if part.arithmetic == "native" else torch.float32
    t_ABN = _to_tiles(x_FD.to(arithmetic), num_tiles)
    survives_ABN = None
    if alpha_F is not None:
        measure_AB1 = alpha_F.detach().float()[:, None, None]
    else:
        measure_AB1, survives_ABN = _measure(t_ABN, part)
    scale_AB1, scaled_ABN = _scale(t_ABN, measure_AB1, part, x_FD.dtype)
    if survives_ABN is None:
        rounded_ABN = _round(scaled_ABN, part.rounding, generator)
    else:
        # A survivor is never 0: of twn none can be, of sparse_absmean a 0 counts as positive.
        rounded_ABN = torch.where(t_ABN < 0, -1.0, 1.0) * survives_ABN
    codes_ABN = rounded_ABN.clamp_(part.code_min, part.code_max).to(torch.int8)
    scale = scale_AB1.reshape(()) if num_tiles == (1, 1) else scale_AB1.squeeze(-1)
    return Codes(_from_tiles(codes_ABN, x_FD.shape, num_tiles), scale)


def dequantize(codes: Codes, part: CodeSpec) -> Tensor:
    """t̂ in the dtype of the scale, or fp32 where that is narrower and the arithmetic fp32."""
    arithmetic = codes.scale.dtype if part.arithmetic == "native" else torch.float32
    values_FD, scale = codes.codes.to(arithmetic), codes.scale.to(arithmetic)
    if scale.dim():
        A, B = scale.shape
        shape = values_FD.shape
        values = values_FD.view(A, shape[0] // A, B, shape[1] // B)
        scale = scale[:, None, :, None]
        t_hat = values / scale if part.scale_form == "multiply" else values * scale
        return t_hat.view(shape)
    return values_FD / scale if part.scale_form == "multiply" else values_FD * scale


def step(codes: Codes, part: CodeSpec) -> Tensor:
    """The factor of the codes in fp32: s itself, or 1 / q (exact for codes of ±1)."""
    if part.scale_form == "multiply":
        return (1.0 / codes.scale).float()
    return codes.scale.float()


def inside_range(x_FD: Tensor, codes: Codes, part: CodeSpec) -> Tensor:
    """bool [F, D]: code_min <= x / s <= code_max, where the clipped gradient passes."""
    scale = step(codes, part)
    if scale.dim():
        A, B = scale.shape
        scale = scale[:, None, :, None].expand(A, x_FD.shape[0] // A, B, x_FD.shape[1] // B)
        scale = scale.reshape(x_FD.shape)
    scaled_FD = x_FD.detach().float() / scale
    return (scaled_FD >= part.code_min) & (scaled_FD <= part.code_max)


def tile_counts(rows: int, columns: int, part: CodeSpec) -> tuple[int, int]:
    """(A, B) of a matrix. Raises ConfigError if it does not divide into groups, shards, blocks."""
    A, B = _tile_counts(rows, columns, part)
    if part.measure == "sparse_absmean" and columns // B % SPARSE_BLOCK:
        raise ConfigError(
            f"quantizer measure='sparse_absmean' zeroes one of each {SPARSE_BLOCK} inputs, but "
            f"{columns // B} inputs of a [{rows}, {columns}] weight share a scale; use sizes that "
            f"are multiples of {SPARSE_BLOCK}, or another preset"
        )
    return A, B


def _tile_counts(rows: int, columns: int, part: CodeSpec) -> tuple[int, int]:
    match part.granularity:
        case "matrix":
            return 1, 1
        case "row":
            return rows, 1
        case "group":
            assert part.group_size is not None
            if columns % part.group_size:
                raise ConfigError(
                    f"quantizer group_size={part.group_size} does not divide the {columns} inputs "
                    f"of a [{rows}, {columns}] weight; use another size, or granularity='row'"
                )
            return rows, columns // part.group_size
    assert part.num_shards is not None
    by_rows = part.granularity == "row_shard"
    if (rows if by_rows else columns) % part.num_shards:
        raise ConfigError(
            f"quantizer num_shards={part.num_shards} does not divide the "
            f"{rows if by_rows else columns} {'rows' if by_rows else 'columns'} of a "
            f"[{rows}, {columns}] weight; use another number, or granularity='matrix'"
        )
    return (part.num_shards, 1) if by_rows else (1, part.num_shards)


def _to_tiles(x_FD: Tensor, num_tiles: tuple[int, int]) -> Tensor:
    A, B = num_tiles
    rows, columns = x_FD.shape
    # Not -1: a batch may be empty.
    size = (rows // A if A else 1) * (columns // B)
    return (
        x_FD.reshape(A, rows // A if A else 1, B, columns // B).transpose(1, 2).reshape(A, B, size)
    )


def _from_tiles(t_ABN: Tensor, shape: torch.Size, num_tiles: tuple[int, int]) -> Tensor:
    A, B = num_tiles
    rows, columns = shape
    tiles = t_ABN.view(A, B, rows // A if A else 1, columns // B)
    return tiles.transpose(1, 2).reshape(shape)


def _measure(t_ABN: Tensor, part: CodeSpec) -> tuple[Tensor, Tensor | None]:
    """m of every tile, [A, B, 1], and where codes are not 0 if that does not follow by rounding."""
    magnitude = t_ABN.abs()
    if part.measure == "absmax":
        return magnitude.amax(dim=-1, keepdim=True), None
    if part.measure == "rms":
        return t_ABN.square().mean(dim=-1, keepdim=True).sqrt(), None
    if part.measure == "absmedian":
        return magnitude.median(dim=-1, keepdim=True).values, None
    is_exact = part.statistics == "fp64"
    if part.measure == "sparse_absmean":
        survives = _all_but_smallest(magnitude)
        survivors = magnitude * survives
        total = exact_sum(survivors) if is_exact else survivors.sum(dim=-1, keepdim=True)
        count = magnitude.shape[-1] // SPARSE_BLOCK * (SPARSE_BLOCK - 1)
        return total / total.new_full((), count), survives
    # mean() and not sum() / N: in bf16 a sum would be rounded before the division.
    mean = exact_mean(magnitude) if is_exact else magnitude.mean(dim=-1, keepdim=True)
    if part.measure == "absmean":
        return mean, None
    threshold = _TWN_THRESHOLD * mean
    survives = magnitude > threshold
    survivors = magnitude * survives
    total = exact_sum(survivors) if is_exact else survivors.sum(dim=-1, keepdim=True)
    # At least 1: a tile of zeros has no survivors.
    mean_of_survivors = total / survives.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean_of_survivors, magnitude > threshold.to(t_ABN.dtype)


def _all_but_smallest(magnitude_ABN: Tensor) -> Tensor:
    """False at the smallest of each 4 consecutive elements, the first of equals; else True."""
    A, B, N = magnitude_ABN.shape
    blocks = magnitude_ABN.reshape(A, B, N // SPARSE_BLOCK, SPARSE_BLOCK)
    smallest = blocks.sort(dim=-1, stable=True).indices[..., :1]
    survives = torch.ones_like(blocks, dtype=torch.bool).scatter_(-1, smallest, False)
    return survives.view(A, B, N)


def exact_mean(magnitude: Tensor) -> Tensor:
    """fp64 mean over the last dimension, [..., 1], of numbers >= 0 by `exact_sum`."""
    total = exact_sum(magnitude)
    return total / total.new_full((), magnitude.shape[-1])


def exact_sum(magnitude: Tensor) -> Tensor:
    """fp64 sum over the last dimension, [..., 1], the same in any order of summation.

    Each number is first rounded to a multiple of 2^-30; such numbers add up without rounding while
    the sum stays below 2^23 (58M weights of mean 0.14). So blocks, threads, devices and shards of
    tensor parallelism cannot change a bit. The mean moves by 2^-31 at most, and by 2^-31 / sqrt(N)
    in practice: eps, the smallest scale, is 10^4 times as large.
    """
    return (magnitude.double() + TO_GRID - TO_GRID).sum(dim=-1, keepdim=True)


def _scale(
    t_ABN: Tensor, measure_AB1: Tensor, part: CodeSpec, native: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scale that dequantizes, [A, B, 1], and the tile in units of a code."""
    arithmetic = t_ABN.dtype
    # clamp() lets a NaN through, which must stay visible.
    if part.eps_enters == "measure":
        measure_AB1 = measure_AB1.clamp(min=part.eps)
    elif part.eps_enters == "added":
        measure_AB1 = measure_AB1 + part.eps
    if part.scale_form == "multiply":
        scale = (part.numerator / measure_AB1).to(arithmetic)
        if part.scale_dtype == "native":
            scale = scale.to(native).to(arithmetic)
        return scale, t_ABN * scale
    # Not by a number: on a GPU PyTorch would multiply by its reciprocal, which rounds twice.
    scale = (measure_AB1 / measure_AB1.new_full((), part.numerator)).to(arithmetic)
    if part.scale_dtype == "native":
        scale = scale.to(native).to(arithmetic)
    divisor = scale.clamp(min=part.eps) if part.eps_enters == "step" else scale
    scaled_ABN = t_ABN / divisor if part.scale_form == "divide" else t_ABN * (1.0 / divisor)
    if part.scale_dtype == "native_late":
        scale = scale.to(native).to(arithmetic)
    return scale, scaled_ABN


def _round(v: Tensor, rounding: str, generator: torch.Generator | None) -> Tensor:
    match rounding:
        case "half_even":
            return torch.round(v)
        case "half_up":  # as onebitllms: 1 ulp below ½ the sum is 1
            return torch.floor(v + 0.5)
        case "odd":
            return 2.0 * torch.round(0.5 * (v + 1.0)) - 1.0
    whole = v.abs().floor()
    fraction = v.abs() - whole  # exact, which |v| + ½ is not
    if rounding == "half_away":
        return v.sign() * (whole + (fraction >= 0.5))
    # |v| goes up with probability frac|v|; for ternary codes: to ±1 with probability |v|.
    draws = torch.rand(v.shape, generator=generator, device=v.device, dtype=v.dtype)
    return v.sign() * (whole + (fraction >= draws))
