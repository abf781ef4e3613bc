"""Time whole training steps: 16 bit and ternary, ours and the public ones, side by side.

    python tools/bench_train.py                     # every contender; minutes on an idle machine
    python tools/bench_train.py --set model.d_model=1024 data.seq_len=1024 --repeats 15
    python tools/bench_train.py --contenders plain-16bit,ours-cpu --json out.json

Each contender is a process of its own with the same decoder shapes, the same random tokens and
AdamW. They take turns step by step, so that a slow minute of the machine hits all of them; figures
are medians with quartiles. On a CPU they are seconds of processor time in one thread: these hardly
depend on what else the machine does. Wall-clock seconds are in the JSON, and mean something on an
idle machine. On a GPU they are seconds until the loss is there. Memory is the largest resident set
less that after the imports (on a GPU, of torch's allocator). One rank sends nothing: for bytes on
the wire see tools/bench_scale.py.

Contenders: our decoder in 16 bit in our engine, on DeepSpeed alone, and with a plain torch loop;
our ternary training with each kernel and width of gradients, compiled or not; our decoder and
engine with another package's linear layers swapped in; transformers' Llama with a plain loop. "16
bit" is unquantized training in `train.dtype`. What cannot run is listed with the reason. Peers: pip
install bitlinear onebitllms transformers torchao.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bitscale.config import Config, load_config, num_kv_heads
from bitscale.data.batches import MicroBatch
from bitscale.engine import TrainEngine
from bitscale.mesh import init_mesh
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.model.compiled import compile_blocks
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY
from provenance import provenance

PACKAGES = ("torch", "deepspeed", "bitlinear", "transformers", "torchao", "onebitllms", "numpy")
WARM_UPS = 2
DEFAULTS = """\
run: {dir: unused}
model: {num_layers: 3, d_model: 512, num_heads: 8, num_kv_heads: 4, d_ff: 1408, vocab_size: 2048}
data: {corpora: [{path: unused}], seq_len: 512}
train: {steps: 1000, global_batch_size: 4, micro_batch_size: 4, dtype: fp32}
optim: {lr: 1e-4}
engine: {device: auto, zero_stage: 1, num_threads: 1}
"""

Step = Callable[[Tensor, Tensor], float]  # one optimizer step on ids and targets [B, S]; the loss


class Contender(NamedTuple):
    what: str
    build: Callable[[Config], Step]


# --- Contenders ---


def ours(
    cfg: Config,
    kernel: str = "reference",
    bits: int | None = None,
    *,
    ternary: bool = True,
    compiled: bool = False,
) -> Step:
    changes = {
        "quant": cfg.quant.model_copy(update={"kernel": kernel, "gradient_bits": bits}),
        "train": cfg.train.model_copy(update={"compile": compiled}),
    }
    return on_engine(cfg.model_copy(update=changes), ternary=ternary)


def swapped(cfg: Config, make: Callable[[nn.Linear], nn.Module]) -> Step:
    """Our decoder and engine, with every BitLinear replaced by what `make` makes of a Linear."""
    return on_engine(cfg, ternary=False, make=make)


def on_engine(
    cfg: Config, *, ternary: bool, make: Callable[[nn.Linear], nn.Module] | None = None
) -> Step:
    mesh = init_mesh(cfg.engine.device, cfg.engine.num_threads)
    model = Decoder(cfg.model, cfg.quant, seed=0)
    if make is not None:
        replace_linears(model, make)
    if cfg.train.compile:
        compile_blocks(model, mesh.device.type)
    if cfg.train.dtype == "bf16":
        model.bfloat16()
    engine = TrainEngine(cfg, model.to(mesh.device), mesh)
    set_strength(model, TERNARY if ternary else SIXTEEN_BIT)

    def step(ids_BS: Tensor, targets_BS: Tensor) -> float:
        batch = MicroBatch(ids_BS, targets_BS, None)
        return float(engine.train_step([batch], lr=1e-4, weight_decay=0.1).loss)

    return step


def replace_linears(model: Decoder, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(bit_linears(model)):
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
        with torch.no_grad():
            linear.weight.copy_(layer.weight)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(linear))


def plain(cfg: Config) -> Step:
    """Our decoder in 16 bit, without DeepSpeed."""
    model = Decoder(cfg.model, cfg.quant, seed=0)
    return plain_loop(cfg, model, lambda ids, targets: model(ids, targets))


def deepspeed_alone(cfg: Config) -> Step:
    """Our decoder in 16 bit, given to DeepSpeed as its documentation says."""
    device = init_mesh(cfg.engine.device, cfg.engine.num_threads).device
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else minutes of compilation
    model = Decoder(cfg.model, cfg.quant, seed=0).to(device)
    size = cfg.train.micro_batch_size
    settings = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": cfg.engine.zero_stage},
        "bf16": {"enabled": cfg.train.dtype == "bf16"},
    }
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)

    def step(ids_BS: Tensor, targets_BS: Tensor) -> float:
        loss = engine(ids_BS.to(device), targets_BS.to(device))
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def transformers_llama(cfg: Config) -> Step:
    transformers = importlib.import_module("transformers")
    m = cfg.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ff,
            num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads,
            num_key_value_heads=num_kv_heads(cfg), tie_word_embeddings=m.tie_embeddings,
            max_position_embeddings=cfg.data.seq_len, use_cache=False,
        )
    )  # fmt: skip

    def loss_of(ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        logits = model(input_ids=ids_BS).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets_BS.flatten())

    return plain_loop(cfg, model, loss_of)


def plain_loop(cfg: Config, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """fp32, or bf16 weights with fp32 masters in the optimizer's place by autocast."""
    device = init_mesh(cfg.engine.device, cfg.engine.num_threads).device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    bf16 = cfg.train.dtype == "bf16"

    def step(ids_BS: Tensor, targets_BS: Tensor) -> float:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = loss_of(ids_BS.to(device), targets_BS.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


class FakeQuantized(nn.Linear):
    """Quantization in floating point, straight through: Microsoft's Training Tips, Code, FAQ."""

    def forward(self, x: Tensor) -> Tensor:
        p = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        q = 1.0 / self.weight.abs().mean().clamp(min=1e-5)
        x = x + ((x * p).round().clamp(-128, 127) / p - x).detach()
        w = self.weight + ((self.weight * q).round().clamp(-1, 1) / q - self.weight).detach()
        return F.linear(x, w)


def with_weight(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    layer.weight = linear.weight
    return layer


def fake(linear: nn.Linear) -> nn.Module:
    features = linear.in_features, linear.out_features
    return with_weight(FakeQuantized(*features, bias=False), linear)


def bitlinear(linear: nn.Linear) -> nn.Module:
    layer = importlib.import_module("bitlinear").BitLinear(
        linear.in_features, linear.out_features, bias=False,
        weight_measure="AbsMean", activation_range=(-127, 127), norm=None,
    )  # fmt: skip
    return with_weight(layer, linear)


def auto_bit_linear(linear: nn.Linear) -> nn.Module:
    module = importlib.import_module("transformers.integrations.bitnet")
    layer = module.AutoBitLinear(
        linear.in_features, linear.out_features, bias=False, online_quant=True
    )
    return with_weight(layer, linear)


def onebit(linear: nn.Linear) -> nn.Module:
    if not torch.cuda.is_available():
        raise RuntimeError("its kernels need an NVIDIA GPU")
    module = importlib.import_module("onebitllms")
    return with_weight(module.BitNetLinear(linear.in_features, linear.out_features), linear)


def torchao(linear: nn.Linear) -> nn.Module:
    quantize = importlib.import_module("torchao.quantization").quantize_
    training = importlib.import_module("torchao.prototype.quantized_training")
    module = nn.Sequential(linear)
    quantize(module, training.bitnet_training())
    return module[0]


def torchao_plain(cfg: Config) -> Step:
    """On a plain loop: DeepSpeed's flat buffers do not hold its wrapped weights."""
    model = Decoder(cfg.model, cfg.quant, seed=0)
    replace_linears(model, torchao)
    return plain_loop(cfg, model, lambda ids, targets: model(ids, targets))


CONTENDERS = {
    "ours-16bit": Contender("bitscale, 16 bit", lambda c: ours(c, ternary=False)),
    "ours-16bit-compiled": Contender(
        "the same, train.compile", lambda c: ours(c, ternary=False, compiled=True)
    ),
    "deepspeed-16bit": Contender("its decoder on DeepSpeed alone", deepspeed_alone),
    "plain-16bit": Contender("its decoder, plain torch loop", plain),
    "llama-16bit": Contender("transformers' Llama, plain torch loop", transformers_llama),
    "fake": Contender("fake quantization swapped in", lambda c: swapped(c, fake)),
    "bitlinear": Contender("bitlinear swapped in", lambda c: swapped(c, bitlinear)),
    "transformers": Contender("AutoBitLinear swapped in", lambda c: swapped(c, auto_bit_linear)),
    "onebitllms": Contender("onebitllms swapped in", lambda c: swapped(c, onebit)),
    "torchao": Contender("torchao's bitnet_training, plain torch loop", torchao_plain),
    "ours-reference": Contender("bitscale, ternary, plain PyTorch", ours),
    "ours-cpu": Contender("bitscale, ternary, kernel cpu", lambda c: ours(c, "cpu")),
    "ours-cpu-compiled": Contender(
        "the same, train.compile", lambda c: ours(c, "cpu", compiled=True)
    ),
    "ours-cpu-int24": Contender("kernel cpu, int24 gradients", lambda c: ours(c, "cpu", 24)),
    "ours-cpu-int16": Contender("the same, int16 gradients", lambda c: ours(c, "cpu", 16)),
    "ours-cpu-int8": Contender("the same, int8 gradients", lambda c: ours(c, "cpu", 8)),
    "ours-triton": Contender("bitscale, ternary, kernel triton", lambda c: ours(c, "triton")),
    "ours-triton-int8": Contender("the same, int8 gradients", lambda c: ours(c, "triton", 8)),
}


# --- Processes ---


def work(name: str, cfg: Config) -> None:
    """A contender's process: a line of JSON after the set-up, and one for each line it reads."""
    stdout = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    assert cfg.model.vocab_size is not None
    try:
        import_all()
        before = _peak_mib()
        step = CONTENDERS[name].build(cfg)
        generator = torch.Generator().manual_seed(0)
        shape = (cfg.train.micro_batch_size, cfg.data.seq_len + 1)
        ids = torch.randint(cfg.model.vocab_size, shape, generator=generator)
        losses = [step(ids[:, :-1], ids[:, 1:]) for _ in range(WARM_UPS)]
    except Exception as error:  # a peer may fail in any way; the reason is what counts
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps({"reason": reason}), file=stdout, flush=True)
        return
    print(json.dumps({"losses": losses}), file=stdout, flush=True)
    for _ in sys.stdin:
        begun, begun_wall = clock(), time.perf_counter()
        loss = step(ids[:, :-1], ids[:, 1:])
        wall = time.perf_counter() - begun_wall
        found = {"seconds": clock() - begun, "wall_seconds": wall, "loss": loss}
        print(json.dumps(found | {"mib": _peak_mib() - before}), file=stdout, flush=True)


def import_all() -> None:
    """What contenders would import while they are built, which is not their training's memory."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    for name in ("deepspeed", "transformers", "transformers.models.llama.modeling_llama"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def clock() -> float:
    """Seconds that count: of this process's threads on a CPU, of the world with a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def process(name: str, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--work", name, "--set", *args.set]
    if args.config:
        command += ["--config", args.config]
    log = sys.stderr if args.verbose else subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of every step of every contender, in turns; or why it does not run."""
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name in tqdm(args.contenders, desc="set-up", file=sys.stderr):
            started = stack.enter_context(process(name, args))
            assert started.stdout is not None
            first = json.loads(started.stdout.readline() or '{"reason": "its process ended"}')
            results[name] = {"what": CONTENDERS[name].what, **first}
            if "reason" not in first:
                running[name] = started
        for _ in tqdm(range(args.repeats), desc="steps in turn", file=sys.stderr):
            for name, started in running.items():
                assert started.stdin is not None and started.stdout is not None
                started.stdin.write("\n")
                started.stdin.flush()
                found = json.loads(started.stdout.readline())
                for key in ("seconds", "wall_seconds"):
                    results[name].setdefault(key, []).append(found[key])
                results[name]["losses"].append(found["loss"])
                results[name]["mib"] = found["mib"]
    return results


def table(results: dict[str, dict[str, Any]], num_tokens: int) -> str:
    """Markdown; "over": how many times as fast as our own step in 16 bit."""
    lines = [
        "| contender | what | step s (quartiles) | tokens/s | over ours-16bit | peak MiB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    base = results.get("ours-16bit", {}).get("seconds")
    for name, found in results.items():
        if "seconds" not in found:
            continue
        low, median, high = statistics.quantiles(found["seconds"], n=4, method="inclusive")
        ratio = f"{statistics.median(base) / median:.2f}" if base else "-"
        lines.append(
            f"| `{name}` | {found['what']} | {median:.3f} ({low:.3f} to {high:.3f}) | "
            f"{num_tokens / median:,.0f} | {ratio} | {found['mib']:.0f} | "
            f"{found['losses'][-1]:.3f} |"
        )
    reasons = [
        f"- `{name}` did not run: {found['reason']}"
        for name, found in results.items()
        if "reason" in found
    ]
    return "\n".join([*lines, "", *reasons])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML; default: 3 layers of width 512, 2,048 tokens")
    parser.add_argument("--set", nargs="*", default=[], help="overrides: section.key=value")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--note", default="", help="on the state of the machine, for the records")
    parser.add_argument("--json", type=Path, help="write figures and provenance here")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders print")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.contenders = args.contenders.split(",")
    if unknown := [name for name in args.contenders if name not in CONTENDERS]:
        parser.error(f"unknown contenders {unknown}; choose from {', '.join(CONTENDERS)}")
    if args.repeats < 2:
        parser.error("--repeats: at least 2, for quartiles")
    return args


def read_config(args: argparse.Namespace) -> Config:
    if args.config:
        return load_config(Path(args.config), args.set)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "default.yaml"
        path.write_text(DEFAULTS)
        return load_config(path, args.set)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    cfg = read_config(args)
    if args.work:
        work(args.work, cfg)
        return 0
    load = [os.getloadavg()]
    results = measure(args)
    load.append(os.getloadavg())
    num_tokens = cfg.train.micro_batch_size * cfg.data.seq_len
    print(table(results, num_tokens))
    if args.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        origin = provenance(device, PACKAGES) | {"note": args.note, "load_average": load}
        shapes = {"model": cfg.model.model_dump(mode="json"), "tokens": num_tokens}
        found = {"provenance": origin, **shapes, "dtype": cfg.train.dtype, "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if any("seconds" in found for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
