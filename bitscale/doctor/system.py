"""Limits, memory, cores and disks of this host: what ends or slows a run without a word."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import psutil

from bitscale.doctor.check import Check

GIB = 2**30
# A rank holds a socket to every peer (gloo), its shards, and the loader's files.
_MIN_OPEN_FILES = 4096
_MIN_PROCESSES = 4096
_MIN_SHM_BYTES = GIB
_MIN_FREE_BYTES = 5 * GIB
_MAX_SWAP_USED = 0.05  # of the memory
_MAX_LOAD = 1.5  # runnable processes a core
_INFINIBAND = Path("/dev/infiniband")
_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def limits() -> list[Check]:
    """`ulimit` as ranks get it: those of a non-interactive ssh often differ from a terminal's."""
    files, processes, locked, core = (
        resource.getrlimit(kind)[0]
        for kind in (
            resource.RLIMIT_NOFILE,
            resource.RLIMIT_NPROC,
            resource.RLIMIT_MEMLOCK,
            resource.RLIMIT_CORE,
        )
    )
    checks = [
        _at_least("open files", files, _MIN_OPEN_FILES, "nofile"),
        _at_least("processes", processes, _MIN_PROCESSES, "nproc"),
        _locked_memory(locked),
    ]
    # A crashed rank would write all its memory into its working directory, every rank the same.
    if core == resource.RLIM_INFINITY and not _core_is_piped():
        remedy = "ulimit -c 0, or let core_pattern pipe them to a collector"
        checks.append(Check("core dumps", "warn", "unlimited, into the working directory", remedy))
    else:
        checks.append(Check("core dumps", "ok", f"limit {_shown(core)}"))
    return checks


def _at_least(name: str, value: int, minimum: int, key: str) -> Check:
    if value != resource.RLIM_INFINITY and value < minimum:
        remedy = f"raise {key} to {minimum} in /etc/security/limits.d (ulimit of an ssh session)"
        return Check(name, "warn", f"limit {value}, below {minimum}", remedy)
    return Check(name, "ok", f"limit {_shown(value)}")


def _locked_memory(value: int) -> Check:
    """InfiniBand and RoCE register memory with the card, which locks it."""
    if _INFINIBAND.exists() and value != resource.RLIM_INFINITY:
        remedy = "set memlock to unlimited in /etc/security/limits.d; docker: --ulimit memlock=-1"
        value_shown = f"limit {value:,} bytes, and this host has InfiniBand"
        return Check("locked memory", "fail", value_shown, remedy)
    return Check("locked memory", "ok", f"limit {_shown(value)}")


def _shown(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else f"{value:,}"


def _core_is_piped() -> bool:
    return _CORE_PATTERN.is_file() and _CORE_PATTERN.read_text().startswith("|")


def memory() -> list[Check]:
    """Shared memory (NCCL and loaders), swap (a swapping rank holds up all others), load."""
    checks = []
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if shm < _MIN_SHM_BYTES:
        remedy = "mount it larger; docker: --shm-size 8g; Kubernetes: an emptyDir of medium Memory"
        checks.append(Check("/dev/shm", "warn", f"{shm / GIB:.2f} GiB, below 1 GiB", remedy))
    else:
        checks.append(Check("/dev/shm", "ok", f"{shm / GIB:.1f} GiB"))
    main, swap = psutil.virtual_memory(), psutil.swap_memory()
    value = f"{main.available / GIB:.1f} of {main.total / GIB:.1f} GiB free"
    if swap.used > _MAX_SWAP_USED * main.total:
        remedy = "find what fills the memory (top -o %MEM); swapoff -a while training"
        value = f"{value}, {swap.used / GIB:.1f} GiB swapped out"
        checks.append(Check("memory", "warn", value, remedy))
    else:
        checks.append(Check("memory", "ok", value))
    return checks


def cores() -> tuple[list[Check], dict[str, str]]:
    count = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    model = _cpu_model()
    value = f"{count} of {model}, load {load:.1f} a core"
    facts = {"cpu": f"{count} x {model}"}
    if load > _MAX_LOAD:
        remedy = "end what else runs here (top): ranks that share cores hold up all others"
        return [Check("cores", "warn", value, remedy)], facts
    return [Check("cores", "ok", value)], facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "an unnamed processor")


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def run_disk(run_dir: Path, needed_bytes: int) -> list[Check]:
    """Room where the run will be written: `needed_bytes` for its checkpoints (0: not known)."""
    folder = nearest_existing(run_dir)
    kind = file_system(folder)
    free = shutil.disk_usage(folder).free
    value = f"{free / GIB:.1f} GiB free at {folder} ({kind})"
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Check("run disk", "fail", f"{folder} is not writable", "chown it, or --run-dir")]
    if free < needed_bytes:
        value = f"{value}, checkpoints need {needed_bytes / GIB:.1f} GiB"
        remedy = "make room, choose another run.dir, or lower checkpoint.keep_last"
        return [Check("run disk", "fail", value, remedy)]
    if free < _MIN_FREE_BYTES:
        return [Check("run disk", "warn", value, "make room: a full disk ends the run")]
    if needed_bytes:
        value = f"{value}, checkpoints need {needed_bytes / GIB:.2g} GiB"
    return [Check("run disk", "ok", value)]


def file_system(folder: Path) -> str:
    """Kind of the file system that holds `folder`: ext4, nfs4, tmpfs, ..."""
    table = Path("/proc/self/mountinfo")
    if not table.is_file():
        return "unknown"
    best, kind = "", "unknown"
    resolved = str(folder.resolve())
    for line in table.read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = point == "/" or resolved == point or resolved.startswith(point + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind
