"""The Triton kernels of the backward pass in integers, and of the norm's gradient.

Run as `triton_kernel_cases.py` is.

Shapes: T tokens, D inputs, F outputs.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels import (
    plain_backward,
    triton_gradient,
    triton_gradient_gemm,
    triton_norm,
)
from bitscale.quant.kernels.linear import rms_norm_rows, ternary_linear
from bitscale.quant.kernels.table import GradientBits, Kernels
from bitscale.quant.kernels.tiles import GRADIENT_BYTES, Tile
from bitscale.quant.reference import Int8Rows, Ternary
from triton_inputs import (
    DEVICE,
    DTYPES,
    EPS,
    FLOAT32_MAX,
    INF,
    NAN,
    REFERENCE,
    TRITON,
    among_nans,
    assert_same,
    error,
    gaussian,
    on_cpu,
    operands,
    poisoned_outputs,  # noqa: F401 - a fixture of every case
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

BITS = [8, 16, 24]


# --- Rounding ---

SMALLEST = plain_backward.SMALLEST_PEAK
HARD_GRADIENTS = {
    "one": torch.tensor([[-3.0]]),
    "zeros": torch.zeros(3, 17),
    "negative zeros": -torch.zeros(2, 5),
    "peaks about the smallest": torch.tensor([[SMALLEST], [-SMALLEST / 3], [3 * SMALLEST]]),
    "denormals": torch.tensor([[1e-45, -1e-40, 1e-39], [0.0, 1e-45, -0.0]]),
    "one outlier": torch.full((9, 140), 1e-3).index_put_((torch.tensor(4),), torch.tensor(-1e4)),
    "ties": torch.cat([torch.arange(-127.0, 127.5, 0.5), torch.tensor([32512.0])]).expand(2, -1),
    "fine ties": torch.tensor([[8323072.0, 4194303.5, 2097152.5, -0.5, 1.5, 8323071.5]]),
    "limits": torch.tensor([[1.0, -1.0, 0.99999994, -0.99999994]]),
    "inf": torch.tensor([[INF, 1.0, -2.0], [0.5, -0.1, 0.3], [-INF, INF, 0.0]]),
    "nan": torch.tensor([[NAN, 1.0, -2.0], [0.5, NAN, INF], [3.0, 2.0, 1.0]]),
    "huge": torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX, 1.0]]),
    "odd": gaussian(33, 67).cpu(),
    "long rows": gaussian(2, 4100).cpu(),
}


def assert_codes(got: triton_gradient.GradientBytes, g_TF: Tensor, bits: int, dim: int) -> None:
    """Bytes and steps are those of `quantize_gradient`, and zeros lie past the end of a row."""
    codes_TF, step = on_cpu(plain_backward.quantize_gradient)(g_TF, bits, dim)
    want = torch.stack(plain_backward.split_bytes(codes_TF, bits))
    num_bytes, rows, columns = want.shape if dim == 1 else want.mT.shape
    assert len(got.bytes_nRK) == num_bytes == bits // 8
    assert_same(got.bytes_nRK[:, :rows, :columns], want if dim == 1 else want.mT)
    assert not got.bytes_nRK[:, :rows, columns:].any()
    assert_same(got.step_R, step.flatten())


@pytest.mark.parametrize("bits", [8, 24])
@pytest.mark.parametrize("name", HARD_GRADIENTS)
def test_codes_of_hard_gradients(name: str, bits: int) -> None:
    g_TF = HARD_GRADIENTS[name].to(DEVICE)
    assert_codes(triton_gradient.token_bytes(among_nans(g_TF), bits), g_TF, bits, 1)
    r_T1 = gaussian(len(g_TF), 1, seed=1).abs() + 0.1
    got = triton_gradient.feature_bytes(among_nans(g_TF), r_T1, bits)
    assert_codes(got, g_TF * r_T1, bits, 0)


@pytest.mark.parametrize("bits", [8, 16])
def test_codes_of_several_tiles(bits: int) -> None:
    g_TF, r_T1 = gaussian(300, 130), gaussian(300, 1, seed=1).abs()
    assert_codes(triton_gradient.feature_bytes(g_TF, r_T1, bits), g_TF * r_T1, bits, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    whole = gaussian(40, 12, 6, dtype=dtype)
    for g_TF in (whole[0].T, whole[::3, 1:7, 2], whole[:, 0, :1].expand(40, 5)):
        assert_codes(triton_gradient.token_bytes(g_TF, 8), g_TF.float(), 8, 1)


def test_scales_that_are_not_finite() -> None:
    g_TF, r_T1 = gaussian(5, 4), torch.tensor([[1.0], [INF], [2.0], [NAN], [0.0]], device=DEVICE)
    for part in (slice(0, 2), slice(0, 3, 2), slice(2, 5)):
        got = triton_gradient.feature_bytes(g_TF[part], r_T1[part].contiguous(), 16)
        assert_codes(got, g_TF[part] * r_T1[part], 16, 0)


def test_stochastic_rounding_has_the_right_mean() -> None:
    g_TF = torch.full((40, 1000), 0.3, device=DEVICE)
    g_TF[:, 0] = 127.0  # step 1
    codes_TF = triton_gradient.token_bytes(g_TF, 8).bytes_nRK[0, :40, 1:1000]
    assert set(codes_TF.flatten().tolist()) == {0, 1}
    assert abs(float(codes_TF.double().mean()) - 0.3) < 4 * (0.21 / codes_TF.numel()) ** 0.5


def test_a_negative_denormal_is_rounded_down() -> None:
    """A GPU's floor may make 0 of it; u is 0 here, so that it meets the floor as it is."""
    g_TF = torch.tensor([[127.0, 0.0]], device=DEVICE)  # step 1
    g_TF.view(torch.int32)[0, 1] = 0x803BD0F7 - 2**32
    assert -1.2e-38 < float(g_TF[0, 1]) < 0.0
    assert float(plain_backward.hash_noise(g_TF.cpu())[0, 1]) == 0.0
    got = triton_gradient.token_bytes(g_TF, 8)
    assert got.bytes_nRK[0, 0, :2].tolist() == [127, -1]
    assert_codes(got, g_TF, 8, 1)


@pytest.mark.parametrize(("R", "C"), [(1, 1), (5, 300), (129, 127), (256, 128)])
def test_transposed_codes(R: int, C: int) -> None:
    generator = torch.Generator().manual_seed(R)
    whole = torch.randint(-128, 128, (R, C + 3), generator=generator, dtype=torch.int8).to(DEVICE)
    got_CR = triton_gradient.transposed(whole[:, :C])
    assert_same(got_CR[:C, :R], whole[:, :C].T)
    assert not got_CR[:C, R:].any()


# --- Products ---


@triton.jit
def combine_elements(sums_nE, out_E, E, NUM_BYTES: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.arange(0, BLOCK)
    sums_0, sums_1 = tl.load(sums_nE + e), tl.load(sums_nE + E + e)
    sums_2 = tl.load(sums_nE + (NUM_BYTES - 1) * E + e)
    tl.store(out_E + e, triton_gradient_gemm.combine(sums_0, sums_1, sums_2, NUM_BYTES))


@pytest.mark.parametrize("num_bytes", [2, 3])
def test_sums_of_bytes_are_rounded_once(num_bytes: int) -> None:
    """Sums of every size up to 2^30, among them such whose whole is beside or on a tie."""
    E = 4096
    generator = torch.Generator().manual_seed(0)
    shape = (num_bytes, E)
    shifts = torch.randint(0, 31, shape, generator=generator)
    sums_nE = torch.randint(-(2**30), 2**30 + 1, shape, generator=generator) >> shifts
    sums_nE[:, :4] = torch.tensor([2**30, -(2**30), 0, -1])
    # 2^24 + an odd number lies midway between two fp32 numbers.
    sums_nE[0, 100:400] = 2 ** (24 - 8 * (num_bytes - 1))
    sums_nE[-1, 100:400] = torch.arange(-150, 150)
    sums_nE[1:-1, 100:400] = 0
    powers = 256 ** torch.arange(num_bytes - 1, -1, -1)
    want_E = (sums_nE * powers[:, None]).sum(0).to(torch.float32)  # exact, then rounded
    out_E = torch.empty(E, device=DEVICE)
    combine_elements[(1,)](
        sums_nE.to(DEVICE, torch.int32), out_E, E, NUM_BYTES=num_bytes, BLOCK=E,
        enable_fp_fusion=False,
    )  # fmt: skip
    assert_same(out_E, want_E.to(DEVICE))


def assert_products(
    x: Int8Rows, weight: Ternary, grad_TF: Tensor, bits: int, tile: Tile | None = None
) -> None:
    """Both products, with and without main_grad, are bit for bit those of the specification."""
    got_TD = triton_gradient_gemm.input_grad(among_nans(grad_TF), weight, bits, tile)
    assert_same(got_TD, REFERENCE.input_grad(grad_TF, weight, bits))
    args = (grad_TF, x, grad_TF.dtype)
    for main_grad_FD in (None, gaussian(grad_TF.shape[-1], x.codes_TD.shape[-1], seed=8)):
        before_FD = None if main_grad_FD is None else main_grad_FD.clone()
        want_FD = REFERENCE.weight_grad(*args, before_FD, bits)
        got_FD = triton_gradient_gemm.weight_grad(*args, main_grad_FD, bits, tile)
        assert_same(got_FD, want_FD)
        assert main_grad_FD is None or got_FD is main_grad_FD


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("T", "D", "F", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (5, 64, 3, torch.float16),
        (66, 130, 129, torch.bfloat16),
        (7, 140, 90, torch.float32),
    ],
)
def test_integer_gradients(T: int, D: int, F: int, dtype: torch.dtype, bits: int) -> None:
    assert_products(*operands(T, D, F, dtype), bits)


@pytest.mark.parametrize(
    ("bits", "tile"),
    [(8 * n, rule.tile) for n, rules in GRADIENT_BYTES.items() for rule in rules],
    ids=str,
)
def test_every_tile_of_gradient_bytes(bits: int, tile: Tile) -> None:
    assert_products(*operands(66, 12, 70, torch.float32), bits, tile)


@pytest.mark.parametrize("T", [8, 9, 17])
def test_chunks_of_tokens(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_backward, "CHUNK_TOKENS", 8)
    x, weight, grad_TF = operands(T, 20, 30, torch.bfloat16)
    for bits in (8, 24):
        assert_products(x, weight, grad_TF, bits)


def test_leading_dimensions_and_strides() -> None:
    x, weight, grad_TF = operands(12, 20, 30, torch.bfloat16)
    rows = Int8Rows(x.codes_TD.view(3, 4, 20), x.scale_T1.view(3, 4, 1))
    for grad in (grad_TF.view(3, 4, 30), gaussian(30, 4, 3).permute(2, 1, 0)):
        got = TRITON.input_grad(grad, weight, 16)
        assert_same(got, REFERENCE.input_grad(grad, weight, 16))
        args = (grad, rows, torch.float32, None, 16)
        assert_same(TRITON.weight_grad(*args), REFERENCE.weight_grad(*args))


@pytest.mark.parametrize("bits", BITS)
def test_non_finite_gradients_surface(bits: GradientBits) -> None:
    x, weight, grad_TF = operands(6, 20, 30, torch.bfloat16)
    grad_TF[1, 4], grad_TF[3, 7] = NAN, -INF
    assert_products(x, weight, grad_TF, bits)
    grad_TD = TRITON.input_grad(grad_TF, weight, bits)
    assert grad_TD.isfinite().all(dim=1).tolist() == [True, False, True, False, True, True]
    assert not grad_TD[[1, 3]].isfinite().any()
    grad_FD = TRITON.weight_grad(grad_TF, x, torch.float32, None, bits)
    assert (~grad_FD.isfinite()).all(dim=1).nonzero().flatten().tolist() == [4, 7]
    assert int((~grad_FD.isfinite()).any(dim=1).sum()) == 2


@pytest.mark.parametrize("bits", BITS)
def test_empty_batch(bits: GradientBits) -> None:
    x, weight, grad_TF = operands(0, 30, 20, torch.bfloat16)
    assert TRITON.input_grad(grad_TF, weight, bits).shape == (0, 30)
    got_FD = TRITON.weight_grad(grad_TF, x, torch.bfloat16, None, bits)
    assert_same(got_FD, torch.zeros(20, 30, dtype=torch.bfloat16, device=DEVICE))
    main_grad_FD = gaussian(20, 30)
    before_FD = main_grad_FD.clone()
    TRITON.weight_grad(grad_TF, x, torch.bfloat16, main_grad_FD, bits)
    assert_same(main_grad_FD, before_FD)


# --- The norm's gradient ---


def exact_norm_grad(
    grad_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In fp64, of the same rstd and of the n that multiplied the weight."""
    grad, n_TD = grad_TD.double(), x_TD.double() * rstd_T1.double()
    g_TD = grad if weight_D is None else grad * weight_D.double()
    grad_x = rstd_T1.double() * (g_TD - n_TD * (g_TD * n_TD).mean(dim=-1, keepdim=True))
    rounded_TD = (x_TD.float() * rstd_T1).to(x_TD.dtype).double()
    return grad_x, (grad * rounded_TD).flatten(0, -2).sum(0)


def assert_norm_grad(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor | None, stored_TD: Tensor | None = None
) -> None:
    """Error against fp64 at most twice that of the fp32 specification."""
    rstd_T1 = (x_TD.float().square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    got = TRITON.rms_norm_grad(grad_TD, x_TD if stored_TD is None else stored_TD, rstd_T1, weight_D)
    want = REFERENCE.rms_norm_grad(grad_TD, x_TD, rstd_T1, weight_D)
    exact = exact_norm_grad(grad_TD, x_TD, rstd_T1, weight_D)
    assert (got[1] is None) == (weight_D is None)
    for value, plain, reference in zip(got, want, exact, strict=True):
        if value is not None:
            assert (value.dtype, value.shape) == (plain.dtype, plain.shape)
            assert error(value, reference) <= 2 * error(plain, reference) + 1e-12


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "programs"), [(1, 1, 1), (5, 65, 1), (19, 1000, 4), (67, 7, 67)]
)
def test_gradient_of_the_norm(
    T: int,
    D: int,
    programs: int,
    dtype: torch.dtype,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_norm, "_MIN_PROGRAMS", programs)
    x_TD, grad_TD = gaussian(T, D, seed=1, dtype=dtype) * 3, gaussian(T, D, seed=2, dtype=dtype)
    weight_D = 1 + 0.1 * gaussian(D, seed=3, dtype=dtype) if weighted else None
    assert_norm_grad(among_nans(grad_TD), x_TD, weight_D, stored_TD=among_nans(x_TD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_norm_of_long_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_norm, "_MIN_PROGRAMS", 2)
    D = 8193 if dtype == torch.float32 else 16385
    x_TD, grad_TD = gaussian(3, D, seed=1, dtype=dtype), gaussian(3, D, seed=2, dtype=dtype)
    assert_norm_grad(grad_TD, x_TD, 1 + 0.1 * gaussian(D, seed=3, dtype=dtype))
    assert_norm_grad(grad_TD[:1], x_TD[:1], None)


def test_gradient_of_the_norm_of_a_row_with_an_outlier() -> None:
    x_TD, grad_TD = gaussian(6, 100, seed=1), gaussian(6, 100, seed=2)
    x_TD[2, 5], grad_TD[3, 6], x_TD[4] = 1e6, 1e6, 0.0
    assert_norm_grad(grad_TD, x_TD, 1 + gaussian(100, seed=3))


def test_gradient_of_the_norm_of_any_layout() -> None:
    x_BTD, weight_D = gaussian(2, 3, 40, dtype=torch.bfloat16), 1 + 0.1 * gaussian(40, seed=3)
    grad_BTD = gaussian(40, 2, 3).permute(1, 2, 0)  # fp32, as the weight promotes
    assert_norm_grad(grad_BTD, x_BTD, weight_D)
    assert_norm_grad(gaussian(40).expand(2, 3, 40), gaussian(3, 2, 40).transpose(0, 1), None)


def test_non_finite_values_surface_in_the_gradient_of_the_norm() -> None:
    x_TD, grad_TD, weight_D = gaussian(5, 9), gaussian(5, 9, seed=1), gaussian(9, seed=2)
    x_TD[1, 2], grad_TD[3, 4] = NAN, INF
    rstd_T1 = x_TD.square().mean(dim=-1, keepdim=True).rsqrt()
    args = (grad_TD, x_TD, rstd_T1, weight_D)
    want = REFERENCE.rms_norm_grad(*args)
    for got, expected in zip(TRITON.rms_norm_grad(*args), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_gradient_of_the_norm_of_an_empty_batch() -> None:
    empty_TD, weight_D = torch.zeros(0, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    grad_x, grad_weight = TRITON.rms_norm_grad(empty_TD, empty_TD, empty_TD[:, :1], weight_D)
    assert grad_x.shape == (0, 8)
    assert_same(grad_weight, torch.zeros(8, device=DEVICE))


# --- A training step ---


def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
    """x, norm weight, latent weight and bias of a layer, and the gradient of its output."""
    shapes = {"x": (18, 48), "norm": (48,), "w": (33, 48), "bias": (33,)}
    tensors = {
        name: gaussian(*shape, seed=seed, dtype=dtype).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return {**tensors, "grad": gaussian(18, 33, seed=9, dtype=dtype)}


def step(t: dict[str, Tensor], kernels: Kernels, bits: GradientBits) -> list[Tensor]:
    """Every kernel once: output and gradients of a normed layer, and both blends."""
    normed = rms_norm_rows(t["x"], t["norm"], 1e-5, EPS, kernels)
    w = t["w"].detach()
    weight = kernels.ternarize(w, "absmean", EPS)
    main_grad_FD = torch.zeros(w.shape, device=w.device)
    layer = (normed.carrier_TD, t["w"], t["bias"], normed.rows, weight, kernels)
    y_TF = ternary_linear(*layer, bits=bits)
    y_TF_main = ternary_linear(*layer, bits=bits, main_grad_FD=main_grad_FD)
    inputs = [t["x"], t["norm"], t["w"], t["bias"]]
    grads = torch.autograd.grad(y_TF, inputs, t["grad"], retain_graph=True)
    torch.autograd.grad(y_TF_main, [t["x"], t["w"]], t["grad"], allow_unused=True)
    blends = [
        kernels.blend_weight(w, "absmedian", EPS, 0.5),
        kernels.blend_rows(t["x"].detach(), EPS, 0.5),
    ]
    return [y_TF.detach(), *grads, main_grad_FD, *blends]


@pytest.mark.parametrize("bits", [None, 8, 24])
def test_step_equals_the_reference(bits: GradientBits) -> None:
    t = leaves(torch.bfloat16)
    got, want = step(t, TRITON, bits), step(t, REFERENCE, bits)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs an NVIDIA GPU")
@pytest.mark.parametrize("bits", [None, *BITS])
def test_step_in_a_cuda_graph(bits: GradientBits) -> None:
    """Nothing waits for the device, and a captured step computes what it is given later."""
    static = leaves(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static, TRITON, bits)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(static, TRITON, bits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(static, TRITON, bits)
    for seed in range(2):
        with torch.no_grad():
            for i, t in enumerate(static.values()):
                t.copy_(gaussian(*t.shape, seed=20 * seed + i))
        graph.replay()
        for got, want in zip(outputs, step(static, TRITON, bits), strict=True):
            assert_same(got, want)
