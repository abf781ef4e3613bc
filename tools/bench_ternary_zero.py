"""Train with and without a 16-bit copy of ternary matrices on every rank: bytes and time.

    python tools/bench_ternary_zero.py                        # two ranks, about three minutes
    python tools/bench_ternary_zero.py --ranks 4 --set engine.zero_stage=2 model.d_model=768
    python tools/bench_ternary_zero.py --json out.json

The contenders are worlds of gloo ranks with the same decoder, bf16 and random tokens, at λ = 1: a
16-bit copy of each ternary matrix on every rank, codes in int8, in 2 bits, in 1.6 bits (base 3).
They take turns step by step, so that a slow minute of the machine hits all. For each rank:
bytes of the storages that hold weights and codes (between steps, and within one), the largest
resident set of a ternary step, what a step's collectives carry, and the step's time. The losses of
all must be the same to the bit, or the exit code is 1.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode

from bitscale.config import Config, load_config
from bitscale.data.batches import MicroBatch
from bitscale.engine import TrainEngine, make_engine
from bitscale.mesh import Mesh, close_mesh, init_mesh
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY
from provenance import provenance

PACKAGES = ("torch", "deepspeed", "numpy")
DEFAULTS = """\
run: {dir: unused}
model: {num_layers: 8, d_model: 512, num_heads: 8, num_kv_heads: 4, d_ff: 1408, vocab_size: 4096}
data: {corpora: [{path: unused}], seq_len: 32}
train: {steps: 1000, global_batch_size: 4, micro_batch_size: 1, dtype: bf16}
optim: {lr: 1e-4}
engine: {device: cpu, num_threads: 1, zero_stage: 1}
"""
CONTENDERS = {
    "16-bit copy": (),
    "codes, int8": ("ternary_gather=true", "packed_codes=false"),
    "codes, packed": ("ternary_gather=true", "packed_codes=true"),
    "codes, base 3": ("ternary_gather=true", "packed_codes=true", "code_packing=base3"),
}
MIB = 2**20


class Carried(TorchDispatchMode):
    """Bytes of the whole tensor of each collective, by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if str(func).startswith("c10d."):
            whole = max(tensors(args), key=lambda t: t.numel() * t.element_size())
            kind = str(func).split(".")[1].strip("_")
            self.num_bytes[f"{kind} {whole.dtype}"] += whole.numel() * whole.element_size()
        return func(*args, **(kwargs or {}))


def tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def storage_bytes(values: Iterable[Tensor]) -> int:
    """Of distinct storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}
    return sum(storages.values())


def weight_bytes(engine: TrainEngine) -> int:
    """Of 16-bit weights and codes, of ternary matrices only, that this rank holds now."""
    layers = [layer for _, layer in bit_linears(engine.module)]
    weights = [layer.weight.data for layer in layers]
    codes = [(p.codes, p.packed) for layer in layers if (p := layer.prepared) is not None]
    return storage_bytes(weights) + storage_bytes(tensors(codes))


def peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Rank:
    """One rank's engine, and the steps that it is told to take."""

    def __init__(self, cfg: Config, mesh: Mesh) -> None:
        model = Decoder(cfg.model, cfg.quant, seed=0).bfloat16()
        self.cfg, self.mesh, self.engine = cfg, mesh, make_engine(cfg, model, mesh)
        self.within = 0
        self.generator = torch.Generator().manual_seed(mesh.rank)
        model.register_forward_hook(self.look)

    def look(self, *_: object) -> None:
        self.within = max(self.within, weight_bytes(self.engine))

    def step(self, *, ternary: bool, counted: bool) -> dict[str, Any]:
        cfg = self.cfg
        num_batches = cfg.train.global_batch_size // (
            cfg.train.micro_batch_size * self.mesh.world_size
        )
        shape = (num_batches, cfg.train.micro_batch_size, cfg.data.seq_len + 1)
        ids = torch.randint(cfg.model.vocab_size or 0, shape, generator=self.generator)
        batches = [MicroBatch(rows[:, :-1], rows[:, 1:], None) for rows in ids]
        set_strength(self.engine.module, TERNARY if ternary else SIXTEEN_BIT)
        self.within = 0
        torch.distributed.barrier()
        forget_peak()
        begun = time.perf_counter()
        carried = Carried()
        if counted:
            with carried:
                result = self.engine.train_step(batches, lr=1e-3, weight_decay=0.1)
        else:
            result = self.engine.train_step(batches, lr=1e-3, weight_decay=0.1)
        return {
            "seconds": time.perf_counter() - begun,
            "loss": float(result.loss),
            "peak_rss": peak_rss(),
            "weights_within": self.within,
            "weights_between": weight_bytes(self.engine),
            "carried": dict(carried.num_bytes),
        }


def serve(rank: int, size: int, port: int, cfg: Config, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    here = Rank(cfg, init_mesh(cfg.engine.device, cfg.engine.num_threads))
    shapes = here.engine.parameter_shapes()
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    ternary = sum(sizes[name] for name in here.engine.ternary_weights())
    pipe.send({"ternary": ternary, "parameters": sum(sizes.values())})
    while (told := pipe.recv()) is not None:
        pipe.send(here.step(**told))
    close_mesh()


class Contender:
    """A world of ranks."""

    def __init__(self, cfg: Config, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, self.store.port, cfg, theirs)
            context.Process(target=serve, args=args, daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        self.sizes = self._receive()[0]
        self.steps: list[list[dict[str, Any]]] = []

    def step(self, *, ternary: bool = True, counted: bool = False) -> None:
        for pipe in self.pipes:
            pipe.send({"ternary": ternary, "counted": counted})
        self.steps.append(self._receive())

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)

    def _receive(self) -> list[dict[str, Any]]:
        return [pipe.recv() for pipe in self.pipes]


def summary(contender: Contender, num_timed: int) -> dict[str, Any]:
    """Of the timed ternary steps, which came last."""
    timed = contender.steps[-num_timed:]
    counted = next(step for step in contender.steps if step[0]["carried"])
    slowest = [max(rank["seconds"] for rank in step) for step in timed]

    def largest(key: str) -> int:
        return max(rank[key] for step in timed for rank in step)

    return {
        "step_seconds": statistics.median(slowest),
        "step_seconds_quartiles": statistics.quantiles(slowest, n=4)[::2],
        "peak_rss_bytes": largest("peak_rss"),
        "ternary_weight_bytes_within_a_step": largest("weights_within"),
        "ternary_weight_bytes_between_steps": largest("weights_between"),
        "carried_bytes_a_step": counted[0]["carried"],
        "losses": [rank["loss"] for step in contender.steps for rank in step],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="of each contender (default 2)")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps (default 8)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys")
    parser.add_argument("--json", type=Path, help="write figures and provenance to this file")
    args = parser.parse_args()
    base = Path(os.environ.get("TMPDIR", "/tmp")) / f"bench-ternary-zero-{os.getpid()}.yaml"
    base.write_text(DEFAULTS, encoding="utf-8")
    contenders = {}
    for name, keys in CONTENDERS.items():
        cfg = load_config(base, [*args.set, *(f"engine.{key}" for key in keys)])
        contenders[name] = Contender(cfg, args.ranks)
    base.unlink()
    plan = [{"ternary": False}, {}, {"counted": True}, *[{} for _ in range(args.repeats)]]
    for index, told in enumerate(plan):
        print(f"step {index + 1} of {len(plan)}", file=sys.stderr, flush=True)
        for contender in contenders.values():
            contender.step(**told)
    found = {name: summary(c, args.repeats) for name, c in contenders.items()}
    sizes = contenders["16-bit copy"].sizes
    for contender in contenders.values():
        contender.close()
    losses = [figures.pop("losses") for figures in found.values()]
    report = {
        "contenders": found,
        "sizes": sizes,
        "ranks": args.ranks,
        "losses_are_the_same_bits": all(of == losses[0] for of in losses),
        **provenance(f"{os.cpu_count()} CPU cores", PACKAGES),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    return 0 if report["losses_are_the_same_bits"] else 1


def show(report: dict[str, Any]) -> None:
    sizes = report["sizes"]
    print(
        f"{sizes['parameters']:,} parameters, {sizes['ternary']:,} ternary, {report['ranks']} ranks"
    )
    for name, figures in report["contenders"].items():
        print(f"\n{name}")
        for key, value in figures.items():
            if key.endswith("bytes") or "_bytes_" in key:
                parts = value.items() if isinstance(value, dict) else [("", value)]
                for part, size in parts:
                    each = size / sizes["ternary"]
                    print(f"  {key} {part}: {size / MIB:.2f} MiB, {each:.3f} B a ternary weight")
            else:
                print(f"  {key}: {value}")
    print(f"\nlosses are the same bits: {report['losses_are_the_same_bits']}")


if __name__ == "__main__":
    sys.exit(main())
