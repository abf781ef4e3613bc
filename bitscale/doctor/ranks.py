"""One rank of the doctor's measurement: `python -m bitscale.doctor.ranks` under RANK and so on.

Prints one JSON object. All ranks compute at the same time, as in training, so that ranks that share
cores, memory or power are seen as they will be.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Bytes: far above a link's bandwidth times its latency, and seconds at most on 1 Gbit/s.
_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
_LINK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_MATRIX = {"cpu": 512, "cuda": 8192}
_TIMEOUT = datetime.timedelta(seconds=60)


def main() -> int:
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, num_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device(os.environ["BITSCALE_DOCTOR_DEVICE"])
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))
    backend = "nccl" if device.type == "cuda" else "gloo"
    started = time.monotonic()
    dist.init_process_group(backend, timeout=_TIMEOUT)  # from MASTER_ADDR, MASTER_PORT
    one = torch.zeros(1, device=device)
    dist.all_reduce(one)
    result: dict[str, Any] = {"join_seconds": time.monotonic() - started}

    num_bytes = _BYTES[device.type]
    large = torch.zeros(num_bytes // 4, device=device)
    result["compute_seconds"] = _compute_seconds(device)
    dist.barrier()
    result["latency_seconds"] = _median(lambda: dist.all_reduce(one), device, 30)
    seconds = _median(lambda: dist.all_reduce(large), device, 5)
    result["allreduce_bytes"], result["allreduce_seconds"] = num_bytes, seconds
    # What each link carries: a ring moves 2 (n - 1) / n of the data over every one of them.
    result["bus_bytes_per_second"] = num_bytes / seconds * 2 * (world - 1) / world
    leaders = [int(r) for r in os.environ["BITSCALE_DOCTOR_LEADERS"].split(",")]
    result["link"] = _link(leaders, rank, device)
    dist.destroy_process_group()
    print(json.dumps(result), flush=True)
    return 0


def _median(work: Callable[[], object], device: Any, repeats: int) -> float:
    for _ in range(2):
        work()
    return statistics.median(_seconds(work, device) for _ in range(repeats))


def _seconds(work: Callable[[], object], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _compute_seconds(device: Any) -> float:
    """Of a matrix product that every rank does; the one that takes longest holds up the rest."""
    import torch

    size = _MATRIX[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    return _median(lambda: a @ a, device, 15)


def _link(leaders: list[int], rank: int, device: Any) -> dict[str, float] | None:
    """Latency and bandwidth from this host to the next in the ring, told by its first rank.

    Links that share no host are measured at the same time: even ones, odd ones, and with an odd
    number of hosts the one that closes the ring.
    """
    import torch.distributed as dist

    count, own = len(leaders), None
    for turn in range(3):
        for index in range(count if count > 2 else count - 1):
            ends = (leaders[index], leaders[(index + 1) % count])
            of_turn = 2 if index == count - 1 and count % 2 else index % 2
            if of_turn == turn and rank in ends:
                leads = rank == ends[0]
                measured = _measure_link(ends[1] if leads else ends[0], leads, device)
                own = measured if leads else own
        dist.barrier()
    return own


def _measure_link(other: int, leads: bool, device: Any) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    def there_and_back(buffer: torch.Tensor) -> None:
        for send in (leads, not leads):
            (dist.send if send else dist.recv)(buffer, other)

    small = torch.zeros(1, device=device)
    large = torch.zeros(_LINK_BYTES[device.type] // 4, device=device)
    latency = _median(lambda: there_and_back(small), device, 30) / 2
    seconds = _median(lambda: there_and_back(large), device, 5) / 2
    return {"latency_seconds": latency, "bytes_per_second": large.nbytes / seconds}


if __name__ == "__main__":
    sys.exit(main())
