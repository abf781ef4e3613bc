"""Backward products with integer gradients, and the norm's gradient, against float64.

Shapes: T tokens, D inputs, F outputs.
"""

from dataclasses import replace

import pytest
import torch
from gaussian import gaussian
from torch import Tensor

from bitscale.config.presets import preset
from bitscale.config.spec import QuantSpec
from bitscale.errors import ConfigError
from bitscale.quant.kernels import plain, plain_backward
from bitscale.quant.kernels.plain_backward import hash_noise, quantize_gradient, split_bytes
from bitscale.quant.kernels.table import GradientBits
from bitscale.quant.reference import Int8Rows, Ternary

pytestmark = pytest.mark.unit

T, D, F = 130, 48, 33
BITS: list[GradientBits] = [8, 16, 24]
# Relative to float64, in norm: half a step of 1/127 and so on, over the ratio of norm to peak.
BOUNDS = {None: 1e-6, 8: 5e-2, 16: 2e-4, 24: 1e-6}
INF, NAN = float("inf"), float("nan")


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Int8Rows, Ternary]:
    grad_TF = (gaussian(T, F, seed=1) * 10.0 ** gaussian(T, 1, seed=2)).to(dtype)
    rows = plain.quantize_rows(gaussian(T, D, seed=3) * 4, 1e-5)
    return grad_TF, rows, plain.ternarize(gaussian(F, D, seed=4) * 0.02, "absmean", 1e-5)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [None, *BITS])
def test_products_against_float64(bits: GradientBits) -> None:
    grad_TF, rows, weight = operands()
    exact_TD = grad_TF.double() @ weight.codes_FD.double() * weight.scale.double()
    got_TD = plain_backward.input_grad(grad_TF, weight, bits)
    assert relative_error(got_TD, exact_TD) < BOUNDS[bits]
    exact_FD = grad_TF.double().T @ (rows.codes_TD.double() * rows.scale_T1.double())
    got_FD = plain_backward.weight_grad(grad_TF, rows, torch.float32, None, bits)
    assert relative_error(got_FD, exact_FD) < BOUNDS[bits]


def test_24_bits_are_no_worse_than_fp32() -> None:
    grad_TF = gaussian(64, 4096)
    weight = plain.ternarize(gaussian(4096, 64, seed=4), "absmean", 1e-5)
    exact_TD = grad_TF.double() @ weight.codes_FD.double() * weight.scale.double()
    errors = [
        relative_error(plain_backward.input_grad(grad_TF, weight, bits), exact_TD)
        for bits in (24, None)
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_leading_dimensions_dtype_and_main_grad(bits: GradientBits) -> None:
    grad_TF, rows, weight = operands(torch.bfloat16)
    flat_TD = plain_backward.input_grad(grad_TF, weight, bits)
    assert flat_TD.dtype == torch.bfloat16
    got = plain_backward.input_grad(grad_TF.view(2, 65, F), weight, bits)
    assert torch.equal(got, flat_TD.view(2, 65, D))
    batched = Int8Rows(rows.codes_TD.view(2, 65, D), rows.scale_T1.view(2, 65, 1))
    flat_FD = plain_backward.weight_grad(grad_TF, rows, torch.float32, None, bits)
    main_grad_FD = torch.full((F, D), 0.5)
    returned = plain_backward.weight_grad(
        grad_TF.view(2, 65, F), batched, torch.bfloat16, main_grad_FD, bits
    )
    assert returned is main_grad_FD
    assert torch.equal(main_grad_FD, flat_FD + 0.5)


@pytest.mark.parametrize("bits", [None, *BITS])
def test_an_empty_batch(bits: GradientBits) -> None:
    _, _, weight = operands()
    empty = Int8Rows(torch.zeros(2, 0, D, dtype=torch.int8), torch.zeros(2, 0, 1))
    grad_TF = torch.zeros(2, 0, F)
    assert plain_backward.input_grad(grad_TF, weight, bits).shape == (2, 0, D)
    grad_FD = plain_backward.weight_grad(grad_TF, empty, torch.float32, None, bits)
    assert torch.equal(grad_FD, torch.zeros(F, D))


@pytest.mark.parametrize("bits", BITS)
def test_chunks_of_tokens(bits: GradientBits, monkeypatch: pytest.MonkeyPatch) -> None:
    grad_TF, rows, _ = operands()
    monkeypatch.setattr(plain_backward, "CHUNK_TOKENS", 50)
    got = plain_backward.weight_grad(grad_TF, rows, torch.float32, None, bits)
    parts = [
        plain_backward.weight_grad(
            grad_TF[part], Int8Rows(*(t[part] for t in rows)), torch.float32, None, bits
        )
        for part in (slice(0, 50), slice(50, 100), slice(100, 130))
    ]
    assert torch.equal(got, parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_hard_rows(bits: int) -> None:
    limit = 127 * 256 ** (bits // 8 - 1)
    g = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0],
            [1e-45, -1e-40, 0.0, 1e-38],
            [1.0, -1.0, 1e-9, 0.0],
            [3e38, -3e38, 1.0, 1e30],
            [INF, 1.0, -2.0, 0.0],
            [NAN, 1.0, -2.0, 0.0],
        ]
    )
    codes, step = quantize_gradient(g, bits)
    assert codes.dtype == torch.int32
    assert codes[0].tolist() == [0, 0, 0, 0]
    assert codes[2, :2].tolist() == [limit, -limit]
    assert int(codes.abs().max()) <= limit
    assert step[:4].isfinite().all() and (step[:4] > 0).all()
    assert step[4].isinf() and step[5].isnan()
    other_codes, other_step = quantize_gradient(g.T.contiguous(), bits, dim=0)
    torch.testing.assert_close(other_step, step.T, rtol=0, atol=0, equal_nan=True)
    if bits != 8:  # there the position counts
        assert torch.equal(other_codes, codes.T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [INF, NAN])
def test_infinite_and_nan_gradients_surface(bits: GradientBits, bad: float) -> None:
    grad_TF, rows, weight = operands()
    grad_TF[7, 5] = bad
    grad_TD = plain_backward.input_grad(grad_TF, weight, bits)
    assert grad_TD[7].isnan().all()
    assert grad_TD[:7].isfinite().all() and grad_TD[8:].isfinite().all()
    grad_FD = plain_backward.weight_grad(grad_TF, rows, torch.float32, None, bits)
    assert grad_FD[5].isnan().all()
    assert grad_FD[:5].isfinite().all() and grad_FD[6:].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_the_code(bits: int) -> None:
    limit = 127 * 256 ** (bits // 8 - 1)
    codes = torch.cat([torch.arange(-400, 401), torch.tensor([limit, -limit, limit - 1])])
    codes = codes.clamp(-limit, limit).to(torch.int32)
    parts = split_bytes(codes, bits)
    assert len(parts) == bits // 8
    assert all(part.dtype == torch.int8 for part in parts)
    total = sum(part.long() * 256 ** (len(parts) - 1 - i) for i, part in enumerate(parts))
    assert torch.equal(total, codes.long())


def test_eight_bits_are_rounded_without_bias() -> None:
    """The mean over many positions of an equal value is the value, to 4 standard errors."""
    g = torch.full((1, 40_000), 0.3)
    g[0, 0] = 12.7  # the step is 0.1, and 0.3 lies on no code in fp32
    g[0, 1:] = 0.337
    codes, step = quantize_gradient(g, 8)
    values = codes[0, 1:].double() * step.double()
    assert set(codes[0, 1:].tolist()) == {3, 4}
    deviation = 0.1 * (0.37 * 0.63) ** 0.5
    assert abs(float(values.mean()) - 0.337) < 4 * deviation / 200


def test_noise_is_uniform_and_a_function_of_value_and_position() -> None:
    g = gaussian(200, 300)
    noise = hash_noise(g)
    assert torch.equal(noise, hash_noise(g.clone()))
    assert float(noise.min()) >= 0.0 and float(noise.max()) < 1.0
    counts = torch.histc(noise, 10, 0, 1)
    expected = g.numel() / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9  # chi², 9 df, p = .001
    same = hash_noise(torch.ones(100, 100))
    assert same.unique().numel() > 9_900  # equal values are told apart by position
    neighbours = torch.stack([same[:, 1:].flatten(), same[:, :-1].flatten()])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.04


@pytest.mark.parametrize("affine", [True, False])
def test_norm_gradient_against_float64(affine: bool) -> None:
    x_TD, grad_TD = gaussian(T, D) * 3, gaussian(T, D, seed=5)
    weight_D = 1 + 0.3 * gaussian(D, seed=6) if affine else None
    rstd_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + 1e-5)
    grad_x, grad_weight = plain_backward.rms_norm_grad(grad_TD, x_TD, rstd_T1, weight_D)
    exact_x = x_TD.double().requires_grad_()
    exact_w = None if weight_D is None else weight_D.double().requires_grad_()
    normed = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + 1e-5)
    out = normed if exact_w is None else normed * exact_w
    out.backward(grad_TD.double())
    assert relative_error(grad_x, exact_x.grad) < 1e-6
    assert (grad_weight is None) == (not affine)
    if grad_weight is not None:
        assert relative_error(grad_weight, exact_w.grad) < 1e-6


def test_specification_refuses_bits_where_no_kernel_is() -> None:
    assert replace(preset("b158"), gradient_bits=8).gradient_bits == 8
    assert replace(preset("absmedian"), gradient_bits=16).gradient_bits == 16
    with pytest.raises(ConfigError, match=r"^gradient_bits=8 needs b158's codes"):
        replace(preset("twn"), gradient_bits=8)
    with pytest.raises(ConfigError, match=r"^gradient_bits=12 is none of 8, 16, 24; use one of"):
        replace(preset("b158"), gradient_bits=12)  # type: ignore[arg-type]
    assert isinstance(preset("hf"), QuantSpec)
