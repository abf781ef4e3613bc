"""Ranks and devices of this launch, read once from the launcher's environment.

`deepspeed`, `torchrun` and a plain single process give the same `Mesh`; everything downstream is
handed ranks and groups and never looks them up.
"""

import datetime
import os
import socket
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore as _HashStore
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from bitscale.errors import ConfigError, KernelUnavailable

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. Tensor-parallel ranks are neighbours: tp varies fastest, then data
    parallelism, then the pipeline stage (the order of DeepSpeed and Megatron-LM)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    tp_size: int = 1
    tp_group: dist.ProcessGroup | None = None  # None: one rank
    dp_group: dist.ProcessGroup | None = None  # None: all ranks
    pp_size: int = 1
    pp_group: dist.ProcessGroup | None = None  # one rank of each stage; None: one stage
    # The first and the last of them, where this rank is one of these.
    ends_group: dist.ProcessGroup | None = None
    # Tensor-parallel ranks that hold the same key/value head.
    kv_replicas: int = 1
    kv_group: dist.ProcessGroup | None = None

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp_size % self.dp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp_size * self.dp_size)

    @property
    def stride(self) -> int:
        """Distance in ranks from one pipeline stage to the next."""
        return self.tp_size * self.dp_size

    @property
    def speaks_for_stage(self) -> bool:
        """Whether this is the first rank of its pipeline stage."""
        return self.rank % self.stride == 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all ranks (in place)."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """The largest of every rank's `value`."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def gather_objects(self, item: T) -> list[T]:
        """Every rank's `item`, in rank order (small objects of this launch only)."""
        if self.world_size == 1:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return cast(list[T], items)


def single_process_mesh(device: str) -> Mesh:
    """This process alone, without a process group (evaluation, conversion)."""
    return Mesh(0, 1, 0, 1, _choose_device(device, 0))


def world_size_from_environment() -> int:
    """Number of ranks that the launcher started (1 without a launcher)."""
    return _environment_int("WORLD_SIZE", 1)


def rank_from_environment() -> int:
    """This process's rank among them (0 without a launcher)."""
    return _environment_int("RANK", 0)


def under_launcher() -> bool:
    """Whether torchrun, deepspeed or another launcher started this process."""
    return "RANK" in os.environ


def init_mesh(device: str, num_threads: int = 0, timeout_seconds: float = 1800.0) -> Mesh:
    """Join the process group of this launch and bind this rank's device and CPU threads.

    Args:
        device: "auto" (CUDA if there is one), "cpu" or "cuda".
        num_threads: CPU threads of this rank; 0 divides the cores among the local ranks, whatever
            OMP_NUM_THREADS the launcher set, so that every launcher computes the same.
        timeout_seconds: that a rank waits for the others, here and in each collective of the
            world's group (`set_timeout` extends it to groups that others make).

    Raises:
        KernelUnavailable: CUDA was asked for and is not there.
    """
    rank, world_size = rank_from_environment(), world_size_from_environment()
    local_rank = local_rank_from_environment()
    # torchrun and deepspeed disagree on the name.
    local_world_size = _environment_int("LOCAL_WORLD_SIZE", _environment_int("LOCAL_SIZE", 1))
    torch_device = _choose_device(device, local_rank)
    torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // local_world_size))
    if not dist.is_initialized():
        backend = "nccl" if torch_device.type == "cuda" else "gloo"
        if under_launcher():
            timeout = datetime.timedelta(seconds=timeout_seconds)
            dist.init_process_group(backend, timeout=timeout)
        else:
            # One process: an in-memory store needs no free port, and what listens all the same
            # (gloo's and NCCL's transports, in every group) does so where nobody else can reach it.
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, _loopback())
            dist.init_process_group(backend, store=_HashStore(), rank=0, world_size=1)
    return Mesh(rank, world_size, local_rank, local_world_size, torch_device)


def set_timeout(timeout_seconds: float) -> None:
    """How long a collective waits, in every process group that this rank is in, whoever made it:
    torch gives a new group its default, not its parent's."""
    for group in list(_world.pg_map):
        _set_pg_timeout(datetime.timedelta(seconds=timeout_seconds), group)


def local_rank_from_environment() -> int:
    """This process's rank among those of its host (0 without a launcher)."""
    return _environment_int("LOCAL_RANK", 0)


def share_model(mesh: Mesh, tp: int, num_kv_heads: int, pp: int = 1) -> Mesh:
    """`mesh` with groups of `tp` neighbouring ranks, in `pp` stages (a collective over all ranks).

    With fewer key/value heads than tensor-parallel ranks, tp / num_kv_heads neighbours share one.
    """
    world_size = mesh.world_size
    assert world_size % (tp * pp) == 0, "checked by check_world_size"
    if tp * pp == 1:
        return mesh
    stride = world_size // pp
    by_dp = [
        range(stage + first, stage + stride, tp)
        for stage in range(0, world_size, stride)
        for first in range(tp)
    ]
    mesh = replace(mesh, tp_size=tp, pp_size=pp, dp_group=_own_group(mesh, by_dp))
    if tp > 1:
        replicas = max(tp // num_kv_heads, 1)
        heads = [range(s, s + replicas) for s in range(0, world_size, replicas)]
        mesh = replace(
            mesh,
            tp_group=_own_group(mesh, [range(s, s + tp) for s in range(0, world_size, tp)]),
            kv_replicas=replicas,
            kv_group=None if replicas == 1 else _own_group(mesh, heads),
        )
    if pp > 1:
        lines = [range(first, world_size, stride) for first in range(stride)]
        ends = [line[:: pp - 1] for line in lines]
        mesh = replace(mesh, pp_group=_own_group(mesh, lines), ends_group=_own_group(mesh, ends))
    return mesh


def _own_group(mesh: Mesh, groups: list[range]) -> dist.ProcessGroup | None:
    """The group that this rank is in; every rank makes all of them, in the same order."""
    made = [(dist.new_group(list(ranks)), ranks) for ranks in groups]
    return next((group for group, ranks in made if mesh.rank in ranks), None)


def close_mesh() -> None:
    """Leave the process group (silences NCCL's and gloo's warnings at exit)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise KernelUnavailable(
            "engine.device='cuda' but torch sees no CUDA device; use engine.device=cpu, or "
            "install a CUDA build of torch and a driver"
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        # Not a ConfigError: of those only rank 0 speaks, and it has its GPU.
        raise KernelUnavailable(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
            "launch at most that many ranks per host"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _loopback() -> str:
    """The network interface that leads to this host only: lo, or lo0."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a whole number") from None
