"""Run the public implementations of 1.58-bit linear layers and keep what they compute.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
    peers/bin/pip install --no-deps bitlinear==2.4.6 torchao==0.18.0 onebitllms==0.0.4 triton==3.9.0
    peers/bin/python tools/make_golden.py

Writes tests/golden/PEER.safetensors (codes, outputs, gradients; the inputs follow from a seed, see
`inputs`) and tests/golden/provenance.json. It imports nothing of bitscale. transformers runs
without torch.compile, onebitllms' Triton kernels through Triton's interpreter, which needs no GPU.
Tensors are called CASE/NAME, NAME among codes_x, codes_w, y, grad_x, grad_w, grad_bias.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # not for those who import the recipes: tools/parity.py, tests
    # Before torch and the peers are imported: CPU without a compiler, kernels without a GPU.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
FP32 = ("gaussian", "odd", "batched", "ties", "zeros", "outlier", "below_eps", "near_eps")
BF16 = ("gaussian_bf16", "odd_bf16", "ties_bf16", "outlier_bf16")


class Inputs(NamedTuple):
    x: Tensor  # [..., D]
    w: Tensor  # [F, D]
    bias: Tensor  # [F]
    grad: Tensor  # [..., F], of the output


def inputs(case: str) -> Inputs:
    """The inputs of a case: seeded, the same in every process and on every machine."""
    kind, _, dtype = case.partition("_bf16")
    dtype = torch.bfloat16 if case.endswith("_bf16") else torch.float32
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    lead, d_in, d_out = {"odd": ((3,), 301, 11), "batched": ((2, 3), 32, 16)}.get(
        kind, ((6,), 48, 24)
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w = normal(*lead, d_in), normal(d_out, d_in) * 0.05
    if kind == "ties":
        # Mean and lower median of |w| are 2, the largest |x| of a token 127 (or 254): halves
        # everywhere.
        magnitudes = torch.tensor([1.0, 3.0, 2.0, 2.0]).repeat(d_out * d_in // 4)
        order = torch.randperm(d_out * d_in, generator=generator)
        w = magnitudes[order].view(d_out, d_in) * normal(d_out, d_in).sign()
        x = torch.randint(-126, 126, (*lead, d_in), generator=generator) + 0.5
        x[:, 0] = 127.0
        x[::2] *= 2
    elif kind == "zeros":
        x[1], w = 0.0, torch.zeros(d_out, d_in)
    elif kind == "outlier":
        x[0, 3], x[1, 5], w[2, 7] = 1e4, -300.0, 40.0
    elif kind == "below_eps":
        x, w = x * 1e-6, w * 1e-5
    elif kind == "near_eps":
        # Between eps and 127 eps: here torchao's bound differs from everyone else's.
        x, w = x * 2e-4, w * 4e-4
    bias, grad = normal(d_out), normal(*lead, d_out)
    return Inputs(x.to(dtype), w.to(dtype), bias.to(dtype), grad.to(dtype))


def _leaves(case: str) -> Inputs:
    tensors = inputs(case)
    return Inputs(*(t.clone().requires_grad_() for t in tensors[:3]), tensors.grad)


def _result(leaves: Inputs, y: Tensor, codes_x: Tensor, codes_w: Tensor) -> dict[str, Tensor]:
    y.backward(leaves.grad)
    result = {"codes_x": codes_x.to(torch.int8), "codes_w": codes_w.to(torch.int8), "y": y}
    for name in ("x", "w", "bias"):
        grad = getattr(leaves, name).grad
        if grad is not None:
            result[f"grad_{name}"] = grad
    return {name: tensor.detach().contiguous() for name, tensor in result.items()}


def _codes_of(values: Tensor, step: Tensor | float) -> Tensor:
    """Integer codes behind dequantized values that are within rounding of code · step."""
    return torch.round(values.detach().double() / step)


def run_hf(case: str) -> dict[str, Tensor]:
    """transformers' AutoBitLinear, quantizing online."""
    from transformers.integrations import bitnet

    t = _leaves(case)
    layer = bitnet.AutoBitLinear(t.w.shape[1], t.w.shape[0], True, online_quant=True)
    layer.weight, layer.bias = torch.nn.Parameter(t.w), torch.nn.Parameter(t.bias)
    t = Inputs(t.x, layer.weight, layer.bias, t.grad)
    x_hat, w_hat = bitnet.ActQuant.apply(t.x), bitnet.WeightQuant.apply(t.w)
    r = t.x.detach().double().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return _result(t, layer(t.x), _codes_of(x_hat, r), w_hat.sign())


def run_onebit(case: str) -> dict[str, Tensor]:
    """onebitllms' two kernels, composed as its BitNetLinear does (which demands a CUDA device).

    fp32 only: on bf16 its kernels fail in Triton 3.9 ("Expected dtype [fp32, fp64] but got bf16").
    """
    from onebitllms.kernels import activation_quant_triton, weight_quant_triton

    class OnCuda(Tensor):
        is_cuda = True  # type: ignore[assignment]  # weight_quant_triton asserts it

    t = _leaves(case)
    tokens = t.x.detach().reshape(1, -1, t.x.shape[-1])
    x_hat = activation_quant_triton(tokens).view_as(t.x)
    w_hat = weight_quant_triton(t.w.detach().as_subclass(OnCuda)).as_subclass(Tensor)
    x_quant = t.x + (x_hat - t.x).detach()
    w_quant = t.w + (w_hat - t.w).detach()
    y = torch.nn.functional.linear(x_quant, w_quant, t.bias)
    r = t.x.detach().double().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return _result(t, y, _codes_of(x_hat, r), w_hat.sign())


def run_onebit_export(case: str) -> dict[str, Tensor]:
    """The codes that onebitllms' export makes: half to even, in the weight's dtype."""
    from onebitllms.utils import quantization_utils

    codes, _ = quantization_utils._weight_quant(inputs(case).w)
    return {"codes_w": codes.to(torch.int8)}


def run_torchao(case: str) -> dict[str, Tensor]:
    """torchao's BitNetTrainingLinearWeight."""
    from torchao.prototype.quantized_training import bitnet, int8

    t = _leaves(case)
    scale = bitnet.get_bitnet_scale(t.w.detach())
    codes_w = bitnet.quantize_bitnet_weight(t.w.detach(), scale)
    codes_x, _ = int8.quantize_int8_rowwise(t.x.detach().flatten(0, -2), eps=1e-5)
    weight = torch.nn.Parameter(bitnet.BitNetTrainingLinearWeight(t.w.detach()))
    y = torch.nn.functional.linear(t.x, weight, t.bias)
    return _result(Inputs(t.x, weight, t.bias, t.grad), y, codes_x.view(t.x.shape), codes_w)


def _run_bitlinear(case: str, **options: Any) -> dict[str, Tensor]:
    from bitlinear import bitlinear

    t = _leaves(case)
    layer = bitlinear.BitLinear(t.w.shape[1], t.w.shape[0], bias=True, **options)
    layer.weight, layer.bias = torch.nn.Parameter(t.w), torch.nn.Parameter(t.bias)
    t = Inputs(t.x, layer.weight, layer.bias, t.grad)
    seen: list[Tensor] = []
    strategy = layer.strategy

    def record(values: Tensor, code_range: Any, lambda_: float) -> Tensor:
        quantized = strategy(values, code_range, lambda_)
        # Not `quantized`: v + λ (code − v) is not a code where v is large and the dtype narrow.
        codes = values.round().clamp(*code_range)
        if strategy is bitlinear.sample and code_range == (-1, 1):
            codes = torch.where(values.abs() >= 1, values.sign(), quantized.round())
        seen.append(codes.detach())
        return quantized

    layer.strategy = record
    torch.manual_seed(0)  # of the strategy `sample`
    return _result(t, layer(t.x), seen[0], seen[1])


def run_sdu(case: str) -> dict[str, Tensor]:
    """bitlinear's BitLinear with its defaults."""
    return _run_bitlinear(case)


def run_sdu_blend(case: str) -> dict[str, Tensor]:
    """The same at λ = 0.3."""
    return _run_bitlinear(case, lambda_=0.3)


def run_stochastic(case: str) -> dict[str, Tensor]:
    """Its strategy `sample`, without norm, torch's generator seeded with 0."""
    return _run_bitlinear(case, strategy="sample", norm=None)


def run_sdu_absmean(case: str) -> dict[str, Tensor]:
    """absmean instead of the median, without norm."""
    return _run_bitlinear(case, weight_measure="AbsMean", norm=None)


def run_sdu_2bit(case: str) -> dict[str, Tensor]:
    """Codes −2..1 by absmean."""
    return _run_bitlinear(case, weight_measure="AbsMean", weight_range=2)


def run_sdu_3bit(case: str) -> dict[str, Tensor]:
    """Codes −4..3 by absmax."""
    return _run_bitlinear(case, weight_measure="AbsMax", weight_range=3)


def run_sdu_4bit(case: str) -> dict[str, Tensor]:
    """Codes −8..7 by absmax, activations in 16 bit."""
    from bitlinear import bitlinear

    t = _leaves(case)
    layer = bitlinear.BitLinear(
        t.w.shape[1],
        t.w.shape[0],
        weight_measure="AbsMax",
        weight_range=4,
        norm=None,
        activation_measure=None,
    )
    layer.weight, layer.bias = torch.nn.Parameter(t.w), torch.nn.Parameter(t.bias)
    t = Inputs(t.x, layer.weight, layer.bias, t.grad)
    scale = bitlinear.scale(t.w, layer.weight_range, layer.weight_measure, False, layer.eps)
    codes_w = bitlinear.round_clamp(t.w.detach() * scale, layer.weight_range)
    result = _result(t, layer(t.x), torch.zeros(0), codes_w)
    del result["codes_x"]
    return result


# name: (package, how it is run, cases)
PEERS: dict[str, tuple[str, Callable[[str], dict[str, Tensor]], tuple[str, ...]]] = {
    "hf": ("transformers", run_hf, FP32 + BF16),
    "onebit": ("onebitllms", run_onebit, FP32),
    "onebit_export": ("onebitllms", run_onebit_export, FP32 + BF16),
    "torchao": ("torchao", run_torchao, FP32 + BF16),
    "sdu": ("bitlinear", run_sdu, FP32 + BF16),
    "sdu_blend": ("bitlinear", run_sdu_blend, FP32 + BF16),
    "sdu_absmean": ("bitlinear", run_sdu_absmean, FP32 + BF16),
    "sdu_2bit": ("bitlinear", run_sdu_2bit, FP32 + BF16),
    "sdu_3bit": ("bitlinear", run_sdu_3bit, FP32 + BF16),
    "sdu_4bit": ("bitlinear", run_sdu_4bit, FP32 + BF16),
    "stochastic": ("bitlinear", run_stochastic, FP32 + BF16),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=GOLDEN)
    parser.add_argument("peers", nargs="*", choices=[*PEERS, []], help="default: all")
    args = parser.parse_args()
    from safetensors.torch import save_file

    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "provenance.json"
    provenance = json.loads(target.read_text()) if target.exists() else {}
    for peer in args.peers or PEERS:
        package, run, cases = PEERS[peer]
        tensors = {
            f"{case}/{name}": tensor.clone() for case in cases for name, tensor in run(case).items()
        }
        save_file(tensors, args.out / f"{peer}.safetensors")
        (args.out / f"{peer}.safetensors").chmod(0o644)
        provenance[peer] = {
            "package": package,
            "version": importlib.metadata.version(package),
            "what": (run.__doc__ or "").strip(),
            "cases": list(cases),
            "command": "python tools/make_golden.py",
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if package == "onebitllms" else None,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "commit": _commit(),
        }
        print(f"{peer}: {len(tensors)} tensors from {package} {provenance[peer]['version']}")
    target.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return 0


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
