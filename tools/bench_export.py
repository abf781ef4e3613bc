"""Time and memory of converting a whole model, against copying its file and safetensors alone.

    python tools/bench_export.py                              # 250 M parameters, 0.5 GB in bf16
    python tools/bench_export.py --layers 2 --repeats 5 --json export.json
    python tools/bench_export.py --with-import                # writes 12 bytes a parameter

The model is a random Llama in a Hugging Face directory. Contenders take turns, each in a process
of its own that has imported and opened everything before its clock starts: a warm page cache, and
no fsync but bitscale's own. Memory is what a contender adds to anonymous resident memory, sampled
every 10 ms; mapped files do not count. Seconds are of the CPU, in user and kernel, which other
processes and the disk disturb least, and medians; compare ratios, not machines.
"""

import argparse
import hashlib
import json
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitscale.config import ModelConfig, QuantConfig
from bitscale.convert import open_source
from bitscale.convert.formats import ExportOptions, export
from bitscale.convert.huggingface_config import to_huggingface_config
from bitscale.convert.model_source import parameter_shapes
from bitscale.convert.names import to_huggingface
from bitscale.convert.tensor_file import TensorSpec, write_sharded
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.quant.kernels import get_kernels
from bitscale.quant.pack import pack_2bit
from provenance import provenance

PACKAGES = ("torch", "safetensors")
Work = Callable[[], object]


class Contender(NamedTuple):
    name: str
    prepare: Callable[[Path, Path, Path], Work]  # (model, packed export, new path) -> what is timed


def copy(model: Path, packed: Path, out: Path) -> Work:
    return lambda: shutil.copyfile(model / "model.safetensors", out)


def load_and_save(model: Path, packed: Path, out: Path) -> Work:
    from safetensors.torch import load_file, save_file

    return lambda: save_file(load_file(model / "model.safetensors"), out)


def to_packed(model: Path, packed: Path, out: Path) -> Work:
    source = open_source(model)
    return lambda: export(source, out, "packed", quantize=QuantConfig())


def to_megatron(model: Path, packed: Path, out: Path) -> Work:
    source = open_source(model)
    return lambda: export(source, out, "megatron", ExportOptions())


def to_dequantized(model: Path, packed: Path, out: Path) -> Work:
    source = open_source(packed)
    return lambda: export(source, out, "hf-dequantized", ExportOptions())


def to_checkpoint(model: Path, packed: Path, out: Path) -> Work:
    source = open_source(model)
    return lambda: write_checkpoint(source, out, {})


CONTENDERS = [
    Contender("copy of the file", copy),
    Contender("safetensors load + save", load_and_save),
    Contender("bf16 -> packed, --quantize b158", to_packed),
    Contender("packed -> hf-dequantized", to_dequantized),
    Contender("bf16 -> megatron", to_megatron),
]
WITH_IMPORT = Contender("bf16 -> checkpoint (import)", to_checkpoint)


def make_model(m: ModelConfig, out: Path, seq_len: int) -> int:
    """A random model as transformers would store it; returns its bytes."""
    out.mkdir()
    shapes = parameter_shapes(m, QuantConfig())
    names = {to_huggingface(name): shape for name, shape in shapes.items()}
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in names.items()]
    tensors = ((name, 0.02 * torch.randn(shape)) for name, shape in names.items())
    write_sharded(out, specs, ((name, t.to(torch.bfloat16)) for name, t in tensors), 2**63)
    (out / "config.json").write_text(
        json.dumps(to_huggingface_config(m, dtype="bf16", seq_len=seq_len))
    )
    return sum(spec.num_bytes for spec in specs)


def run(contender: Contender, model: Path, packed: Path, folder: Path) -> tuple[float, float]:
    """(CPU seconds, MiB added) of it, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (contender, model, packed, folder, theirs)
    process = context.Process(target=_measured, args=arguments)
    process.start()
    theirs.close()
    result: tuple[float, float] = ours.recv()
    process.join()
    return result


def _measured(contender: Contender, model: Path, packed: Path, folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    out = folder / "out"
    work = contender.prepare(model, packed, out)
    before, peaks, done = _anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(_anonymous_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    pipe.send((seconds, max(peaks) - before))


def parts() -> dict[str, float]:
    """ns of the CPU a weight, of what a packed export does with one bf16 matrix; one thread."""
    torch.set_num_threads(1)
    weight = (0.02 * torch.randn(2816, 1024)).bfloat16()
    kernels = get_kernels("auto", "cpu")
    codes = kernels.ternarize(weight, "absmean", 1e-5).codes_FD
    work: dict[str, Work] = {
        "check for NaN and infinity": weight.aminmax,
        "scale and codes": lambda: kernels.ternarize(weight, "absmean", 1e-5),
        "SHA-256 of the codes": lambda: hashlib.sha256(codes.numpy().data),
        "packing": lambda: pack_2bit(codes),
    }
    return {name: 1e9 * _least_seconds(each) / weight.numel() for name, each in work.items()}


def _least_seconds(work: Work) -> float:
    seconds = []
    for _ in range(9):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=64_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--with-import", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    parser.add_argument("--state", default="unknown", help="of the machine: idle, busy, ...")
    parser.add_argument("--json", type=Path, help="write results and provenance to this file")
    args = parser.parse_args(argv)
    m = ModelConfig(
        vocab_size=args.vocab,
        num_layers=args.layers,
        d_model=args.width,
        num_heads=args.width // 64,
        d_ff=args.width * 11 // 4,
    )
    contenders = CONTENDERS + ([WITH_IMPORT] if args.with_import else [])
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model, packed = folder / "model", folder / "packed"
        num_bytes = make_model(m, model, seq_len=2048)
        export(open_source(model), packed, "packed", quantize=QuantConfig())
        found: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
        for repeat in range(args.repeats):
            for contender in contenders:
                found[contender.name].append(run(contender, model, packed, folder))
            print(f"repeat {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
    largest = 4 * args.vocab * args.width / 2**20
    print(f"{num_bytes / 2**20:,.0f} MiB in bf16; largest tensor in fp32 {largest:,.0f} MiB")
    print(f"{'':<34} {'CPU s':>8} {'of load+save':>13} {'MiB added':>10}")
    medians = {n: statistics.median(s for s, _ in runs) for n, runs in found.items()}
    results = []
    for name_of, runs in found.items():
        share = medians[name_of] / medians["safetensors load + save"]
        mib = max(added for _, added in runs)
        print(f"{name_of:<34} {medians[name_of]:>8.2f} {share:>13.2f} {mib:>10,.0f}")
        results.append({"name": name_of, "cpu_seconds": medians[name_of], "mib_added": mib})
    a_weight = parts()
    print("\na weight takes, in ns:")
    for name_of, ns in a_weight.items():
        print(f"{name_of:<34} {ns:>8.2f}")
    if args.json:
        origin = provenance(platform.processor() or platform.machine(), PACKAGES)
        origin |= {"model_bytes": num_bytes, "repeats": args.repeats, "state": args.state}
        args.json.write_text(
            json.dumps(
                {"provenance": origin, "results": results, "ns_a_weight": a_weight}, indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
