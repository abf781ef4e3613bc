"""Time packing and unpacking of ternary codes against memory copy and the public packers.

    python tools/bench_convert.py                          # a 4096 x 4096 matrix, a table
    python tools/bench_convert.py --shape 4096x11008 --repeats 31 --json convert.json

Contenders take turns within every repeat, so that a slow minute of the machine hits all of them;
the figures are medians, and the fastest of each, which a busy machine disturbs less. GB/s count
bytes read and written, of codes and of packed bytes, so the copy of the int8 codes is the limit;
results go to memory that is there already where a contender can be told so (the copy and ours).
Each result is compared with ours before it is timed.
"""

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitscale.quant import gguf_blocks, pack
from provenance import provenance

PACKAGES = ("torch", "transformers", "gguf", "numpy")
SCALE = torch.tensor(1.0)


class Contender(NamedTuple):
    layout: str
    by: str
    direction: str
    num_bytes: int  # read and written
    work: Callable[[], object]


def ours(codes_FD: Tensor, kernel: str) -> list[Contender]:
    """Every layout, both ways, into memory that is there."""
    columns, shape = codes_FD.shape[1], (codes_FD.shape[0], codes_FD.shape[1])
    blocks, lay = gguf_blocks, {"kernel": kernel}
    layouts: dict[str, tuple[Callable[..., Tensor], Callable[..., object]]] = {
        "2-bit": (pack.pack_2bit, pack.unpack_2bit),
        "base-3": (pack.pack_base3, partial(pack.unpack_base3, columns=columns)),
        "TQ2_0": (
            partial(blocks.pack_blocks, d=SCALE, kind="tq2_0"),
            partial(blocks.unpack_blocks, kind="tq2_0"),
        ),
        "TQ1_0": (
            partial(blocks.pack_blocks, d=SCALE, kind="tq1_0"),
            partial(blocks.unpack_blocks, kind="tq1_0"),
        ),
        "I2_S": (blocks.pack_i2_s, partial(blocks.unpack_i2_s, shape=shape)),
    }
    found = []
    for name, (packer, unpacker) in layouts.items():
        packed, back = packer(codes_FD, **lay), torch.empty_like(codes_FD)
        unpacker(packed, out=back, **lay)
        assert torch.equal(back, codes_FD), name
        size = codes_FD.numel() + packed.numel()
        by = "bitscale" if kernel == "cpu" else f"bitscale ({kernel})"
        work = partial(packer, codes_FD, out=packed, **lay)
        found.append(Contender(name, by, "pack", size, work))
        work_back = partial(unpacker, packed, out=back, **lay)
        found.append(Contender(name, by, "unpack", size, work_back))
    return found


def transformers(codes_FD: Tensor) -> list[Contender]:
    module = importlib.import_module("transformers.integrations.bitnet")
    own = codes_FD.clone()  # it adds 1 to its argument
    packed = module.pack_weights(own)
    assert torch.equal(packed, pack.pack_2bit(codes_FD))
    assert torch.equal(module.unpack_weights(packed, torch.int8), codes_FD)
    size = codes_FD.numel() + packed.numel()
    return [
        Contender(
            "2-bit", "transformers", "pack", size, lambda: module.pack_weights(own.copy_(codes_FD))
        ),
        Contender(
            "2-bit",
            "transformers",
            "unpack",
            size,
            lambda: module.unpack_weights(packed, torch.int8),
        ),
    ]


def gguf_py(codes_FD: Tensor) -> list[Contender]:
    """Its quantizers take fp32 and search for the scale; bytes are counted as ours."""
    module = importlib.import_module("gguf")
    weights, found = codes_FD.float().numpy(), []
    for name in ("TQ2_0", "TQ1_0"):
        kind = module.GGMLQuantizationType[name]
        packed = module.quants.quantize(weights, kind)
        mine = gguf_blocks.pack_blocks(codes_FD, SCALE, name.lower())  # type: ignore[arg-type]
        assert (packed == mine.numpy()).all(), name
        size = codes_FD.numel() + packed.size
        for direction, work, value in (
            ("pack", module.quants.quantize, weights),
            ("unpack", module.quants.dequantize, packed),
        ):
            found.append(Contender(name, "gguf-py", direction, size, partial(work, value, kind)))
    return found


def measure(contenders: Sequence[Contender], repeats: int) -> list[tuple[float, float]]:
    """Median and smallest seconds of each."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for repeat in range(repeats + 1):
        for times, contender in zip(seconds, contenders, strict=True):
            start = time.perf_counter()
            contender.work()
            if repeat:  # the first warms up
                times.append(time.perf_counter() - start)
        print(f"\rrepeat {repeat} of {repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [(statistics.median(times), min(times)) for times in seconds]


def origin_of(args: argparse.Namespace) -> dict[str, Any]:
    return provenance(platform.processor() or platform.machine(), PACKAGES) | {
        "shape": args.shape,
        "repeats": args.repeats,
        "state": args.state,
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x4096", help="rows x columns of the codes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", action="store_true", help="also transformers and gguf-py: slow")
    parser.add_argument("--reference", action="store_true", help="also our plain PyTorch")
    parser.add_argument("--state", default="unknown", help="of the machine: idle, busy, ...")
    parser.add_argument("--json", type=Path, help="write results and provenance to this file")
    args = parser.parse_args(argv)
    rows, columns = map(int, args.shape.split("x"))
    codes_FD = torch.randint(-1, 2, (rows, columns)).to(torch.int8)
    copy = torch.empty_like(codes_FD)
    contenders = [
        Contender("int8", "torch", "copy", 2 * codes_FD.numel(), lambda: copy.copy_(codes_FD)),
        *ours(codes_FD, "cpu"),
        *(ours(codes_FD, "reference") if args.reference else ()),
        *([*transformers(codes_FD), *gguf_py(codes_FD)] if args.peers else ()),
    ]
    times = measure(contenders, args.repeats)
    results = []
    print(f"{'':<39} {'GB/s':>8} {'of copy':>8} {'fastest':>8} {'of copy':>8}")
    for one, seconds in zip(contenders, times, strict=True):
        speeds = [one.num_bytes / each / 1e9 for each in seconds]
        shares = [
            speed / (contenders[0].num_bytes / limit / 1e9)
            for speed, limit in zip(speeds, times[0], strict=True)
        ]
        print(
            f"{one.layout:<8} {one.by:<22} {one.direction:<7} {speeds[0]:>8.2f} {shares[0]:>8.3f} "
            f"{speeds[1]:>8.2f} {shares[1]:>8.3f}"
        )
        figures = {"median_gb_s": speeds[0], "of_copy": shares[0]}
        figures |= {"fastest_gb_s": speeds[1], "fastest_of_copy": shares[1]}
        results.append({k: v for k, v in one._asdict().items() if k != "work"} | figures)
    if args.json:
        content = {"provenance": origin_of(args), "results": results}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
