"""The CPU's kernels as a table: `kernel: cpu`."""

from bitscale.quant.kernels import cpu_gemm, cpu_rows
from bitscale.quant.kernels.table import Kernels

KERNELS = Kernels(
    name="cpu",
    ternarize=cpu_rows.ternarize,
    quantize_rows=cpu_rows.quantize_rows,
    rms_norm_quantize_rows=cpu_rows.rms_norm_quantize_rows,
    integer_linear=cpu_gemm.integer_linear,
    input_grad=cpu_gemm.input_grad,
    weight_grad=cpu_gemm.weight_grad,
    rms_norm_grad=cpu_rows.rms_norm_grad,
    blend_weight=cpu_rows.blend_weight,
    blend_rows=cpu_rows.blend_rows,
)
