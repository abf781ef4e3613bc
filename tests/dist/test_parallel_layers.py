"""Column- and row-parallel layers on 2 and 4 ranks against the same layer on one.

Shapes: T tokens, D inputs, F outputs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from world import World

from bitscale.config import QuantConfig
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import BitLinear, prepare_weights, set_strength, shared_input
from bitscale.model.collectives import TensorGroup
from bitscale.model.norms import RMSNorm
from bitscale.model.parallel import (
    ColumnBitLinear,
    ColumnParallel,
    RowBitLinear,
    RowParallel,
    ShardedLinear,
    set_up_shard,
)
from bitscale.quant import scales
from bitscale.quant.scales import Shard, group_scales
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.dist

T, D, F = 24, 48, 64
STRENGTHS = {
    "16 bit": SIXTEEN_BIT,
    "ramp": Strength(0.4, 0.7),
    "weights first": Strength(1.0, 0.5),
    "ternary": TERNARY,
}
PRESETS = ["b158", "absmedian", "weight_only"]
World_of = Callable[[int], World]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Results(NamedTuple):
    """Of a layer on one rank, or put together from its ranks."""

    output: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_norm: Tensor
    codes: Tensor | None
    scale: Tensor | None


def make_norm() -> RMSNorm:
    norm = RMSNorm(D, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * gaussian(D, seed=9))
    return norm


def whole_tensors(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of y; rows and columns of very different size, so that a scale
    of a shard is not the scale of the whole."""
    d, f = (D, F) if kind == "column" else (F, D)
    weight = gaussian(f, d, seed=1) * torch.linspace(0.01, 0.05, f)[:, None]
    weight = weight * torch.linspace(0.5, 2.0, d)
    x = gaussian(T, d, seed=2) * torch.linspace(0.2, 3.0, d)
    return x.to(dtype), weight.to(dtype), gaussian(T, f, seed=3, dtype=dtype)


def codes_of(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    prepared = layer.prepared
    if prepared is None or prepared.codes is None:
        return None, None
    return prepared.codes


def alone(kind: str, name: str, preset: str, dtype: torch.dtype) -> Results:
    x, weight, grad_y = whole_tensors(kind, dtype)
    layer = BitLinear(weight.shape[1], weight.shape[0], QuantConfig(preset=preset)).to(dtype)
    norm = make_norm().to(dtype) if kind == "column" else None
    with torch.no_grad():
        layer.weight.copy_(weight)
    set_strength(layer, STRENGTHS[name])
    prepare_weights(layer)
    x.requires_grad_()
    y = layer(shared_input(x, norm, layer))
    y.backward(grad_y)
    grad_norm = torch.zeros(0) if norm is None else norm.weight.grad
    return Results(y.detach(), x.grad, layer.weight.grad, grad_norm, *codes_of(layer))


def gathered(part: Tensor, dim: int) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.cat(parts, dim)


def of_ranks(
    mesh: Mesh, kind: str, name: str, preset: str, dtype: torch.dtype, sequence_parallel: bool
) -> Results:
    """The layer of `alone`, on all the ranks."""
    tp = TensorGroup(dist.group.WORLD, mesh.rank, mesh.world_size, sequence_parallel)
    x, weight, grad_y = whole_tensors(kind, dtype)
    dim = 0 if kind == "column" else 1  # of the weight, that is split
    make = ColumnBitLinear if kind == "column" else RowBitLinear
    layer = make(weight.shape[1], weight.shape[0], QuantConfig(preset=preset), tp).to(dtype)
    norm = make_norm().to(dtype) if kind == "column" else None
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(tp.size, dim)[tp.rank])
    set_strength(layer, STRENGTHS[name])
    prepare_weights(layer)
    if kind == "column":
        x = x.chunk(tp.size)[tp.rank] if sequence_parallel else x
        grad_y = grad_y.chunk(tp.size, 1)[tp.rank]
    else:
        x = x.chunk(tp.size, 1)[tp.rank]
        grad_y = grad_y.chunk(tp.size)[tp.rank] if sequence_parallel else grad_y
    x = x.clone().requires_grad_()
    y = layer(shared_input(x, norm, layer))
    y.backward(grad_y)
    if kind == "column":
        output = gathered(y, 1)
        grad_x = gathered(x.grad, 0) if sequence_parallel else x.grad
        grad_norm = norm.weight.grad
        if sequence_parallel:  # each rank has the gradient of its tokens
            dist.all_reduce(grad_norm)
    else:
        output = gathered(y, 0) if sequence_parallel else y.detach()
        grad_x, grad_norm = gathered(x.grad, 1), torch.zeros(0)
    codes, scale = codes_of(layer)
    if codes is not None:
        codes = gathered(codes, dim)
    return Results(output, grad_x, gathered(layer.weight.grad, dim), grad_norm, codes, scale)


CASES = [
    (kind, name, preset, dtype, sequence_parallel)
    for kind in ("column", "row")
    for name in STRENGTHS
    for preset in PRESETS
    for dtype in (torch.float32, torch.bfloat16)
    for sequence_parallel in (False, True)
    if preset == "b158" or dtype == torch.float32
]


def all_cases(mesh: Mesh) -> list[Results]:
    return [of_ranks(mesh, *case) for case in CASES]


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    if not want.numel():
        return 0.0
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("size", [2, 4])
def test_layers_are_those_of_one_rank(size: int, world_of: World_of) -> None:
    """At λ = 1 codes, scales and outputs bitwise; gradients and the ramp to rounding."""
    per_rank = world_of(size).run(all_cases)
    for index, case in enumerate(CASES):
        kind, name, preset, dtype, _ = case
        want = alone(kind, name, preset, dtype)
        bound = 2e-6 if dtype == torch.float32 else 1.5e-2
        for rank, results in enumerate(per_rank):
            got = results[index]
            where = f"{case} on rank {rank}"
            if want.codes is not None:
                assert got.codes is not None and got.scale is not None
                assert torch.equal(got.codes, want.codes), where
                assert torch.equal(got.scale, want.scale), where
                assert torch.equal(got.output, want.output), where
            for field in ("output", "grad_x", "grad_weight", "grad_norm"):
                assert relative_error(getattr(got, field), getattr(want, field)) < bound, (
                    where,
                    field,
                )


def of_ranks_with_their_own_scales(mesh: Mesh, case: tuple[Any, ...]) -> Results:
    whole = ShardedLinear._scale_group
    ShardedLinear._scale_group = lambda self: None  # the mistake: each shard's own mean
    try:
        return of_ranks(mesh, *case)
    finally:
        ShardedLinear._scale_group = whole


def of_ranks_with_their_own_rows(mesh: Mesh, case: tuple[Any, ...]) -> Results:
    whole = scales.dist.all_reduce

    def skip_maximum(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        return None if op == dist.ReduceOp.MAX else whole(x, op=op, group=group)

    scales.dist.all_reduce = skip_maximum
    try:
        return of_ranks(mesh, *case)
    finally:
        scales.dist.all_reduce = whole


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_local_scale_would_be_noticed(kind: str, world_of: World_of) -> None:
    """The comparison above fails if each rank takes its own scale, as peers do."""
    case = (kind, "ternary", "b158", torch.float32, False)
    want = alone(*case[:4])
    got = world_of(2).run(of_ranks_with_their_own_scales, case)[0]
    assert not torch.equal(got.codes, want.codes)
    assert relative_error(got.output, want.output) > 0.05


def test_a_local_row_maximum_would_be_noticed(world_of: World_of) -> None:
    case = ("row", "ternary", "b158", torch.float32, False)
    got = world_of(2).run(of_ranks_with_their_own_rows, case)[0]
    assert not torch.equal(got.output, alone(*case[:4]).output)


# --- Fused weights, scales of many layers at once ---


def fused(mesh: Mesh, measure: str) -> list[Tensor]:
    """A fused [q; k; v] in Megatron's order, q q k v of each group, over the ranks."""
    tp = TensorGroup(dist.group.WORLD, mesh.rank, mesh.world_size)
    weight = gaussian(F, D, seed=5) * torch.linspace(0.01, 0.1, F)[:, None]
    matrix_F = torch.arange(F) % 16 // 4  # 4 groups of 16 rows: 8 of q, 4 of k, 4 of v
    matrix_F = (matrix_F - 1).clamp(min=0)
    layer = ColumnParallelModule(D, F // tp.size)
    own = slice(mesh.rank * F // tp.size, (mesh.rank + 1) * F // tp.size)
    quant = QuantConfig(weight_scale=measure)
    set_up_shard(layer, quant, tp, matrix_F[own], 3)
    with torch.no_grad():
        layer.weight.copy_(weight[own])
    set_strength(layer, TERNARY)
    prepare_weights(layer)
    codes = layer.prepared.codes
    x = gaussian(T, D, seed=2)
    results = [gathered(codes.codes_FD, 0), gathered(codes.scale, 0), gathered(layer(x), 1)]
    wanted_codes, wanted_scale = torch.empty(F, D, dtype=torch.int8), torch.empty(F)
    wanted_y = torch.empty(T, F)
    for matrix in range(3):
        rows = matrix_F == matrix
        part = BitLinear(D, int(rows.sum()), quant)
        with torch.no_grad():
            part.weight.copy_(weight[rows])
        set_strength(part, TERNARY)
        prepare_weights(part)
        wanted_codes[rows], wanted_scale[rows] = part.prepared.codes
        wanted_y[:, rows] = part(x).detach()
    return [*results, wanted_codes, wanted_scale, wanted_y]


class ColumnParallelModule(ColumnParallel, nn.Linear):
    def __init__(self, d_in: int, d_out: int) -> None:
        nn.Linear.__init__(self, d_in, d_out, bias=False)


@pytest.mark.parametrize("measure", ["absmean", "absmedian"])
@pytest.mark.parametrize("size", [2, 4])
def test_fused_matrices_have_a_scale_each(size: int, measure: str, world_of: World_of) -> None:
    for codes, scale, y, *wanted in world_of(size).run(fused, measure):
        assert len(set(scale.tolist())) == 3
        for got, want in zip((codes, scale, y), wanted, strict=True):
            assert torch.equal(got, want)


def counted_collectives(mesh: Mesh, measure: str, dtype: torch.dtype) -> tuple[Counter[str], int]:
    tp = TensorGroup(dist.group.WORLD, mesh.rank, mesh.world_size)
    quant = QuantConfig(weight_scale=measure)
    layers = nn.ModuleList(
        [ColumnBitLinear(D, F, quant, tp), RowBitLinear(F, D, quant, tp), RowBitLinear(D, D, quant, tp)]
    ).to(dtype)
    set_strength(layers, TERNARY)
    calls: Counter[str] = Counter()
    real = dist.all_reduce

    def counting(x: Tensor, **options: Any) -> Any:
        calls["all_reduce"] += 1
        return real(x, **options)

    scales.dist.all_reduce = counting
    try:
        prepare_weights(layers)
        prepare_weights(layers)
    finally:
        scales.dist.all_reduce = real
    return calls, sum(layer.prepared is not None for layer in layers)


@pytest.mark.parametrize(
    ("measure", "dtype", "wanted"),
    [("absmean", torch.float32, 1), ("absmedian", torch.float32, 4), ("absmedian", torch.bfloat16, 2)],
)
def test_one_collective_for_all_layers(
    measure: str, dtype: torch.dtype, wanted: int, world_of: World_of
) -> None:
    for calls, num_prepared in world_of(2).run(counted_collectives, measure, dtype):
        assert calls["all_reduce"] == wanted
        assert num_prepared == 3


HARD = {
    "zeros": torch.zeros(4, 6),
    "nan on one rank": torch.tensor([[float("nan"), 1.0, 2.0, 0.5]]).expand(4, 4),
    "inf on one rank": torch.tensor([[float("inf"), 1.0, 2.0, 0.5]]).expand(4, 4),
    "even count": torch.tensor([[4.0, -1.0], [3.0, -2.0]]),
    "denormals": torch.tensor([[1e-45, -3e-45, 1e-40, 1e-39]]).expand(3, 4),
    "large and small": torch.tensor([[1e30, 1e-30, 1e3, 1e-3]]),
}


def hard_scales(mesh: Mesh) -> list[Tensor]:
    found = []
    for weight in HARD.values():
        own = Shard(weight.chunk(mesh.world_size, 1)[mesh.rank])
        for measure in ("absmean", "absmedian"):
            found += group_scales([own], measure, 1e-5, dist.group.WORLD)
    return found


def test_scales_of_hard_weights(world_of: World_of) -> None:
    wanted = [
        scale
        for weight in HARD.values()
        for measure in ("absmean", "absmedian")
        for scale in group_scales([Shard(weight)], measure, 1e-5, None)
    ]
    for found in world_of(2).run(hard_scales):
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert wanted[2].isnan() and wanted[3].isnan() and wanted[4].isinf()
    assert float(wanted[7]) == 2.0


# --- Bytes on the wire ---


def gathered_bytes(mesh: Mesh, name: str) -> int:
    """Bytes that a rank receives in the forward pass of q, k and v behind a norm."""
    tp = TensorGroup(dist.group.WORLD, mesh.rank, mesh.world_size, sequence_parallel=True)
    layers = nn.ModuleList(ColumnBitLinear(D, F, QuantConfig(), tp) for _ in range(3)).bfloat16()
    set_strength(layers, STRENGTHS[name])
    prepare_weights(layers)
    received = 0
    real = dist.all_gather_into_tensor

    def counting(out: Tensor, x: Tensor, **options: Any) -> Any:
        nonlocal received
        received += out.numel() * out.element_size() - x.numel() * x.element_size()
        return real(out, x, **options)

    from bitscale.model import collectives

    collectives.dist.all_gather_into_tensor = counting
    try:
        x = gaussian(T // mesh.world_size, 2, D, dtype=torch.bfloat16)
        given = shared_input(x, make_norm().bfloat16(), *layers)
        for layer in layers:
            layer(given)
    finally:
        collectives.dist.all_gather_into_tensor = real
    return received


def test_int8_codes_travel_once_for_all_that_read_them(world_of: World_of) -> None:
    tokens_of_others = 2 * T // 2
    assert world_of(2).run(gathered_bytes, "16 bit") == [2 * D * tokens_of_others] * 2
    assert world_of(2).run(gathered_bytes, "ternary") == [(D + 4) * tokens_of_others] * 2
