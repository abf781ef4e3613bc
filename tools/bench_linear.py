"""Time one linear layer in training: PyTorch's, ours and the public ones, in one process.

    python tools/bench_linear.py                              # every contender, default shapes
    python tools/bench_linear.py --shapes 2048x1024x4096 --repeats 31 --markdown
    python tools/bench_linear.py --peers linear-fp32,cpu-int8 --json out.json

Contenders take turns within every repeat, so that a slow minute of the machine hits all of them;
the figures are medians. Before anything is timed, each is compared with float64: y and ∂L/∂x of
the first rows, ∂L/∂w of the first features, as relative error in norm, a quantized layer against
b158 computed in float64. A contender that cannot run here is listed with the reason.

Weights are quantized in every pass, as in a step of one micro-batch. Shapes: T tokens, D inputs,
F outputs.
"""

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bitscale.model.layers import RMSNorm
from bitscale.quant.kernels import get_kernels
from bitscale.quant.kernels.linear import ternary_linear
from bitscale.quant.kernels.table import GradientBits
from provenance import provenance

EPS = 1e-5
NORM_EPS = 1e-6
CHECKED = 64  # rows or features that are compared with float64
WARM_UPS = 2
PACKAGES = ("torch", "triton", "bitlinear", "onebitllms", "transformers", "torchao", "numpy")
SHAPES = {
    "cpu": "2048x1024x4096,2048x2048x8192,2048x4096x11008",
    "cuda": "2048x1024x4096,8192x2048x8192,8192x4096x14336",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Problem(NamedTuple):
    """What every contender computes, in one dtype: x [1, T, D], w [F, D], gradient [1, T, F]."""

    x: Tensor
    w: Tensor
    grad: Tensor


class Layer(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    weight: Tensor  # the leaf that receives ∂L/∂w


@dataclass(frozen=True)
class Contender:
    name: str
    source: str
    dtype: str | None  # None: the one of the run
    quantizes: bool
    build: Callable[[Problem], Layer]


@dataclass
class Result:
    name: str
    source: str
    dtype: str
    reason: str | None = None  # why it did not run
    forward_ms: float | None = None
    both_ms: float | None = None
    memory_mib: float | None = None
    error_y: float | None = None
    error_x: float | None = None
    error_w: float | None = None


# --- Contenders ---


def dense(problem: Problem) -> Layer:
    layer = nn.Linear(problem.x.shape[-1], len(problem.w), bias=False, device=problem.w.device)
    return _with_weight(layer, problem)


def fake_quantization(problem: Problem) -> Layer:
    """The listing of Microsoft's Training Tips, Code, FAQ, in the dtype of the tensors."""
    w = problem.w.clone().requires_grad_()

    def forward(x: Tensor) -> Tensor:
        p = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
        q = 1.0 / w.abs().mean().clamp(min=EPS)
        x_hat = x + ((x * p).round().clamp(-128, 127) / p - x).detach()
        w_hat = w + ((w * q).round().clamp(-1, 1) / q - w).detach()
        return F.linear(x_hat, w_hat)

    return Layer(forward, w)


def bitlinear(problem: Problem) -> Layer:
    """Its default of 8 bits would scale by 128 and cut the largest code."""
    module = importlib.import_module("bitlinear")
    layer = module.BitLinear(
        problem.x.shape[-1], len(problem.w), bias=False, device=problem.w.device, eps=EPS,
        weight_measure="AbsMean", activation_range=(-127, 127), norm=None,
    )  # fmt: skip
    return _with_weight(layer, problem)


def transformers(problem: Problem) -> Layer:
    module = importlib.import_module("transformers.integrations.bitnet")
    layer = module.AutoBitLinear(
        problem.x.shape[-1], len(problem.w), bias=False, device=problem.w.device, online_quant=True
    )
    return _with_weight(layer, problem)


def onebitllms(problem: Problem) -> Layer:
    if problem.x.device.type != "cuda":
        raise RuntimeError("its kernels need an NVIDIA GPU")
    layer = importlib.import_module("onebitllms").BitNetLinear(problem.x.shape[-1], len(problem.w))
    return _with_weight(layer.to(problem.w.device), problem)


def torchao(problem: Problem, *, compiled: bool) -> Layer:
    quantize = importlib.import_module("torchao.quantization").quantize_
    training = importlib.import_module("torchao.prototype.quantized_training")
    module = nn.Sequential(nn.Linear(problem.x.shape[-1], len(problem.w), bias=False))
    module = module.to(problem.w.device, problem.w.dtype)
    with torch.no_grad():
        module[0].weight.copy_(problem.w)
    quantize(module, training.bitnet_training())
    weight = module[0].weight
    return Layer(torch.compile(module) if compiled else module, weight)


def ours(problem: Problem, *, kernel: str, bits: GradientBits) -> Layer:
    kernels = get_kernels(kernel, problem.x.device.type)
    w = problem.w.clone().requires_grad_()

    def forward(x: Tensor) -> Tensor:
        weight = kernels.ternarize(w, "absmean", EPS)
        return ternary_linear(x, w, None, kernels.quantize_rows(x, EPS), weight, kernels, bits=bits)

    return Layer(forward, w)


def _with_weight(layer: nn.Module, problem: Problem) -> Layer:
    layer = layer.to(problem.w.dtype)
    with torch.no_grad():
        layer.weight.copy_(problem.w)
    return Layer(layer, layer.weight)


def contenders() -> list[Contender]:
    listed: list[tuple[str, str, Callable[[Problem], Layer]]] = [
        ("fake", "fake quantization, straight through", fake_quantization),
        ("bitlinear", "bitlinear, absmean, no norm", bitlinear),
        ("transformers", "transformers, AutoBitLinear", transformers),
        ("onebitllms", "onebitllms, BitNetLinear", onebitllms),
        ("torchao", "torchao, bitnet_training", partial(torchao, compiled=False)),
        ("torchao-compiled", "the same, torch.compile", partial(torchao, compiled=True)),
        ("reference", "bitscale, plain PyTorch", partial(ours, kernel="reference", bits=None)),
    ]
    gradients: list[tuple[GradientBits, str]] = [
        (None, "float"), (24, "int24"), (16, "int16"), (8, "int8"),
    ]  # fmt: skip
    for kernel in ("cpu", "triton"):
        for bits, kind in gradients:
            what = f"bitscale, kernel {kernel}, {kind} gradients"
            listed.append((f"{kernel}-{kind}", what, partial(ours, kernel=kernel, bits=bits)))
    baselines = [
        Contender(f"linear-{dtype}", "torch.nn.Linear", dtype, False, dense) for dtype in DTYPES
    ]
    return baselines + [Contender(name, what, None, True, build) for name, what, build in listed]


# --- Checking ---


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, gradients: str = "gaussian"
) -> Problem:
    """Gaussian x, weights of the usual initial size; `gradients`: n, or heavy-tailed n · exp(n)."""
    T, D, F_ = shape
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=generator) for s in ((1, T, D), (F_, D), (1, T, F_)))
    if gradients == "heavy":
        grad = grad * grad.exp()
    return Problem(*(t.to(device, dtype) for t in (x, 0.02 * w, grad)))


def exact_results(problem: Problem, quantizes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """First CHECKED rows of y and ∂x and of ∂w, in float64."""
    x, w, grad = problem.x[0].double(), problem.w.double(), problem.grad[0].double()
    if quantizes:
        r = x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS) / 127.0
        s = w.abs().mean().clamp(min=EPS)
        x, w = (x / r).round().clamp(-128, 127) * r, (w / s).round().clamp(-1, 1) * s
    return x[:CHECKED] @ w.T, grad[:CHECKED] @ w, grad[:, :CHECKED].T @ x


def relative_errors(layer: Layer, problem: Problem, quantizes: bool) -> tuple[float, float, float]:
    x = problem.x.clone().requires_grad_()
    y = layer.forward(x)
    y.backward(problem.grad)
    assert x.grad is not None and layer.weight.grad is not None
    got = (y[0].detach(), x.grad[0], layer.weight.grad)
    exact = exact_results(problem, quantizes)
    error_y, error_x, error_w = (
        float((ours[:CHECKED].double() - want).norm() / want.norm())
        for ours, want in zip(got, exact, strict=True)
    )
    return error_y, error_x, error_w


# --- Measuring ---


class _Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it would keep itself alive


def saved_mib(layer: Layer, problem: Problem) -> float:
    """What one forward pass keeps for its backward pass, without the weight itself."""
    # Weak: a branch that is detached keeps tensors, too, until it is dropped in the pass itself.
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def keep(t: Tensor) -> _Saved:
        saved = _Saved(t)
        kept.add(saved)
        return saved

    x = problem.x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        y = layer.forward(x)
    storages = [saved.tensor.untyped_storage() for saved in kept]
    distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
    weight = getattr(layer.weight, "_data", layer.weight)  # of torchao's wrapper
    distinct.pop(weight.untyped_storage().data_ptr(), None)
    del y
    return sum(distinct.values()) / 2**20


def peak_mib(layer: Layer, problem: Problem) -> float:
    """Most device memory of forward and backward, beyond what was there before."""
    layer.weight.grad = None
    x = problem.x.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.forward(x).backward(problem.grad)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_once(layer: Layer, problem: Problem) -> tuple[float, float]:
    """Milliseconds of the forward pass, which records for backward, and of both passes."""
    x = problem.x.detach().requires_grad_()
    forward = _timed(problem.x, lambda: layer.forward(x))
    layer.weight.grad = x.grad = None
    return forward, _timed(problem.x, lambda: layer.forward(x).backward(problem.grad))


def _timed(like: Tensor, work: Callable[[], object]) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    kept = work()
    if like.is_cuda:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - start)
    del kept
    return milliseconds


def measure(
    shape: tuple[int, int, int], picked: Sequence[Contender], args: argparse.Namespace
) -> list[Result]:
    """One row a contender; times in turns."""
    problems = {
        name: draw(shape, dtype, args.device, args.gradients)
        for name, dtype in DTYPES.items()
        if any((one.dtype or args.dtype) == name for one in picked)
    }
    results, running = [], []
    for one in tqdm(picked, desc=f"{_name_of(shape)}: check", file=sys.stderr):
        result = Result(one.name, one.source, one.dtype or args.dtype)
        results.append(result)
        problem = problems[result.dtype]
        try:
            layer = one.build(problem)
            errors = relative_errors(layer, problem, one.quantizes)
            result.memory_mib = (peak_mib if problem.x.is_cuda else saved_mib)(layer, problem)
        except Exception as error:  # a peer may fail in any way; the reason is what counts
            result.reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        result.error_y, result.error_x, result.error_w = errors
        running.append((result, layer, problem))
    times: dict[str, list[tuple[float, float]]] = {one.name: [] for one in picked}
    with tqdm(total=args.repeats * len(running), desc=_name_of(shape), file=sys.stderr) as bar:
        for repeat in range(-WARM_UPS, args.repeats):
            for result, layer, problem in running:
                pair = time_once(layer, problem)
                if repeat >= 0:
                    times[result.name].append(pair)
                    bar.update()
    for result, _, _ in running:
        result.forward_ms, result.both_ms = map(
            statistics.median, zip(*times[result.name], strict=True)
        )
    return results


def measure_norms(shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, float | str]:
    """Median ms of RMSNorm with a weight and of norm and codes in one, [T, D], without gradient."""
    x = draw(shape, DTYPES[args.dtype], args.device).x
    D = x.shape[-1]
    norm = RMSNorm(D, NORM_EPS).to(x.device, x.dtype)
    works: dict[str, Callable[[], object]] = {
        "bitscale.model.layers.RMSNorm": lambda: norm(x),
        "torch rms_norm": lambda: F.rms_norm(x, (D,), norm.weight, NORM_EPS),
    }
    medians: dict[str, float | str] = {}
    for name in ("reference", "cpu", "triton"):
        label = f"norm and codes, kernel {name}"
        try:
            kernels = get_kernels(name, args.device)
            works[label] = partial(kernels.rms_norm_quantize_rows, x, norm.weight, NORM_EPS, EPS)
        except Exception as error:
            medians[label] = str(error)
    times: dict[str, list[float]] = {label: [] for label in works}
    with torch.no_grad():
        for repeat in range(-WARM_UPS, 4 * args.repeats):
            for label, work in works.items():
                milliseconds = _timed(x, work)
                if repeat >= 0:
                    times[label].append(milliseconds)
    return {**{label: statistics.median(each) for label, each in times.items()}, **medians}


# --- Reporting ---


def breakdown(shape: tuple[int, int, int], one: Contender, args: argparse.Namespace) -> str:
    """Where one forward and backward pass spends its time, by operator."""
    problem = draw(shape, DTYPES[one.dtype or args.dtype], args.device, args.gradients)
    layer = one.build(problem)
    time_once(layer, problem)
    with torch.profiler.profile() as profiled:
        time_once(layer, problem)
    by_device = "self_device_time_total" if problem.x.is_cuda else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, by_device))
    rows = [f"| {event.key} | {getattr(event, by_device) / 1e3:.2f} |" for event in events[:8]]
    return "\n".join([f"| {one.name}, {_name_of(shape)} | ms |", "|---|---|", *rows, ""])


def origin_of(args: argparse.Namespace) -> dict[str, Any]:
    return provenance(_hardware(args.device), PACKAGES) | {
        "repeats": args.repeats,
        "dtype": args.dtype,
    }


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names: list[str] = []
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return f"{len(names) or '?'} x {names[0] if names else platform.processor()}"


def table(shape: tuple[int, int, int], results: Sequence[Result], device: str) -> str:
    """Markdown: a row for everything that ran, then why the others did not."""
    memory = "peak MiB" if device == "cuda" else "saved MiB"
    lines = [
        f"### {_name_of(shape)}",
        "",
        f"| contender | what | dtype | forward ms | both ms | over fp32 | over bf16 | {memory} | "
        "error y / ∂x / ∂w |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    both = {result.name: result.both_ms for result in results}
    for one in results:
        if one.both_ms is None:
            continue
        ratios = [
            f"{base / one.both_ms:.2f}" if (base := both.get(name)) else "-"
            for name in ("linear-fp32", "linear-bf16")
        ]
        lines.append(
            f"| `{one.name}` | {one.source} | {one.dtype} | {one.forward_ms:.2f} | "
            f"{one.both_ms:.2f} | {ratios[0]} | {ratios[1]} | {one.memory_mib:.1f} | "
            f"{one.error_y:.1e} / {one.error_x:.1e} / {one.error_w:.1e} |"
        )
    reasons = [f"- `{one.name}` did not run: {one.reason}" for one in results if one.reason]
    return "\n".join([*lines, "", *reasons, ""] if reasons else [*lines, ""])


def norm_table(norms: dict[str, float | str]) -> str:
    ran = [f"| {name} | {value:.3f} |" for name, value in norms.items() if isinstance(value, float)]
    reasons = [f"- {name}: {why}" for name, why in norms.items() if isinstance(why, str)]
    return "\n".join(["| norm | ms |", "|---|---|", *ran, "", *reasons, ""])


def _name_of(shape: tuple[int, int, int]) -> str:
    return "x[{}, {}] → {}".format(*shape)


def _parse_shape(text: str) -> tuple[int, int, int]:
    try:
        T, D, F_ = (int(part) for part in text.split("x"))
    except ValueError:
        raise SystemExit(
            f"--shapes {text!r} is not TOKENSxINPUTSxOUTPUTS, as 2048x1024x4096"
        ) from None
    return T, D, F_


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [one.name for one in contenders()]
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--shapes", help="tokens x inputs x outputs, comma-separated")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(names)}; default: all")
    parser.add_argument("--gradients", choices=("gaussian", "heavy"), default="gaussian")
    parser.add_argument("--breakdown", action="store_true", help="ours by operator, too")
    parser.add_argument("--json", type=Path, help="write results and provenance to this file")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="provenance too, as docs/benchmarks/linear.md has it",
    )
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    args.shapes = [_parse_shape(text) for text in (args.shapes or SHAPES[args.device]).split(",")]
    args.peers = args.peers.split(",") if args.peers else names
    unknown = sorted(set(args.peers) - set(names))
    if unknown:
        parser.error(f"--peers {', '.join(unknown)}: use some of {', '.join(names)}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    picked = [one for one in contenders() if one.name in args.peers]
    origin = origin_of(args)
    measured = []
    if args.markdown:
        print("\n".join(f"- {key}: {value}" for key, value in origin.items()), end="\n\n")
    for shape in args.shapes:
        results, norms = measure(shape, picked, args), measure_norms(shape, args)
        print(table(shape, results, args.device))
        print(norm_table(norms), flush=True)
        if args.breakdown:
            ran = {result.name for result in results if not result.reason}
            for one in picked:
                if one.name in ran and one.name.startswith(("cpu-", "triton-")):
                    print(breakdown(shape, one, args))
        measured.append(
            {"shape": shape, "linear": [asdict(result) for result in results], "norm_ms": norms}
        )
    if args.json:
        content = {"provenance": origin, "measured": measured}
        args.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
