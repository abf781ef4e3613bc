"""Triton kernels compiled for Hopper (sm_90) without a GPU: registers, spills, tensor cores.

The kernels' own Python functions launch them here on CPU tensors with a driver that only names
the target; the launch is turned into a compilation. So what is compiled is what would run,
specialized on the same alignment. Assembler and disassembler come with the triton package.

Shapes: T tokens, D inputs, F outputs, those of a 7B model's feed-forward layer.
"""

import collections
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import NoHostMemory
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from bitscale.config import ModelConfig, QuantConfig
from bitscale.model.bitlinear import bit_linears, prepare_weights, set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.kernels import Kernels
from bitscale.quant.reference import Int8Rows, Ternary
from bitscale.quant.schedule import TERNARY, Strength

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
CAPABILITY = 90
MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
T, D, F = 8192, 4096, 14336
BF16, FP32 = torch.bfloat16, torch.float32


class Usage(NamedTuple):
    """What one compiled kernel needs of the GPU."""

    kernel: str
    warps: int
    registers: int  # a thread
    stack_bytes: int  # a thread; spilled registers live there
    shared_bytes: int  # a block
    instructions: dict[str, int]  # by the first part of their name

    @property
    def tensor_cores(self) -> str:
        """The Hopper tensor-core instruction that it uses, or none."""
        return next((name for name in ("IGMMA", "HGMMA") if self.instructions.get(name)), "-")


class Sm90Driver:
    """As much of a driver as the compiler asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


@pytest.fixture(scope="module")
def compile_launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """compile_launches(function, *args) -> what the kernels that it launches need, in order."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    folder = tmp_path_factory.mktemp("cubin")
    launched: list[tuple[str, Any]] = []
    seen: dict[int, tuple[Any, Usage]] = {}  # by id; the kernel is kept, or its id could return
    run = JITFunction.run

    def usage_once(name: str, compiled: Any) -> Usage:
        if id(compiled) not in seen:
            seen[id(compiled)] = compiled, usage(name, compiled, folder / f"{name}.cubin")
        return seen[id(compiled)][1]

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.__name__, compiled))
        return compiled

    def compile_launches(function: Callable[..., Any], *args: Any) -> list[Usage]:
        launched.clear()
        function(*args)
        return [usage_once(name, compiled) for name, compiled in launched]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", Sm90Driver())  # reset_active() would look for a GPU
        yield compile_launches


def usage(name: str, compiled: Any, cubin: Path) -> Usage:
    from triton import knobs

    def output(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    cubin.write_bytes(compiled.asm["cubin"])
    resources = output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    found = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", resources)
    assert found, resources
    assert "sm_90a" in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"], f"{name} flushes denormals to zero"
    sass = output(knobs.nvidia.nvdisasm.path, "--print-code", cubin)
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.M)
    assert "EXIT" in names, sass[:500]
    registers, stack_bytes = map(int, found.groups())
    metadata = compiled.metadata
    return Usage(
        name, metadata.num_warps, registers, stack_bytes, metadata.shared,
        collections.Counter(names),
    )  # fmt: skip


Launch = tuple[Callable[..., Any], tuple[Any, ...]]


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def rows(t: int, d: int) -> Int8Rows:
    return Int8Rows(empty(t, d, dtype=torch.int8), empty(t, 1, dtype=FP32))


def ternary(f: int, d: int) -> Ternary:
    return Ternary(empty(f, d, dtype=torch.int8), empty(dtype=FP32))


def launches() -> dict[str, Launch]:
    """Name of a launch in the document's table -> function and arguments (memory untouched)."""
    from bitscale.quant.kernels.triton_table import KERNELS as k

    w, w32, x, g = empty(F, D), empty(F, D, dtype=FP32), empty(T, D), empty(T, F)
    odd = rows(501, 1001), ternary(3001, 1001), empty(501, 3001)
    return {
        "absmean, bf16": (k.ternarize, (w, "absmean", 1e-5)),
        "absmean, fp32": (k.ternarize, (w32, "absmean", 1e-5)),
        "absmedian, bf16": (k.ternarize, (w, "absmedian", 1e-5)),
        "absmedian, fp32": (k.ternarize, (w32, "absmedian", 1e-5)),
        "blend, bf16": (k.blend_weight, (w, "absmean", 1e-5, 0.5)),
        "rows of 4,096": (k.quantize_rows, (x, 1e-5)),
        "rows of 14,336": (k.quantize_rows, (g, 1e-5)),
        "rows of 32,768": (k.quantize_rows, (empty(1, 32768), 1e-5)),
        "norm, rows of 4,096": (k.rms_norm_quantize_rows, (x, empty(D), 1e-5, 1e-5)),
        "norm, rows of 14,336": (k.rms_norm_quantize_rows, (g, empty(F), 1e-5, 1e-5)),
        "norm, rows of 32,768": (
            k.rms_norm_quantize_rows, (empty(1, 32768), empty(32768), 1e-5, 1e-5),
        ),
        "blend, rows": (k.blend_rows, (x, 1e-5, 0.5)),
        "8,192 tokens": (k.integer_linear, (rows(T, D), ternary(F, D), None, BF16)),
        "8,192 tokens, bias": (k.integer_linear, (rows(T, D), ternary(F, D), empty(F), BF16)),
        "512 tokens, 512 outputs": (k.integer_linear, (rows(512, D), ternary(512, D), None, BF16)),
        "64 tokens": (k.integer_linear, (rows(64, D), ternary(F, D), None, BF16)),
        "unaligned": (k.integer_linear, (*odd[:2], None, BF16)),
        "dX, 8,192 tokens": (k.input_grad, (g, ternary(F, D), None)),
        "dX, 512 tokens": (k.input_grad, (empty(512, F), ternary(F, D), None)),
        "dX, 64 tokens": (k.input_grad, (empty(64, F), ternary(F, D), None)),
        "dX, fp32": (k.input_grad, (empty(T, F, dtype=FP32), ternary(F, D), None)),
        "dX, unaligned": (k.input_grad, (odd[2], odd[1], None)),
        "dW, 8,192 tokens": (k.weight_grad, (g, rows(T, D), BF16, None, None)),
        "dW, into main_grad": (k.weight_grad, (g, rows(T, D), BF16, w32, None)),
        "dW, 500 tokens": (k.weight_grad, (empty(500, F), rows(500, D), BF16, None, None)),
        "dW, 512 × 512": (k.weight_grad, (empty(T, 512), rows(T, 512), BF16, None, None)),
        "dW, fp32": (k.weight_grad, (empty(T, F, dtype=FP32), rows(T, D), FP32, None, None)),
        "dW, unaligned": (k.weight_grad, (odd[2], odd[0], BF16, None, None)),
        **integer_gradient_launches(k),
        **norm_gradient_launches(k),
    }  # fmt: skip


def integer_gradient_launches(k: Kernels) -> dict[str, Launch]:
    g, weight, x = empty(T, F), ternary(F, D), rows(T, D)
    odd = rows(501, 1001), ternary(3001, 1001), empty(501, 3001)
    found: dict[str, Launch] = {}
    for bits in (8, 16, 24):
        into_main_grad = (g, x, BF16, empty(F, D, dtype=FP32), bits)
        found[f"dX, {bits} bits"] = (k.input_grad, (g, weight, bits))
        found[f"dX, {bits} bits, 64 tokens"] = (k.input_grad, (g[:64], weight, bits))
        found[f"dW, {bits} bits"] = (k.weight_grad, (g, x, BF16, None, bits))
        found[f"dW, {bits} bits, into main_grad"] = (k.weight_grad, into_main_grad)
    found["dX, 8 bits, unaligned"] = (k.input_grad, (odd[2], odd[1], 8))
    found["dW, 8 bits, unaligned"] = (k.weight_grad, (odd[2], odd[0], BF16, None, 8))
    return found


def norm_gradient_launches(k: Kernels) -> dict[str, Launch]:
    found: dict[str, Launch] = {}
    for d, dtype in (
        (4096, BF16), (14336, BF16), (16384, BF16), (32768, BF16), (8192, FP32), (32768, FP32),
    ):  # fmt: skip
        x, rstd = empty(T, d, dtype=dtype), empty(T, 1, dtype=FP32)
        name = f"norm's gradient, {d:,}{', fp32' if dtype == FP32 else ''}"
        found[name] = (k.rms_norm_grad, (x, x, rstd, x[0]))
    x = empty(T, 4096)
    found["norm's gradient, no weight"] = (k.rms_norm_grad, (x, x, empty(T, 1, dtype=FP32), None))
    return found


@pytest.fixture(scope="module")
def compiled(compile_launches: Callable[..., list[Usage]]) -> dict[str, list[Usage]]:
    return {name: compile_launches(f, *args) for name, (f, args) in launches().items()}


def table(compiled: dict[str, list[Usage]]) -> str:
    """The document's table of resources. Kernels that occur again as they were are left out."""
    lines, seen = [], set()
    for launch, kernels in compiled.items():
        for k in kernels:
            needs = (k.kernel, k.warps, k.registers, k.shared_bytes, k.tensor_cores)
            if needs not in seen:
                lines.append(
                    "| " + " | ".join([launch, f"`{needs[0]}`", *map(str, needs[1:])]) + " |"
                )
            seen.add(needs)
    return "\n".join(lines)


def test_no_kernel_spills(compiled: dict[str, list[Usage]]) -> None:
    for launch, kernels in compiled.items():
        for kernel in kernels:
            spills = {kernel.instructions.get(name, 0) for name in ("LDL", "STL")}
            assert (kernel.stack_bytes, spills) == (0, {0}), (launch, kernel)


def test_every_block_fits_an_sm(compiled: dict[str, list[Usage]]) -> None:
    for launch, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.registers * kernel.warps * 32 <= 65536, (launch, kernel)
            assert kernel.shared_bytes <= MAX_SHARED_BYTES, (launch, kernel)


def test_products_run_on_hoppers_tensor_cores(compiled: dict[str, list[Usage]]) -> None:
    """IGMMA is wgmma on int8, HGMMA on 16 bit; fp32 gradients take the CUDA cores on purpose."""
    want = {
        "forward": "IGMMA", "multiply_bytes": "IGMMA",
        "grad_of_input": "HGMMA", "grad_of_weight": "HGMMA",
    }  # fmt: skip
    for launch, kernels in compiled.items():
        for kernel in kernels:
            expected = "-" if launch.endswith("fp32") else want.get(kernel.kernel, "-")
            assert kernel.tensor_cores == expected, (launch, kernel)
            assert not {"IMMA", "HMMA"} & set(kernel.instructions), (launch, kernel)


def test_aligned_operands_are_copied_asynchronously(compiled: dict[str, list[Usage]]) -> None:
    for launch in (
        "8,192 tokens", "dX, 8,192 tokens", "dW, 8,192 tokens", "dW, into main_grad",
        "dX, 16 bits", "dW, 24 bits", "dX, 8 bits, unaligned", "dW, 8 bits, unaligned",
    ):  # fmt: skip
        kernel = compiled[launch][-1]
        assert kernel.instructions["LDGSTS"] >= 16, (launch, kernel)


def test_norm_and_codes_read_once(compiled: dict[str, list[Usage]]) -> None:
    """16 bytes a load: with 256 threads a row of 4,096 bf16 takes two loads a thread."""
    (plain_rows,), (normed,) = compiled["rows of 4,096"], compiled["norm, rows of 4,096"]
    assert plain_rows.instructions["LDG"] == 2
    assert normed.instructions["LDG"] == 4  # the norm's weight as well
    assert max(plain_rows.registers, normed.registers) <= 64  # four blocks on an SM


def test_epilogues_do_not_double_the_registers(compiled: dict[str, list[Usage]]) -> None:
    """128 of them are sums; a scale loaded after the loop took 254 (docs/kernels.md)."""
    for launch in ("8,192 tokens", "dX, 8 bits", "dX, 16 bits", "dW, 8 bits", "dW, 16 bits"):
        assert compiled[launch][-1].registers <= 200, launch


def test_gradients_are_read_16_bytes_at_a_time(compiled: dict[str, list[Usage]]) -> None:
    """A thread's 16 values of a row of 4,096 bf16 take 2 loads, of x and of the gradient."""
    normed = compiled["norm's gradient, no weight"][0]
    assert normed.instructions["LDG"] == 2 + 2 + 1  # and rstd
    to_bytes = compiled["dX, 8 bits"][0]
    assert (to_bytes.kernel, to_bytes.instructions["LDG"]) == ("row_to_bytes", 2 + 2)


def test_sizes_of_one_compile(compile_launches: Callable[..., list[Usage]]) -> None:
    """Triton makes a constant of an integer argument 1."""
    from bitscale.quant.kernels.triton_table import KERNELS as k

    one = torch.empty(1, 1)
    x, weight = Int8Rows(one.to(torch.int8), one), Ternary(one.to(torch.int8), one[0, 0])
    for function, args in (
        (k.ternarize, (one, "absmean", 1e-5)),
        (k.ternarize, (one, "absmedian", 1e-5)),
        (k.rms_norm_quantize_rows, (one, one[0], 1e-5, 1e-5)),
        (k.integer_linear, (x, weight, one[0], FP32)),
        (k.input_grad, (one, weight, None)),
        (k.weight_grad, (one, x, BF16, None, None)),
        (k.input_grad, (one, weight, 8)),
        (k.weight_grad, (one, x, BF16, None, 24)),
        (k.rms_norm_grad, (one, one, one, one[0])),
    ):
        assert all(usage.stack_bytes == 0 for usage in compile_launches(function, *args))


# --- What surrounds the launches, in a decoder layer ---


def block_on_triton(quant: QuantConfig, strength: Strength, device: str) -> tuple[nn.Module, Any]:
    """A decoder layer on Triton's kernels, its weights prepared, and its arguments."""
    from bitscale.quant.kernels.triton_table import KERNELS

    model = Decoder(
        ModelConfig(vocab_size=61, num_layers=1, d_model=32, num_heads=4, d_ff=48), quant, seed=1
    ).to(device)
    block = model.layers[0]
    set_strength(block, strength)
    for _, layer in bit_linears(block):
        layer.kernels = KERNELS
    x_BSD = torch.zeros(2, 8, 32, device=device, requires_grad=True)
    return block, (x_BSD, *model.rotary(8, torch.device(device)), None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels whose launches are asked for; none is launched or compiled."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: names.append(self.__name__))
    return names


@pytest.mark.parametrize("measure", ["absmean", "absmedian"])
@pytest.mark.parametrize("bits", [None, 8, 16, 24])
def test_nothing_waits_between_launches(launched: list[str], bits: Any, measure: Any) -> None:
    """The Python around the kernels neither asks for a value nor copies from or to the host."""
    quant = QuantConfig(gradient_bits=bits, weight_scale=measure)
    for strength in (TERNARY, Strength(0.3, 0.6), Strength(1.0, 0.5), Strength(0.0, 0.7)):
        launched.clear()
        block, arguments = block_on_triton(quant, strength, "meta")
        with NoHostMemory():
            prepare_weights(block)
            block(*arguments).sum().backward()
        assert arguments[0].grad is not None
        weight = {"absmean": "abs_sum_partials", "absmedian": "count_digits"}[measure]
        assert (weight in launched) == (strength.weight > 0)
        assert ("forward" in launched) == (strength == TERNARY)


def test_compiled_block_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes the launches of both passes into its graph, without a break.

    Only the tracing is shown: what a GPU's compiler makes of the graph needs a GPU.
    """
    from triton.runtime import driver

    class Traced(Exception):
        """Ends the compilation: the graph cannot run here."""

    graphs: list[torch.fx.GraphModule] = []

    def take(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        raise Traced

    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(driver, "_active", Sm90Driver())
    for strength, kernels in (
        (TERNARY, {"quantize_row", "forward", "multiply_bytes", "norm_grad_rows"}),
        (Strength(0.3, 0.6), {"blend_row", "blend_ternary"}),
    ):
        graphs.clear()
        block, arguments = block_on_triton(QuantConfig(gradient_bits=16), strength, "cpu")
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match="Traced"):
            torch.compile(block, fullgraph=True, backend=take)(*arguments)
        (graph,) = graphs
        launches = [
            node
            for module in graph.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
            if "triton_kernel_wrapper" in str(node.target)
        ]
        table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
        taken = [table.get_kernel(node.kwargs["kernel_idx"]) for node in launches]
        # Dynamo keeps the launch's options in an autotuner of one configuration.
        assert kernels <= {getattr(kernel, "fn", kernel).__name__ for kernel in taken}


def test_document_tells_what_was_compiled(compiled: dict[str, list[Usage]]) -> None:
    import triton

    text = DOCUMENT.read_text(encoding="utf-8")
    if f"triton {triton.__version__}," not in text:
        pytest.skip(f"docs/kernels.md describes another triton than {triton.__version__}")
    want = table(compiled)
    assert want in text, f"put this into docs/kernels.md:\n{want}"
