"""Tiles of the matrix kernels by class of shape: data, not a search at run time.

M rows and N columns of the result, K the summed dimension. They were chosen by registers, spills
and shared memory of the code compiled for sm_90 (docs/kernels.md); none has been timed yet.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """One program's share, and how the compiler pipelines it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # row blocks that run together, for the L2 cache


class Rule(NamedTuple):
    """`tile` serves every shape with M >= min_m and N >= min_n; the first that fits wins."""

    min_m: int
    min_n: int
    tile: Tile


# int8 @ int8 -> int32: K in bytes, so 128 of them are one 128-byte line.
FORWARD = (
    Rule(1024, 1024, Tile(128, 256, 128, num_warps=8, num_stages=4)),
    Rule(65, 1, Tile(128, 128, 128, num_warps=8, num_stages=4)),
    Rule(1, 1, Tile(64, 128, 128, num_warps=4, num_stages=4)),
)
# n bytes of a gradient @ int8 -> n int32 tiles of sums; see FORWARD. By n.
GRADIENT_BYTES = {
    1: FORWARD,
    2: (
        Rule(65, 1, Tile(128, 128, 128, num_warps=8, num_stages=4)),
        Rule(1, 1, Tile(64, 128, 128, num_warps=4, num_stages=4)),
    ),
    3: (
        Rule(65, 1, Tile(128, 128, 128, num_warps=8, num_stages=3)),
        Rule(1, 1, Tile(64, 128, 128, num_warps=4, num_stages=3)),
    ),
}
# 16-bit gradient @ ternary codes, and 16-bit gradientᵀ @ dequantized int8, summed in fp32.
BACKWARD = (
    Rule(1024, 1024, Tile(128, 256, 64, num_warps=8, num_stages=3)),
    Rule(65, 1, Tile(128, 128, 64, num_warps=8, num_stages=3)),
    Rule(1, 1, Tile(64, 128, 64, num_warps=4, num_stages=3)),
)
# fp32 gradients run on the CUDA cores: correct, and slow.
BACKWARD_FP32 = (Rule(1, 1, Tile(64, 64, 16, num_warps=8, num_stages=2)),)
# Rows that do not start at multiples of 16 elements are loaded element by element, which takes
# registers: correct, and slow.
UNALIGNED = (Rule(1, 1, Tile(64, 64, 64, num_warps=8, num_stages=2)),)
_ALIGNMENT = 16


def forward_tile(M: int, N: int, strides: tuple[int, int]) -> Tile:
    """Tile of the int8 product; `strides` are those of the rows of both operands."""
    return _choose(FORWARD if _are_aligned(strides) else UNALIGNED, M, N)


def backward_tile(M: int, N: int, strides: tuple[int, int], *, is_fp32: bool) -> Tile:
    """Tile of a gradient product; `is_fp32`: the gradient that comes in is."""
    if is_fp32:
        return _choose(BACKWARD_FP32, M, N)
    return _choose(BACKWARD if _are_aligned(strides) else UNALIGNED, M, N)


def gradient_bytes_tile(M: int, N: int, num_bytes: int) -> Tile:
    """Tile of a product of a gradient's bytes, whose operands are always aligned."""
    return _choose(GRADIENT_BYTES[num_bytes], M, N)


def _are_aligned(strides: tuple[int, int]) -> bool:
    return all(stride % _ALIGNMENT == 0 for stride in strides)


def _choose(rules: tuple[Rule, ...], M: int, N: int) -> Tile:
    return next(rule.tile for rule in rules if rule.min_m <= M and rule.min_n <= N)
