"""Python, the packages, the source of bitscale itself, and the compiler that kernels need."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import bitscale
from bitscale.doctor.check import Check
from bitscale.source_commit import source_commit

_PYTHON = ((3, 11), (3, 12))
_COMPARED = ("torch", "deepspeed", "megatron-core", "numpy", "triton")
_COMPILERS = ("cc", "gcc", "clang")
_PROGRAM = "#include <Python.h>\n#include <math.h>\nint answer(void) { return 42; }\n"


def python() -> tuple[list[Check], dict[str, str]]:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] in _PYTHON:
        check = Check("python", "ok", found)
    else:
        check = Check("python", "fail", found, "use Python 3.11 or 3.12")
    return [check], {"python": platform.python_version()}


def source() -> tuple[list[Check], dict[str, str]]:
    """The version, commit and content of the bitscale that runs here."""
    content = fingerprint(Path(bitscale.__file__).parent)
    commit = source_commit()
    value = f"{bitscale.__version__}, source {content}{f', commit {commit}' if commit else ''}"
    return [Check("bitscale", "ok", value)], {"bitscale": f"{bitscale.__version__} {content}"}


def fingerprint(package: Path) -> str:
    """SHA-256 (12 hex digits) over every source file of an installed package, names included."""
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".c", ".h")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(package)} {content}\n".encode())
    return digest.hexdigest()[:12]


def packages() -> tuple[list[Check], dict[str, str]]:
    """What is installed against what bitscale's own metadata asks for; imports nothing."""
    facts = {name: version for name in _COMPARED if (version := _installed(name))}
    try:
        wrong = list(_wrong_packages())
    except importlib.metadata.PackageNotFoundError:
        value = "bitscale runs from a folder and is not installed: its requirements are not known"
        return [Check("packages", "warn", value, "pip install -c constraints.txt -e .")], facts
    if wrong:
        remedy = "pip install -c constraints.txt -e . in the environment of this host"
        return [Check("packages", "fail", "; ".join(wrong), remedy)], facts
    return [Check("packages", "ok", ", ".join(f"{n} {v}" for n, v in facts.items()))], facts


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _wrong_packages() -> Iterator[str]:
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("bitscale") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed(requirement.name)
        if not version:
            yield f"{requirement.name} is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is not {requirement.specifier}"


def torch_build(num_gpus: int) -> tuple[list[Check], dict[str, str]]:
    """Import torch: what it was built for, and whether it sees the GPUs that the driver lists."""
    try:
        import torch
    except (ImportError, OSError) as error:
        value = f"torch does not import: {' '.join(str(error).split())[:160]}"
        return [Check("torch", "fail", value, "install the packages again")], {}
    facts = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if not torch.cuda.is_available():
        if num_gpus:
            value = f"{torch.__version__} sees none of the {num_gpus} GPUs that nvidia-smi lists"
            remedy = "install torch's CUDA build, and a driver as new as it (or unset "
            return [Check("torch", "fail", value, f"{remedy}CUDA_VISIBLE_DEVICES)")], facts
        return [Check("torch", "ok", f"{torch.__version__}, no GPU: gloo on CPU")], facts
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    facts["gpus"] = str(torch.cuda.device_count())
    value = f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {facts['nccl']}"
    return [Check("torch", "ok", f"{value}, {facts['gpus']} GPUs")], facts


def compiler() -> list[Check]:
    """Compile with Python's headers: kernel 'cpu' and Triton's launchers are built on first use."""
    remedy = "apt install gcc libc6-dev python3-dev; without it only quant.kernel=reference runs"
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        return [Check("compiler", "warn", f"none of {', '.join(_COMPILERS)}", remedy)]
    include = sysconfig.get_path("include")
    command = [found, "-x", "c", "-fsyntax-only", f"-I{include}", "-"]
    done = subprocess.run(
        command, input=_PROGRAM, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        line = next(iter(done.stderr.splitlines()), "no message")
        return [Check("compiler", "warn", f"{found} fails: {line[:120]}", remedy)]
    return [Check("compiler", "ok", f"{found}, with Python's headers")]
