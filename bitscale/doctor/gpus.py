"""Health of this host's NVIDIA GPUs, as nvidia-smi tells it; nothing is changed on them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from bitscale.doctor.check import Check

_SECONDS = 20.0  # a GPU that fell off the bus can make nvidia-smi hang
_FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used",
    "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure",
    "power.limit", "power.default_limit", "temperature.gpu",
    "pcie.link.width.current", "pcie.link.width.max",
    "{0}.hw_slowdown", "{0}.hw_thermal_slowdown", "{0}.hw_power_brake_slowdown",
    "{0}.sw_thermal_slowdown",
)  # fmt: skip
_REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")  # the new name and the old
_MAX_USED_MIB = 1024
_MIN_POWER = 0.95  # of the default limit
_LINK_ORDER = ("NV", "PIX", "PXB", "PHB", "NODE", "SYS")  # fastest first

Gpu = dict[str, str]


def examine_gpus() -> tuple[list[Check], dict[str, str], int]:
    """Checks, facts to compare, and the number of GPUs; none of them without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return [], {}, 0
    try:
        gpus = _query()
    except subprocess.TimeoutExpired:
        value = f"nvidia-smi does not answer within {_SECONDS:.0f} s"
        return [Check("gpus", "fail", value, "look into dmesg for Xid; reboot the host")], {}, 0
    except ValueError as error:
        remedy = "look into dmesg for Xid; load or reinstall the driver"
        return [Check("gpus", "fail", str(error), remedy)], {}, 0
    if not gpus:
        return [], {}, 0
    names = sorted({gpu["name"] for gpu in gpus})
    memory = sorted({gpu["memory.total"] for gpu in gpus}, key=str)
    facts = {
        "driver": gpus[0]["driver_version"],
        "gpu": f"{len(gpus)} x {' and '.join(names)}, {' and '.join(memory)} MiB",
    }
    checks = [Check("gpus", "ok", f"{facts['gpu']}, driver {facts['driver']}")]
    if len(names) > 1 or len(memory) > 1:
        remedy = "train on equal GPUs: all ranks go at the pace, and in the memory, of the least"
        checks = [Check("gpus", "warn", f"unequal: {facts['gpu']}", remedy)]
    found = [check for gpu in gpus for check in _ailments(gpu)]
    checks += found or [Check("gpu health", "ok", "no memory errors, no throttling, full power")]
    return checks + _topology(len(gpus)), facts, len(gpus)


def _query() -> list[Gpu]:
    """One dictionary a GPU. ValueError with nvidia-smi's own words if it fails."""
    said = ""
    for reasons in _REASONS:
        fields = [field.format(reasons) for field in _FIELDS]
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}"]
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            rows = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines()]
            if any(len(row) != len(_FIELDS) for row in rows):
                raise ValueError(f"nvidia-smi answers with another form: {done.stdout[:80]!r}")
            keys = [field.removeprefix("{0}.") for field in _FIELDS]
            return [dict(zip(keys, row, strict=True)) for row in rows]
        said = " ".join(done.stdout.split())[:160]
        if "not a valid field" not in said:
            break
    if "No devices were found" in said:
        return []
    raise ValueError(f"nvidia-smi: {said or 'no message'}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, but after its time a process that cannot be killed is not waited for."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        out.seek(0)
        return subprocess.CompletedProcess(command, code, out.read())


def _ailments(gpu: Gpu) -> Iterator[Check]:
    """What is wrong with one GPU. A field that it does not have ("[N/A]") is no ailment."""
    name = f"GPU {gpu['index']}"
    errors = _number(gpu["ecc.errors.uncorrected.volatile.total"])
    if errors:
        value = f"{name}: {errors:.0f} uncorrectable memory errors since the driver was loaded"
        yield Check("gpu health", "fail", value, "drain the host, reset the GPU; then replace it")
    if gpu["remapped_rows.failure"] not in ("0", "No") and _is_told(gpu["remapped_rows.failure"]):
        value = f"{name}: its memory has no spare rows left (row remapping failed)"
        yield Check("gpu health", "fail", value, "replace the GPU")
    if gpu["remapped_rows.pending"] not in ("0", "No") and _is_told(gpu["remapped_rows.pending"]):
        value = f"{name}: memory rows wait to be remapped"
        yield Check("gpu health", "fail", value, "reset the GPU before the run")
    for reason in ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
                   "sw_thermal_slowdown"):  # fmt: skip
        if gpu[reason] == "Active":
            value = f"{name}: clocks are held down ({reason}, {gpu['temperature.gpu']} C)"
            yield Check("gpu health", "warn", value, "check cooling and power supply of the host")
    limit, default = _number(gpu["power.limit"]), _number(gpu["power.default_limit"])
    if limit is not None and default and limit < _MIN_POWER * default:
        value = f"{name}: power capped at {limit:.0f} of {default:.0f} W"
        yield Check("gpu health", "warn", value, f"nvidia-smi -i {gpu['index']} -pl {default:.0f}")
    width, most = (_number(gpu[f"pcie.link.width.{end}"]) for end in ("current", "max"))
    if width is not None and most and width < most:
        value = f"{name}: PCIe link has {width:.0f} of {most:.0f} lanes"
        yield Check("gpu health", "warn", value, "reseat the card, or have its riser replaced")
    used = _number(gpu["memory.used"])
    if used is not None and used > _MAX_USED_MIB:
        value = f"{name}: {used:,.0f} MiB in use by other processes"
        yield Check("gpu health", "warn", value, "nvidia-smi lists them; end them before the run")


def _is_told(text: str) -> bool:
    return not text.startswith("[")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _topology(num_gpus: int) -> list[Check]:
    """The slowest way between two GPUs of this host."""
    if num_gpus < 2:
        return []
    try:
        done = _run(["nvidia-smi", "topo", "-m"])
    except subprocess.TimeoutExpired:
        return []
    links = set(parse_topology(done.stdout, num_gpus))
    if not links:
        return []
    slowest = max(links, key=_link_rank)
    value = f"GPUs are joined by {', '.join(sorted(links, key=_link_rank))}"
    if slowest == "SYS" and len(links) > 1:
        remedy = "keep tensor-parallel ranks on GPUs that are joined directly"
        return [Check("gpu links", "warn", f"{value} (SYS crosses sockets)", remedy)]
    return [Check("gpu links", "ok", value)]


def parse_topology(text: str, num_gpus: int) -> Iterator[str]:
    """The kinds of link between two GPUs in `nvidia-smi topo -m`: NV18, PIX, SYS, ..."""
    for line in text.splitlines():
        cells = re.sub(r"\x1b\[[0-9;]*m", "", line).split()
        if cells and re.fullmatch(r"GPU\d+", cells[0]) and not re.match(r"GPU\d", cells[1]):
            yield from (cell for cell in cells[1 : num_gpus + 1] if cell != "X")


def _link_rank(link: str) -> tuple[int, int]:
    kind = "NV" if link.startswith("NV") else link
    lanes = int(link[2:]) if link[2:].isdigit() else 0
    return (_LINK_ORDER.index(kind) if kind in _LINK_ORDER else len(_LINK_ORDER), -lanes)
